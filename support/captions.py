"""Captions for LDFS: what an image shows, in words such as "red dog on grass".

LDFS puts captions into descriptions of domains such as "a photo of a {}". The paper
uses a captioning model and does not say which, as far as we know. Here captions come from CLIP's
nearest phrases, from CoCa, or from a file. `clip` is a `Clip` of common.py.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from support import ASSETS, InputError, slug, why_not_loaded
from support.benchmarks import read_image
from support.runs import ONE_PLACE, has_one_place

WORDS = ASSETS / "words.json"  # descriptions of domains, and phrases for `retrieve_captions`
WATERBIRDS = ("tiny-waterbirds", "waterbirds")  # data sets whose domain is the place
# how a caption begins before it says what the image shows: "A black and white photo of a"
OPENING = (
    r"^((there (is|are) )?((an?|the) )?([\w-]+ ){0,3}?(photo|photograph|picture|image|painting|"
    r"sketch|drawing|cartoon|illustration|clipart) (of|with) )?((an?|the) )?"
)


# ---------- Descriptions of domains --------------------------------------------------------------
def read_descriptions(dataset: str, pairs: list[str]) -> dict[str, str]:
    """{slug of a domain: its words, "a sketch of a {}"}, from assets/words.json and from pairs
    "NAME=TEXT" of --descriptions. Raises: InputError for a text without a place for the subject."""
    words = json.loads(WORDS.read_text())
    descriptions = {**words["descriptions"], **words.get(f"descriptions of {dataset}", {})}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not has_one_place(text):
            raise InputError(f"--descriptions: {name}={text!r} needs {ONE_PLACE}")
        descriptions[slug(name)] = text
    return descriptions


def words_for(domain: str, descriptions: dict[str, str]) -> str:
    """The description of a domain. Raises: InputError if there is none."""
    if slug(domain) not in descriptions:
        hint = f'add --descriptions "{domain}=a ... of a {{}}"'
        raise InputError(f"no words describe domain {domain!r}; {hint}")
    return descriptions[slug(domain)]


# ---------- Captions in descriptions -------------------------------------------------------------
def subjects(row, clip, real, description: str, cache: dict) -> list[str]:
    """What each image of a described domain shows, in words: "red dog on grass".

    Args:
        row: has captioner, caption_file, model, dataset and data_root.
        real: has images (an `ImageSet`), features (N, D) and labels (N,).
        cache: CoCa's captions, which all rows of a table share.
    """
    classes = [name.replace("_", " ") for name in real.images.classes]
    names = [classes[label] for label in real.labels]
    files = real.images.images
    if row.captioner == "template":
        return names
    if row.captioner == "retrieval":
        groups = phrase_groups(row.model == "tiny", row.dataset)
        captions = retrieve_captions(clip, real.features, real.labels, classes, description, groups)
    elif isinstance(files, torch.Tensor):
        raise InputError(f"--captioner {row.captioner} reads image files, and tiny data are drawn")
    elif row.captioner == "file":
        kind, _, folder = row.dataset.partition(":")
        root = Path(folder).expanduser() if kind == "folder" else row.data_root
        captions = read_captions(row.caption_file, files, root)
    else:
        key = "CoCa", files.tobytes()
        if key not in cache:
            cache[key] = coca_captions(files.tolist(), clip.device)
        captions = cache[key]
    return [subject(caption, name) for caption, name in zip(captions, names)]


def phrase_groups(tiny: bool, dataset: str) -> dict[str, list[str]]:
    """Groups of phrases in which CLIP finds the nearest; in Waterbirds the place is the domain."""
    words = json.loads(WORDS.read_text())
    groups = words["phrases of the tiny CLIP" if tiny else "phrases"]
    if dataset in WATERBIRDS:
        del groups["place"]
    return groups


def subject(caption: str, class_name: str) -> str:
    """A caption without its opening words, "a photo of a"; the class name if nothing remains."""
    text = caption.strip(" .\n") + " "
    remaining = re.sub(OPENING, "", text, flags=re.IGNORECASE).strip()
    return remaining or class_name.replace("_", " ")


def text_features(clip, description: str, captions: list[str]) -> torch.Tensor:
    """Unit-norm features (N, D) of N captions, each in place of `{}` in the description."""
    texts = [description.replace("{}", caption) for caption in captions]
    unique = list(dict.fromkeys(texts))
    index = {text: i for i, text in enumerate(unique)}
    features = clip.encode_text(unique)
    return features[[index[text] for text in texts]]


# ---------- CLIP's nearest phrases ---------------------------------------------------------------
def retrieve_captions(
    clip, features, labels, class_names, description: str, phrase_groups: dict[str, list[str]]
) -> list[str]:
    """The class name with, of each group of phrases, the phrase that is nearest to the image.

    Args:
        features: of N images, unit-norm (N, D).
        labels: (N,), indices into `class_names`.
        description: of the images' domain, such as "a photo of a {}".
        phrase_groups: such as {"color": ["red {}", "blue {}"], "place": ["{} on grass"]}.
    Returns: N captions.
    """
    names = [name.replace("_", " ") for name in class_names]
    captions = [names[label] for label in labels.tolist()]
    for phrases in phrase_groups.values():
        texts = [phrase.format(name) for name in names for phrase in phrases]
        phrase_features = text_features(clip, description, texts)  # (C P, D)
        phrase_features = phrase_features.view(len(names), len(phrases), -1)  # (C, P, D)
        for label in labels.unique():
            indices = (labels == label).nonzero()[:, 0]  # of this class's n images
            similarities = features[indices] @ phrase_features[label].T  # (n, P)
            nearest = similarities.argmax(1)
            for i, phrase in zip(indices.tolist(), nearest.tolist()):
                captions[i] = phrases[phrase].format(captions[i])
    return captions


# ---------- Captions from a file -----------------------------------------------------------------
def read_captions(file, images, root) -> list[str]:
    """Captions of images (paths) from a JSON file, {path below root: caption}.

    Raises: InputError if the file cannot be read or does not hold all images.
    """
    try:
        by_path = json.loads(Path(file).read_text())
        return [by_path[Path(image).relative_to(root).as_posix()].strip() for image in images]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        needed = f"no JSON {{path below {root}: caption}} of all images"
        raise InputError(f"--caption-file {file}: {needed} ({error!r})") from None


# ---------- CoCa ---------------------------------------------------------------------------------
def greedy_captions(model, images, start: int, end: int, length: int = 30) -> torch.Tensor:
    """Captions of images (B, 3, h, w), by CoCa's likeliest next word after each word.

    Returns: tokens (B, length): `start`, words, then `end` up to the length.
    """
    latent, image_tokens = model._encode_image(images)  # once, not for every word
    encoded = {"image_latent": latent, "image_embs": image_tokens, "output_labels": False}
    text = torch.full((len(images), 1), start, device=images.device)
    while text.shape[1] < length - 1 and (text[:, -1] != end).any():
        logits = model(images, text, **encoded)["logits"]  # (B, t, V)
        word = logits[:, -1].argmax(1)
        word = torch.where(text[:, -1] == end, end, word)
        text = torch.cat([text, word[:, None]], 1)  # (B, t + 1)
    return F.pad(text, (0, length - text.shape[1]), value=end)


@torch.no_grad()
def coca_captions(
    files, device, name="coca_ViT-L-14", pretrained="mscoco_finetuned_laion2b_s13b_b90k"
) -> list[str]:
    """Captions of image files by CoCa, whose weights are a download of 2.5 GB.

    Args: name, pretrained: a CoCa model of open_clip, and its tag or checkpoint file.
    Raises: InputError if the weights cannot be loaded or an image cannot be read.
    """
    logging.disable(logging.ERROR)  # a failing download is logged thirty times
    try:
        create = open_clip.create_model_and_transforms
        model, _, preprocess = create(name, pretrained, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # downloads, files and formats fail in ways of their own
        hint = "Offline? Use --captioner retrieval, or file with captions made elsewhere."
        raise InputError(
            f"cannot load {name} ({pretrained}): {why_not_loaded(error)}\n  {hint}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    model.eval()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    captions = []
    for first in tqdm(range(0, len(files), 64), "captions", disable=None):
        images = [preprocess(read_image(file)) for file in files[first : first + 64]]
        tokens = greedy_captions(model, torch.stack(images).to(device), start, end)
        for line in tokens.tolist():
            words = line[1 : line.index(end)]
            captions.append(tokenizer.decode(words).strip())
    return captions
