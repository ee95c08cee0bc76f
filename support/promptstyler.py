"""PromptStyler: class features from style words that no image taught (Cho et al., ICCV 2023).

    python support/promptstyler.py --classes dog elephant giraffe guitar horse house person
    python headpurify.py --modes full/prompt=file --class-features styles.npy

Words S_1 ... S_K are learned one after another, so that "a S_i style of a" means something new
every time (Eq. 1) and "a S_i style of a [class]" still means the class (Eq. 3). Then a linear
classifier is trained on the texts of all styles and classes, with the ArcFace loss: its rows are
the class features.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import ASSETS, InputError
from support.prompts import encode_all, encode_prompts, first_word, without_padding
from support.tiny_words import TinyTokenizer, tokenizer_of
from support.tiny_world import WordTokenizer
from support.weights import hub_or_cache, why_not

TINY_CLIP = ASSETS / "tiny_clip"


# ---------- Styles (Sec. 3.1, 3.2) ---------------------------------------------------------------
def style_loss(style, styled, content, earlier) -> torch.Tensor:
    """L_style + L_content (Eqs. 1 and 3) of unit-norm features.

    Args: style (D,), "a S* style of a"; styled (C, D), the same with every class; content (C, D),
    the classes alone; earlier (i - 1, D), the styles so far, to be orthogonal to.
    """
    diversity = (earlier @ style).abs().mean() if len(earlier) else 0
    labels = torch.arange(len(content), device=content.device)
    return diversity + F.cross_entropy(styled @ content.T, labels)


def learn_styles(model, tokenizer, names, device, steps: int) -> list[torch.Tensor]:
    """For every style: features of its texts with every class, unit-norm (C, D)."""
    # the tiny CLIP has fewer words, and "style" is none of them
    tiny = isinstance(tokenizer, WordTokenizer | TinyTokenizer)
    noun, count = ("picture", 16) if tiny else ("style", 80)
    texts = [f"a a {noun} of a."]
    texts += [f"a a {noun} of a {name}." for name in names]  # the second "a" is S*
    tokens = without_padding(model, tokenizer(texts)).to(device)  # (1 + C, l)
    place = 1 + first_word(tokenizer)  # of the second "a"
    content = encode_all(model, tokenizer([f"{name}." for name in names]).to(device), together=1)
    content = F.normalize(content, dim=-1)  # (C, D)
    embedding = getattr(model, "text", model).token_embedding.weight
    styles, styled = content[:0], []
    for number in range(count):
        word = nn.Parameter(0.02 * torch.randn_like(embedding[:1]))
        optimizer = torch.optim.SGD([word], lr=0.002, momentum=0.9)
        for _ in range(steps):
            features = encode_prompts(model, tokens, place, word)  # (1 + C, D)
            loss = style_loss(features[0], features[1:], content, styles)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        styles = torch.cat([styles, features[:1].detach()])
        styled.append(features[1:].detach())
        if not loss.isfinite():
            raise InputError(f"style {number + 1}: the loss is {loss.item()}")
        print(f"style {number + 1} of {count}: loss {loss.item():.3f}", flush=True)
    return styled


# ---------- Classifier (Sec. 3.3) ----------------------------------------------------------------
def promptstyler(
    model, tokenizer, class_names, seed: int, device="cpu", steps=100, margin=0.5, scale=5.0
) -> torch.Tensor:
    """Class features, unit-norm (C, D). Steps, margin and scale as published."""
    names = [name.replace("_", " ") for name in class_names]
    torch.manual_seed(seed)
    styled = learn_styles(model, tokenizer, names, device, steps)
    x = torch.cat(styled)  # (styles C, D)
    y = torch.arange(len(names), device=device).repeat(len(styled))
    classifier = nn.Parameter(sum(styled))  # (C, D)
    optimizer = torch.optim.SGD([classifier], lr=0.005, momentum=0.9)
    for _ in range(4 * steps):
        cosine = x @ F.normalize(classifier, dim=-1).T
        angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        logits = scale * (angle + margin * F.one_hot(y)).cos()  # ArcFace
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not classifier.isfinite().all():
        raise InputError("the classifier's weights are not finite")
    return F.normalize(classifier.detach(), dim=-1)


# ---------- Main ---------------------------------------------------------------------------------
def load_clip(name: str, pretrained: str, device):
    """(model, tokenizer), frozen. Raises: InputError if it cannot be had."""
    if name == "tiny":
        name = f"local-dir:{TINY_CLIP}"
    tag = open_clip.get_pretrained_cfg(name, pretrained) or {}
    options = {"force_quick_gelu": tag.get("quick_gelu", False), "require_pretrained": True}
    try:
        with hub_or_cache(name, pretrained):
            model = open_clip.create_model(name, None if ":" in name else pretrained, **options)
            tokenizer = tokenizer_of(name, model)
        model.to(device)
    except Exception as error:  # hub, file system and deserialiser fail in ways of their own
        raise InputError(f"cannot load {name} ({pretrained}): {why_not(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def main():
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--classes", nargs="+", required=True, help="in the data set's order")
    parser.add_argument("--model", default="tiny", help="as for headpurify.py (default: tiny)")
    parser.add_argument("--pretrained", default="openai", help="tag or file (default: openai)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("styles.npy"))
    args = parser.parse_args()
    try:
        model, tokenizer = load_clip(args.model, args.pretrained, args.device)
        features = promptstyler(model, tokenizer, args.classes, args.seed, args.device)
        np.save(args.output, features.cpu().numpy())
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.output}: class features {tuple(features.shape)} of {args.classes}")


if __name__ == "__main__":
    main()
