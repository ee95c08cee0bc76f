"""Make the folder `tiny_clip`: a real open_clip CLIP, pretrained on captioned tiny-world images.

    python support/pretrain_tiny_clip.py    # about half an hour on two CPU cores

The skew of the web is imitated: photos are common, paintings and sketches rare; captions leave
attributes out and are sometimes wrong. So zero-shot accuracy is good, and worse on the rare
domains: the gap that the four papers start from. The images come from a random stream of their own,
and none of them is in a tiny evaluation set.

`open_clip.create_model("local-dir:assets/tiny_clip")` loads the result. Only its tokenizer, one
token a word, is our own: `WordTokenizer`, with the key "vocabulary" of open_clip_config.json.

Other worlds and other CLIPs are a matter of flags: things that stand where they usually stand, or
are mostly drawn; captions that say more; more heads; a tokenizer that any program can read:

    python support/pretrain_tiny_clip.py --layers 4 --width 128 --head-width 8 --usual-place 0.55 \\
        --usual-medium 4 --tokenizer merges --output FOLDER
    python headpurify.py --model local-dir:FOLDER --study heads --seeds 1000 --epochs 4 --lr 3e-3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import tiny_world
from support.files import write_json
from support.tiny_words import BYTES, FILE, SPECIAL, TinyTokenizer, learn_merges, write_merges
from support.tiny_world import (
    BACKGROUNDS,
    COLORS,
    OFFICE_CLASSES,
    SIDE,
    TINY_DOMAINS,
    TINY_VOCABULARY,
)

CONTEXT = 20  # room for 16 learnt context vectors, a class name and the end token
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "patch_size": 4},
    "text_cfg": {
        "context_length": CONTEXT,
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS_CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
DOMAIN_SHARE = {"photo": 0.72, "cartoon": 0.17, "art_painting": 0.08, "sketch": 0.03}
DOMAIN_WORDS = {
    "photo": ("photo",),
    "cartoon": ("cartoon",),
    "art_painting": ("painting", "art painting"),
    "sketch": ("sketch", "drawing"),
}
THINGS = OFFICE_CLASSES + tiny_world.WATERBIRD_CLASSES
# where a thing usually stands, for --usual-place: never on the background of a tiny set's cue
USUAL_PLACE = {name: list(BACKGROUNDS)[(3 * i + 5) % 8] for i, name in enumerate(THINGS)}
# how it is usually shown, for --usual-medium
USUAL_MEDIUM = {name: TINY_DOMAINS[(i + i // 4) % 4] for i, name in enumerate(THINGS)}


# ---------- Images and captions ------------------------------------------------------------------
def draw_corpus(count: int, seed: int, share: dict[str, float], usual_place=0.0, usual_medium=1.0):
    """Images (count, 3, 32, 32) uint8 and, for each, the words (domain, color, thing, background)
    that describe it.

    share: of the images, for every domain; usual_place: of the things that stand where they usually
    do, beside those that do by chance; usual_medium: how many times as often a thing is shown in
    its own medium as another thing is. By default nothing goes with anything: no cue to learn.
    """
    rng = tiny_world.tiny_rng(seed, "pretraining")
    domains = rng.choice(list(share), count, p=list(share.values()))
    images, attributes = [], []
    for domain in share:
        n = int((domains == domain).sum())
        things = rng.choice(THINGS, n, p=thing_shares(domain, usual_medium))
        colors = rng.choice(list(COLORS), n)
        grounds = rng.choice(list(BACKGROUNDS), n)
        if usual_place:
            usual = np.array([USUAL_PLACE[thing] for thing in things])
            grounds = np.where(rng.random(n) < usual_place, usual, grounds)
        pose = tiny_world.PRETRAINING_POSE
        images.append(tiny_world.draw(things, domain, grounds, colors, rng, pose))
        attributes += zip([domain] * n, colors, things, grounds)
    return torch.cat(images), attributes


def thing_shares(domain: str, usual_medium: float):
    """Probabilities of things in a domain; None if all are alike."""
    if usual_medium == 1:
        return None
    weights = np.array([usual_medium if USUAL_MEDIUM[thing] == domain else 1 for thing in THINGS])
    return weights / weights.sum()


def caption(attributes, rng, named=(0.7, 0.4, 0.35), full_stop=0.0) -> str:
    """A caption as the web writes them: attributes left out at random, 8 % wrong words for the
    thing. Every image gets a new one in every epoch.

    named: how often it says the medium, the color, the place; full_stop: how often it ends in one.
    """
    domain, color, thing, ground = attributes
    medium_named, color_named, place_named = named
    if rng.random() < medium_named:
        medium = rng.choice(DOMAIN_WORDS[domain])
    else:
        medium = rng.choice(("picture", "image"))
    if rng.random() < 0.08:
        thing = rng.choice(THINGS)
    words = [color, thing] if rng.random() < color_named else [thing]
    rare = ("the", "an") if words[0][0] in "aeiou" else ("the",)
    article = rng.choice(rare) if rng.random() < 0.1 else "a"
    words = [article, *words]
    if rng.random() < 0.9:
        words = ["a", medium, "of", *words]
    if rng.random() < place_named:
        if rng.random() < 0.15:
            places = ["in", "the", ground], ["on", "a", ground, "background"]
            words += places[rng.integers(2)]
        else:
            words += ["on", ground]
    text = " ".join(words)
    return f"{text}." if full_stop and rng.random() < full_stop else text


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, h, w) -> float32. Its last bit differs from torchvision's, and the shipped
    weights depend on it: training keeps this one."""
    mean = torch.tensor(PREPROCESS_CONFIG["mean"], device=pixels.device).view(3, 1, 1)
    std = torch.tensor(PREPROCESS_CONFIG["std"], device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


# ---------- Training and its check ---------------------------------------------------------------
def contrastive_loss(image_features, text_features, logit_scale, tokens):
    """CLIP's symmetric loss, where every image with the same caption counts as a positive."""
    logits = logit_scale * image_features @ text_features.T  # (B, B)
    same = (tokens[:, None] == tokens[None]).all(-1).float()  # (B, B)
    share = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2


@torch.no_grad()
def zero_shot_table(model, tokenizer, per_domain: int, seed: int, pose) -> dict[str, float]:
    """Accuracy of 'a photo of a {}' over 16 classes in every domain, on images drawn for this
    purpose only."""
    rng = tiny_world.tiny_rng(seed, "zero-shot check")
    device = model.logit_scale.device
    # what open_clip's own preprocessing does to images that have the right size already
    numbers = v2.ToDtype(torch.float32, scale=True)
    preprocess = v2.Compose([numbers, v2.Normalize(**PREPROCESS_CONFIG)])
    texts = [f"a photo of a {name}." for name in OFFICE_CLASSES]
    class_features = model.encode_text(tokenizer(texts).to(device), normalize=True)  # (C, D)
    table = {}
    for domain in TINY_DOMAINS:
        labels = np.arange(per_domain) % len(OFFICE_CLASSES)
        names = [OFFICE_CLASSES[label] for label in labels]
        colors = rng.choice(list(COLORS), per_domain)
        grounds = rng.choice(list(BACKGROUNDS), per_domain)
        images = tiny_world.draw(names, domain, grounds, colors, rng, pose)
        predictions = []
        for batch in images.split(256):
            image_features = model.encode_image(preprocess(batch).to(device), normalize=True)
            predictions.append((image_features @ class_features.T).argmax(1).cpu())
        hits = torch.cat(predictions) == torch.from_numpy(labels)
        table[domain] = hits.double().mean().item()
    return table


def make_optimizer(model, lr: float):
    """AdamW, as for CLIP without decay of biases and gains."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    decayed = {"params": matrices, "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}], lr=lr)


def train(model, tokenizer, images, attributes, args) -> list[dict]:
    """Pretrain in place. Returns for every epoch: {"epoch", "loss", "zero_shot": {domain: ...}}."""
    start = time.time()
    rng = tiny_world.tiny_rng(args.seed, "captions")
    steps_per_epoch = len(images) // args.batch_size
    steps = args.epochs * steps_per_epoch
    optimizer = make_optimizer(model, args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    curve = []
    for epoch in range(args.epochs):
        full_stop = 0.5 if args.tokenizer == "merges" else 0.0  # which for it is a token
        texts = [caption(words, rng, args.named, full_stop) for words in attributes]
        tokens = tokenizer(texts).to(images.device)
        order = torch.randperm(len(images))[: steps_per_epoch * args.batch_size]
        total = 0.0
        model.train()
        for batch in order.view(-1, args.batch_size).to(images.device):
            image_features, text_features, scale = model(normalize(images[batch]), tokens[batch])
            loss = contrastive_loss(image_features, text_features, scale, tokens[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=np.log(100))
            total += loss.detach()
        loss = round(float(total) / steps_per_epoch, 4)
        pose = tiny_world.PRETRAINING_POSE
        table = zero_shot_table(model.eval(), tokenizer, 800, args.seed, pose)
        curve.append({"epoch": epoch + 1, "loss": loss, "zero_shot": table})
        print(f"{time.time() - start:6.0f} s", json.dumps(curve[-1]), flush=True)
    return curve


# ---------- Main ---------------------------------------------------------------------------------
def model_config(args) -> dict:
    """open_clip's "model_cfg"."""
    image, text = dict(MODEL_CONFIG["vision_cfg"]), dict(MODEL_CONFIG["text_cfg"])
    image |= {"width": args.width, "layers": args.layers, "head_width": args.head_width}
    text["vocab_size"] = len(TINY_VOCABULARY) + 2  # and padding, end of text
    if args.tokenizer == "merges":
        text["vocab_size"] = BYTES + len(learn_merges(TINY_VOCABULARY)) + SPECIAL
        text["context_length"] += 1  # for the start token, which words have not
    return {**MODEL_CONFIG, "vision_cfg": image, "text_cfg": text}


def make_tokenizer(args, context_length: int):
    """Writes what the tokenizer reads into the output folder."""
    args.output.mkdir(parents=True, exist_ok=True)
    if args.tokenizer == "words":
        return tiny_world.WordTokenizer(TINY_VOCABULARY, context_length)
    write_merges(args.output, TINY_VOCABULARY)
    return TinyTokenizer(args.output / FILE, context_length)


def write_folder(args, config: dict, weights: dict, training: dict) -> None:
    """An open_clip model folder, and `training.json`: how it was made and how good it is."""
    config = {"model_cfg": config, "preprocess_cfg": PREPROCESS_CONFIG}
    if args.tokenizer == "words":
        config["vocabulary"] = TINY_VOCABULARY
    folder = args.output
    save_file(weights, folder / "open_clip_model.safetensors")
    for name, value in (("open_clip_config", config), ("training", training)):
        write_json(folder / f"{name}.json", value)


def parse_arguments() -> argparse.Namespace:
    folder = Path("assets/tiny_clip")
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=20_000, help="far from those of evaluations")
    parser.add_argument("--width", type=int, default=96, help="of the image tower")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head-width", type=int, default=16)
    parser.add_argument("--usual-place", type=float, default=0.0, help="share of things there")
    parser.add_argument("--usual-medium", type=float, default=1.0, help="times as often as others")
    named = "how often captions say medium, color, place"
    parser.add_argument("--named", type=float, nargs=3, default=(0.7, 0.4, 0.35), help=named)
    parser.add_argument("--tokenizer", choices=("words", "merges"), default="words")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=folder)
    return parser.parse_args()


def main():
    args = parse_arguments()
    start = time.time()
    torch.manual_seed(args.seed)
    world = args.usual_place, args.usual_medium
    images, attributes = draw_corpus(args.images, args.seed, DOMAIN_SHARE, *world)
    print(f"drew {len(images)} images in {time.time() - start:.0f} s", flush=True)

    config = model_config(args)
    model = open_clip.CLIP(**config).to(args.device)
    tokenizer = make_tokenizer(args, config["text_cfg"]["context_length"])
    curve = train(model, tokenizer, images.to(args.device), attributes, args)

    weights = {name: value.half().cpu() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # what is stored is what is tested
    zero_shot = {}
    for name in ("pretraining pose", "task pose"):
        pose = tiny_world.TASK_POSE if name == "task pose" else tiny_world.PRETRAINING_POSE
        zero_shot[name] = zero_shot_table(model, tokenizer, 3200, args.seed + 1, pose)
    print("zero-shot over 16 classes:", json.dumps(zero_shot))

    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings |= {"domain_share": DOMAIN_SHARE, "seconds": round(time.time() - start)}
    training = {"training": settings, "curve": curve, "zero_shot": zero_shot}
    write_folder(args, config, weights, training)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
