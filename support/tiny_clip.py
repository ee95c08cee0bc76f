"""The tiny CLIPs: their words and tokenizers, and the script that pretrains `assets/tiny_clip`.

    python support/tiny_clip.py --output FOLDER    # about half an hour on two CPU cores

The captioned images imitate the web: photos are common, paintings and sketches are rare, captions
leave attributes out and are sometimes wrong. Zero-shot accuracy is therefore good, but worse on the
rare domains: the gap that the four papers start from. The images have their own random stream, and
none of them is in a tiny evaluation set. `open_clip.create_model("local-dir:FOLDER")` loads the
result; only its tokenizer, one token a word, is our own.

`assets/tiny_clip_16_heads` was made by an earlier version of this script; its training.json has the
settings. Its tokenizer is open_clip's own, with a merge file in which every word is one token.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for use as a script
from support import InputError
from support.runs import write_file, write_json
from support.tiny_world import (
    BACKGROUNDS,
    COLORS,
    OFFICE_CLASSES,
    PRETRAINING_POSE,
    SIDE,
    TASK_POSE,
    TINY_DOMAINS,
    WATERBIRD_CLASSES,
    draw,
    tiny_rng,
)

# ---------- Words and tokenizers -----------------------------------------------------------------
FILE = "merges.txt.gz"  # open_clip's format for byte pair encoding
FUNCTION_WORDS = ("a", "an", "of", "on", "in", "the")
MEDIA = ("photo", "painting", "art", "cartoon", "sketch", "drawing", "picture", "image")
THINGS = OFFICE_CLASSES + WATERBIRD_CLASSES
WORDS = (*FUNCTION_WORDS, *MEDIA, *THINGS, *COLORS, *BACKGROUNDS, "background")
TINY_VOCABULARY = tuple(sorted(WORDS))


def words_of(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace(",", " ").split()


def unknown_words(text: str, vocabulary) -> list[str]:
    return [word for word in words_of(text) if word not in vocabulary]


def refuse_unknown(text: str, vocabulary) -> None:
    """Raises: InputError if a word of the text is not in the vocabulary."""
    for word in unknown_words(text, vocabulary):
        raise InputError(
            f"the tiny CLIP does not know the word {word!r} (in {text!r}); "
            f"it knows: {', '.join(vocabulary)}"
        )


class WordTokenizer:
    """One token a word: a text or a list of n texts -> (n, context_length) int64.

    Token 0 is padding. The end token has the highest number, because open_clip's text tower takes
    the feature at the highest token.
    Raises: InputError for a word that is not in the vocabulary, and for a text that is too long.
    """

    def __init__(self, vocabulary, context_length: int):
        self.words = tuple(vocabulary)
        self.tokens = {word: i + 1 for i, word in enumerate(vocabulary)}
        self.end = len(vocabulary) + 1
        self.context_length = context_length

    def __call__(self, texts) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            refuse_unknown(text, self.tokens)
            words = words_of(text)
            if len(words) >= self.context_length:
                most = f"the tiny CLIP reads at most {self.context_length - 1}"
                raise InputError(f"{text!r} has {len(words)} words, {most}")
            ids = [self.tokens[word] for word in words] + [self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


class TinyTokenizer(SimpleTokenizer):
    """open_clip's tokenizer with a merge file whose first line lists the words the model has seen:
    a text or a list of n texts -> (n, context_length) int64.

    Raises: InputError for a word that is not in the list, and for a text that is too long.
    """

    def __init__(self, file: Path, context_length: int):
        super().__init__(str(file), context_length=context_length)
        self.file = Path(file)
        with gzip.open(self.file, "rt") as lines:
            self.words = next(lines).split()

    def __call__(self, texts, context_length: int | None = None) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        most = (context_length or self.context_length) - 2  # start and end token
        for text in texts:
            refuse_unknown(text, self.words)
            tokens = len(self.encode(text))
            if tokens > most:
                raise InputError(
                    f"{text!r} has {tokens} tokens, the tiny CLIP reads at most {most}"
                )
        return super().__call__(texts, context_length)


def tokenizer_of(name: str, model: nn.Module) -> Callable:
    """The tokenizer of an open_clip model name: of a local folder with a vocabulary or a merge
    file, the one that this file defines; of any other model, open_clip's."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if (folder / FILE).is_file():
            return TinyTokenizer(folder / FILE, model.context_length)
        config = json.loads((folder / "open_clip_config.json").read_text())
        if config.get("vocabulary"):
            return WordTokenizer(config["vocabulary"], model.context_length)
    return open_clip.get_tokenizer(name)


