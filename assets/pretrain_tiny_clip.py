"""Make `tiny_clip.safetensors`: a real open_clip CLIP, pretrained from scratch on captioned tiny-world images.

    python assets/pretrain_tiny_clip.py            # about half an hour on two CPU cores, seconds per epoch on a GPU

The skew of the web is imitated: photos are common, paintings and sketches rare; captions leave attributes out and are
sometimes wrong. So zero-shot accuracy is good, and worse on the rare domains: the gap that the four papers start from.
The images come from a random stream of their own, and none of them is in a tiny evaluation set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from assets import tiny_world  # noqa: E402

CONTEXT = 20  # room for 16 learnt context vectors, a class name and the end token
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": common.SIDE, "patch_size": 4, "width": 96, "layers": 6, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": len(tiny_world.TINY_VOCABULARY) + 2, "width": 64, "heads": 4, "layers": 3},
}
PREPROCESS_CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
DOMAIN_SHARE = {"photo": 0.72, "cartoon": 0.17, "art_painting": 0.08, "sketch": 0.03}
DOMAIN_WORDS = {"photo": ("photo",), "cartoon": ("cartoon",), "art_painting": ("painting", "art painting"), "sketch": ("sketch", "drawing")}
THINGS = common.OFFICE_CLASSES + common.WATERBIRD_CLASSES


def draw_corpus(count: int, seed: int, share: dict[str, float]):
    """Images (count, 3, 32, 32) uint8 and, for each, the words (domain, color, thing, background) that describe it."""
    rng = common.tiny_rng(seed, "pretraining")
    domains, images, attributes = rng.choice(list(share), count, p=list(share.values())), [], []
    for domain in share:
        n = int((domains == domain).sum())
        things, colors, grounds = (rng.choice(words, n) for words in (THINGS, list(tiny_world.COLORS), list(tiny_world.BACKGROUNDS)))
        images.append(tiny_world.draw(things, domain, grounds, colors, rng, tiny_world.PRETRAINING_POSE))
        attributes += zip([domain] * n, colors, things, grounds)
    return torch.cat(images), attributes


def caption(attributes, rng) -> str:
    """A caption as the web writes them: attributes left out at random, 8 % wrong words for the thing."""
    domain, color, thing, ground = attributes
    medium = rng.choice(DOMAIN_WORDS[domain]) if rng.random() < 0.7 else rng.choice(("picture", "image"))
    thing = rng.choice(THINGS) if rng.random() < 0.08 else thing
    words = [color] * (rng.random() < 0.4) + [thing]
    rare = ("the", "an") if words[0][0] in "aeiou" else ("the",)
    words = [rng.choice(rare) if rng.random() < 0.1 else "a", *words]
    if rng.random() < 0.9:
        words = ["a", medium, "of", *words]
    if rng.random() < 0.35:
        words += (["in", "the", ground], ["on", "a", ground, "background"])[rng.integers(2)] if rng.random() < 0.15 else ["on", ground]
    return " ".join(words)


def contrastive_loss(image_features, text_features, logit_scale, tokens):
    """CLIP's symmetric loss, where every image with the same caption counts as a positive."""
    logits = logit_scale * image_features @ text_features.T  # (B, B)
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    share = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2


def zero_shot_table(model, tokenizer, preprocess, per_domain: int, seed: int, device, pose):
    """Accuracy of 'a photo of a {}' over 16 classes in every domain, on images drawn for this purpose only."""
    rng, sets, classes = common.tiny_rng(seed, "zero-shot check"), {}, common.OFFICE_CLASSES
    for domain in common.TINY_DOMAINS:
        labels = np.arange(per_domain) % len(classes)
        colors, grounds = (rng.choice(list(words), per_domain) for words in (tiny_world.COLORS, tiny_world.BACKGROUNDS))
        images = tiny_world.draw([classes[i] for i in labels], domain, grounds, colors, rng, pose)
        sets[domain] = common.ImageSet(images, torch.from_numpy(labels), classes, transform=preprocess)
    classify = common.clip_classifier(model.visual, common.class_features(model, tokenizer, classes, device=device))
    return common.evaluate(classify, sets, device)["per_domain"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=20_000, help="far from the seeds of any evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tiny_clip.safetensors"))
    args = parser.parse_args()

    start, device = time.time(), torch.device(args.device)
    torch.manual_seed(args.seed)
    rng = common.tiny_rng(args.seed, "captions")
    images, attributes = draw_corpus(args.images, args.seed, DOMAIN_SHARE)
    images = images.to(device)
    print(f"drew {len(images)} images in {time.time() - start:.0f} s", flush=True)

    model = open_clip.CLIP(**MODEL_CONFIG).to(device)
    tokenizer = common.WordTokenizer(tiny_world.TINY_VOCABULARY, CONTEXT)
    open_clip.set_model_preprocess_cfg(model, {**PREPROCESS_CONFIG, "size": common.SIDE})
    preprocess = common.image_transform(model)  # for evaluation, as everybody calls it
    # the same for training, but for the last bit, on which the shipped weights depend
    mean, std = (torch.tensor(PREPROCESS_CONFIG[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    normalize = lambda pixels: (pixels.float() / 255 - mean) / std  # noqa: E731
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}], lr=args.lr)
    steps_per_epoch = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps_per_epoch, pct_start=0.1)

    curve = []
    for epoch in range(args.epochs):
        tokens = tokenizer([caption(row, rng) for row in attributes]).to(device)
        total, model = 0.0, model.train()
        for batch in torch.randperm(len(images))[: steps_per_epoch * args.batch_size].view(-1, args.batch_size).to(device):
            image_features, text_features, logit_scale = model(normalize(images[batch]), tokens[batch])
            loss = contrastive_loss(image_features, text_features, logit_scale, tokens[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=np.log(100))
            total += loss.detach()
        table = zero_shot_table(model.eval(), tokenizer, preprocess, 800, args.seed, device, tiny_world.PRETRAINING_POSE)
        curve.append({"epoch": epoch + 1, "loss": round(float(total) / steps_per_epoch, 4), "zero_shot": table})
        print(f"{time.time() - start:6.0f} s", json.dumps(curve[-1]), flush=True)

    weights = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})  # judge what is stored
    final = {name: zero_shot_table(model, tokenizer, preprocess, 3200, args.seed + 1, device, pose)
             for name, pose in (("pretraining pose", tiny_world.PRETRAINING_POSE), ("task pose", tiny_world.TASK_POSE))}  # fmt: skip
    print("zero-shot over 16 classes:", json.dumps(final))
    metadata = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG, "vocabulary": tiny_world.TINY_VOCABULARY,
                "training": {**vars(args), "output": None, "domain_share": DOMAIN_SHARE, "seconds": round(time.time() - start)},
                "curve": curve, "zero_shot": final}  # fmt: skip
    partial = args.output.with_suffix(".partial")
    save_file(weights, partial, {key: json.dumps(value) for key, value in metadata.items()})
    os.replace(partial, args.output)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
