"""What is to be seen in an image, in words: "red dog on grass". LDFS puts it into descriptions of
domains, "a photo of a {}".

The paper has a captioning model say it. Where captions come from is our choice: CLIP's nearest
phrases ("retrieval"), the class name alone ("template"), or a file ("file"; support/caption.py
writes one with CoCa).
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch

from support import ASSETS, InputError

WORDS = ASSETS / "words.json"  # descriptions of domains, phrases
WATERBIRDS = ("tiny-waterbirds", "waterbirds")  # where the place is the domain
# how a caption begins before it says what is in the image: "A black and white photo of a"
OPENING = (
    r"^((there (is|are) )?((an?|the) )?([\w-]+ ){0,3}?(photo|photograph|picture|image|painting|"
    r"sketch|drawing|cartoon|illustration|clipart) (of|with) )?((an?|the) )?"
)


@functools.cache  # the rows of a table share captions
def encode_texts(encode, texts: tuple[str, ...]) -> torch.Tensor:
    return encode(texts)


def text_features(clip, description: str, captions: list[str]) -> torch.Tensor:
    """Unit-norm (n, D) of captions put into a description; every different text is encoded once."""
    texts = [description.replace("{}", caption) for caption in captions]
    unique = tuple(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    features = encode_texts(clip.encode_text, unique)
    return features[[place[text] for text in texts]]


def subjects(row, clip, own, description: str) -> list[str]:
    """What is in each image of a described domain. own: `Features` of ldfs.py."""
    classes = [name.replace("_", " ") for name in own.images.classes]
    names = [classes[label] for label in own.labels]
    if row.captioner == "template":
        return names
    if row.captioner == "retrieval":
        captions = retrieve_captions(row, clip, own, classes, description)
    else:
        captions = read_captions(row, own.images)
    found = []
    for name, caption in zip(names, captions):
        subject = re.sub(OPENING, "", caption.strip(" .\n") + " ", flags=re.IGNORECASE)
        found.append(subject.strip() or name)
    return found


def retrieve_captions(row, clip, own, classes: list[str], description: str) -> list[str]:
    """The name of the class with, of every group of phrases, the one nearest to the image."""
    captions = [classes[label] for label in own.labels]
    words = json.loads(WORDS.read_text())
    groups = words["phrases of the tiny CLIP" if row.model == "tiny" else "phrases"]
    for group, phrases in groups.items():
        if group == "place" and row.dataset in WATERBIRDS:
            continue
        texts = [phrase.format(name) for name in classes for phrase in phrases]
        features = text_features(clip, description, texts)
        features = features.view(len(classes), len(phrases), -1)  # (C, P, D)
        for label in own.labels.unique():
            places = (own.labels == label).nonzero()[:, 0]  # of the images of a class
            similarities = own.features[places] @ features[label].T  # (n, P)
            nearest = similarities.argmax(1)
            for place, phrase in zip(places.tolist(), nearest.tolist()):
                captions[place] = phrases[phrase].format(captions[place])
    return captions


def read_captions(row, images) -> list[str]:
    """The captions of --caption-file, in the order of the images."""
    kind, _, folder = row.dataset.rpartition(":")
    root = folder if kind == "folder" else row.data_root
    captions = []
    try:
        known = json.loads(row.caption_file.read_text())
        for image in images.images:
            path = Path(image).relative_to(root)
            captions.append(known[path.as_posix()])
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"--caption-file {row.caption_file}: no JSON {{path below {root}: caption}}"
        raise InputError(f"{what} of all images ({error!r})") from None
    return captions