# ---------- Images and captions ------------------------------------------------------------------
DOMAIN_SHARE = {"photo": 0.72, "cartoon": 0.17, "art_painting": 0.08, "sketch": 0.03}
DOMAIN_WORDS = {
    "photo": ("photo",),
    "cartoon": ("cartoon",),
    "art_painting": ("painting", "art painting"),
    "sketch": ("sketch", "drawing"),
}


def draw_corpus(count: int, seed: int):
    """Images (count, 3, 32, 32) uint8 and, for each, the words (domain, color, thing, background)
    that describe it. All four are independent, so there is no spurious cue to learn."""
    rng = tiny_rng(seed, "pretraining")
    domains = rng.choice(list(DOMAIN_SHARE), count, p=list(DOMAIN_SHARE.values()))
    images, attributes = [], []
    for domain in DOMAIN_SHARE:
        n = int((domains == domain).sum())
        things = rng.choice(THINGS, n)
        colors = rng.choice(list(COLORS), n)
        grounds = rng.choice(list(BACKGROUNDS), n)
        images.append(draw(things, domain, grounds, colors, rng, PRETRAINING_POSE))
        attributes += zip([domain] * n, colors, things, grounds)
    return torch.cat(images), attributes


def caption(attributes, rng) -> str:
    """A caption as on the web: it leaves attributes out at random, and with probability 0.08 it
    names a random thing. Every image gets a new caption in every epoch."""
    domain, color, thing, ground = attributes
    if rng.random() < 0.7:
        medium = rng.choice(DOMAIN_WORDS[domain])
    else:
        medium = rng.choice(("picture", "image"))
    if rng.random() < 0.08:
        thing = rng.choice(THINGS)
    words = [color, thing] if rng.random() < 0.4 else [thing]
    rare = ("the", "an") if words[0][0] in "aeiou" else ("the",)
    article = rng.choice(rare) if rng.random() < 0.1 else "a"
    words = [article, *words]
    if rng.random() < 0.9:
        words = ["a", medium, "of", *words]
    if rng.random() < 0.35:
        if rng.random() < 0.15:
            phrases = ["in", "the", ground], ["on", "a", ground, "background"]
            words += phrases[rng.integers(2)]
        else:
            words += ["on", ground]
    return " ".join(words)


