"""Captions by CoCa, the captioner of LDFS' paper, for all images below a folder.

    python support/caption.py data/PACS/photo --output captions.json
    python ldfs.py --dataset pacs --captioner file --caption-file captions.json

The JSON file holds {path below the data root: caption}. Needs CoCa's weights: a download of 2.5 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import InputError
from support.images import images_below, read_image


def greedy_captions(model, images, start: int, end: int, length: int = 30) -> torch.Tensor:
    """Word after word the one that CoCa finds likeliest, for images (B, 3, h, w).

    Returns: tokens (B, length): `start`, words, then `end` to the end.
    """
    latent, image_tokens = model._encode_image(images)  # once for all words
    text = torch.full((len(images), 1), start, device=images.device)
    while text.shape[1] < length - 1 and (text[:, -1] != end).any():
        found = {"image_latent": latent, "image_embs": image_tokens, "output_labels": False}
        logits = model(images, text, **found)["logits"]  # (B, t, V)
        word = logits[:, -1].argmax(1)
        word = torch.where(text[:, -1] == end, end, word)
        text = torch.cat([text, word[:, None]], 1)
    return F.pad(text, (0, length - text.shape[1]), value=end)


@torch.no_grad()
def caption_files(files, model, preprocess, tokenizer, device="cpu", batch_size=64) -> list[str]:
    """A caption for every image file."""
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    captions = []
    for first in range(0, len(files), batch_size):
        images = [preprocess(read_image(file)) for file in files[first : first + batch_size]]
        tokens = greedy_captions(model, torch.stack(images).to(device), start, end)
        for line in tokens.tolist():
            words = line[1 : line.index(end)]
            captions.append(tokenizer.decode(words).strip())
        print(f"{len(captions)} of {len(files)} images", flush=True)
    return captions


def find_images(folder: Path, root: Path) -> dict[str, Path]:
    """{path below the data root: file}. Raises: InputError where there is none."""
    files = [Path(file) for file in images_below(folder)]
    if not files:
        raise InputError(f"no image below {folder}")
    if not folder.is_relative_to(root):
        raise InputError(f"{folder} is not below --data-root {root}")
    return {file.relative_to(root).as_posix(): file for file in files}


def load_coca(name: str, pretrained: str, device):
    """(model, preprocess, tokenizer), frozen. Raises: InputError if it cannot be had."""
    try:
        model = open_clip.create_model(name, pretrained, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # hub, file system and deserialiser fail in ways of their own
        raise InputError(f"cannot load {name} ({pretrained}): {error}") from error
    if not isinstance(model, open_clip.CoCa):
        raise InputError(f"--model {name} writes no captions; CoCa does, e.g. coca_ViT-L-14")
    config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    return model.eval().requires_grad_(False), preprocess, tokenizer


def main():
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("folder", type=Path, help="e.g. data/PACS/photo")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="as for ldfs.py")
    parser.add_argument("--model", default="coca_ViT-L-14", help="default: coca_ViT-L-14")
    parser.add_argument("--pretrained", default="mscoco_finetuned_laion2b_s13b_b90k")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("captions.json"))
    args = parser.parse_args()
    try:
        files = find_images(args.folder, args.data_root)
        coca = load_coca(args.model, args.pretrained, args.device)
        captions = caption_files(list(files.values()), *coca, args.device)
        args.output.write_text(json.dumps(dict(zip(files, captions)), indent=1) + "\n")
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.output}: {len(captions)} captions")


if __name__ == "__main__":
    main()