# ---------- Pretraining --------------------------------------------------------------------------
CONTEXT = 20  # room for 16 learned context vectors, a class name and the end token
MODEL_CONFIG = {  # "model_cfg" of open_clip
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": SIDE,
        "patch_size": 4,
        "width": 96,
        "layers": 6,
        "head_width": 16,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(TINY_VOCABULARY) + 2,  # and padding, end of text
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS_CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
BATCH_SIZE = 256
LEARNING_RATE = 1e-3


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, h, w) -> float32. The last bit differs from torchvision's result; the shipped
    weights depend on it, so training uses this function."""
    mean = torch.tensor(PREPROCESS_CONFIG["mean"]).view(3, 1, 1)
    std = torch.tensor(PREPROCESS_CONFIG["std"]).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def contrastive_loss(image_features, text_features, logit_scale, tokens):
    """CLIP's symmetric loss, where every image with the same caption counts as a positive.

    Args: unit-norm features (B, D) of images and texts; tokens (B, L) of the captions.
    """
    logits = logit_scale * image_features @ text_features.T  # (B, B)
    same = (tokens[:, None] == tokens[None]).all(-1).float()  # (B, B)
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def zero_shot_table(model, tokenizer, per_domain: int, seed: int, pose) -> dict[str, float]:
    """Accuracy of 'a photo of a {}' over 16 classes, for every domain, on newly drawn images."""
    rng = tiny_rng(seed, "zero-shot check")
    # what open_clip's preprocessing does to images that have the right size already
    to_float = v2.ToDtype(torch.float32, scale=True)
    preprocess = v2.Compose([to_float, v2.Normalize(**PREPROCESS_CONFIG)])
    texts = [f"a photo of a {name}." for name in OFFICE_CLASSES]
    class_features = model.encode_text(tokenizer(texts), normalize=True)  # (C, D)
    table = {}
    for domain in TINY_DOMAINS:
        labels = np.arange(per_domain) % len(OFFICE_CLASSES)
        names = [OFFICE_CLASSES[label] for label in labels]
        colors = rng.choice(list(COLORS), per_domain)
        grounds = rng.choice(list(BACKGROUNDS), per_domain)
        images = draw(names, domain, grounds, colors, rng, pose)
        predictions = []
        for batch in images.split(256):
            image_features = model.encode_image(preprocess(batch), normalize=True)
            predictions.append((image_features @ class_features.T).argmax(1))
        correct = torch.cat(predictions) == torch.from_numpy(labels)
        table[domain] = correct.double().mean().item()
    return table


def make_optimizer(model):
    """AdamW; as for CLIP, biases and gains do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    decayed = {"params": matrices, "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}], lr=LEARNING_RATE)


def train(model, tokenizer, images, attributes, epochs: int, seed: int) -> list[dict]:
    """Pretrain in place. Returns for every epoch: {"epoch", "loss", "zero_shot": {domain: ...}}."""
    rng = tiny_rng(seed, "captions")
    steps_per_epoch = len(images) // BATCH_SIZE
    steps = epochs * steps_per_epoch
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    curve = []
    for epoch in range(epochs):
        tokens = tokenizer([caption(words, rng) for words in attributes])
        order = torch.randperm(len(images))[: steps_per_epoch * BATCH_SIZE]
        total = 0.0
        model.train()
        for batch in order.view(-1, BATCH_SIZE):
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
        table = zero_shot_table(model.eval(), tokenizer, 800, seed, PRETRAINING_POSE)
        curve.append({"epoch": epoch + 1, "loss": loss, "zero_shot": table})
        print(json.dumps(curve[-1]), flush=True)
    return curve


# ---------- Main ---------------------------------------------------------------------------------
def pretrain(images: int, epochs: int, seed: int, folder: Path) -> None:
    """Write an open_clip model folder, and `training.json`: how it was made and how good it is.

    Raises: InputError if a number is too small or the folder cannot be written.
    """
    least = {"--images": (images, BATCH_SIZE), "--epochs": (epochs, 1), "--seed": (seed, 0)}
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"{flag} must be at least {minimum}, got {value}")
    start = time.time()
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    config["vocabulary"] = TINY_VOCABULARY
    write_json(folder / "open_clip_config.json", config)  # first: it fails before the training
    torch.manual_seed(seed)
    corpus, attributes = draw_corpus(images, seed)
    model = open_clip.CLIP(**MODEL_CONFIG)
    tokenizer = WordTokenizer(TINY_VOCABULARY, CONTEXT)
    curve = train(model, tokenizer, corpus, attributes, epochs, seed)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # test the rounded weights, which are the ones that are stored
    poses = {"pretraining pose": PRETRAINING_POSE, "task pose": TASK_POSE}
    zero_shot = {}
    for name, pose in poses.items():
        zero_shot[name] = zero_shot_table(model, tokenizer, 3200, seed + 1, pose)
    print("zero-shot over 16 classes:", json.dumps(zero_shot))
    settings = {"images": images, "epochs": epochs, "batch_size": BATCH_SIZE, "lr": LEARNING_RATE}
    settings |= {"seed": seed, "device": "cpu", "domain_share": DOMAIN_SHARE}
    settings["seconds"] = round(time.time() - start)
    write_file(folder / "open_clip_model.safetensors", lambda path: save_file(weights, path))
    training = {"training": settings, "curve": curve, "zero_shot": zero_shot}
    write_json(folder / "training.json", training)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--seed", type=int, default=20_000, help="not one of an evaluation set")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    try:
        pretrain(args.images, args.epochs, args.seed, args.output)
    except InputError as error:
        parser.error(str(error))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
