"""Image files: which ones a folder holds, and their pixels as a browser shows them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as pixels

from support import InputError

# Pillow warns from 89 million pixels on, which are no harm, and refuses twice as many
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---------- Which files --------------------------------------------------------------------------
def is_hidden(name: str) -> bool:
    """What a file system keeps beside pictures: `.DS_Store`, `._1.jpg`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not is_hidden(name)


def images_below(folder) -> list[str]:
    """Images in a folder and the folders in it, in the order of torchvision's ImageFolder.

    Links are followed. A folder that is met again, on a loop of links, is not counted again.
    """
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [(parent, name) for name in files if is_image(name)]
    return [os.path.join(*pair) for pair in sorted(found)]


def folders_in(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder. Raises: InputError for a link that leads nowhere."""
    names = []
    for name in sorted(os.listdir(folder)):
        entry = folder / name
        if is_hidden(name):
            continue
        if not entry.exists():
            target = os.readlink(entry)
            raise InputError(f"{entry} is a link to {target}, where nothing is; mend or remove it")
        if entry.is_dir():
            names.append(name)
    return names


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """{class: its images} of <folder>/<class>/<image>, sorted."""
    return {name: images_below(folder / name) for name in folders_in(folder)}


# ---------- Their pixels -------------------------------------------------------------------------
def read_image(path) -> Image.Image:
    """A picture as a browser shows it, in RGB: upright, 8 bits a channel, on white.

    Raises: InputError if it cannot be read.
    """
    try:
        return decode(path)
    except Exception as error:  # decoders fail in ways of their own
        advice = "mend it, remove it, or give --skip-broken"
        raise InputError(f"cannot read image {reason(path, error)}; {advice}") from None


def decode(path) -> Image.Image:
    with Image.open(str(path)) as image:
        turn_upright(image)
        return in_rgb(image)


def reason(path, error: Exception) -> str:
    """The file that could not be read, and why: `dog/1.jpg (image file is truncated)`."""
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if os.path.islink(path):
        why += f"; it is a link to {os.readlink(path)}"
    return f"{path} ({why})"


def turn_upright(image: Image.Image) -> None:
    """Turn it, in place, as the camera noted in its EXIF data. Broken EXIF data say nothing."""
    image.load()  # a broken picture is an error
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # EXIF readers fail in ways of their own
        pass


def in_rgb(image: Image.Image) -> Image.Image:
    """With 8 bits a channel, and white where it is transparent."""
    if image.mode[0] in "IF":
        image = grey_in_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def grey_in_8_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits the higher 8, as Pillow does with colours of 16 bits.

    Raises: ValueError for numbers of 32 bits (in TIFF), of which nothing says which is white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"numbers of mode {image.mode}, any range: save it with 8 or 16 bits")
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if transparent is not None:
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray((values // 256).astype(np.uint8))


# ---------- Their pixels, cropped and mirrored at random ----------------------------------------
@dataclass
class Augment:
    """CLIPood's augmentation (Sec. 4.1): RandomResizedCrop (scale 0.7 ... 1) and a horizontal flip.

    It has two parts. `crop` is for the processes that read, image by image: it gives 8 bits, a
    quarter of what float32 would take on the way to a GPU. `numbers` is for whole batches, there.
    """

    size: tuple[int, int]
    interpolation: v2.InterpolationMode
    numbers: Callable  # (..., 3, h, w) uint8 -> float32
    mirror: Callable = v2.RandomHorizontalFlip()

    @property
    def cached_side(self) -> int:
        """The shorter side of images in a cache: 256 for the usual 224."""
        return max(256, max(self.size) * 8 // 7)

    def __call__(self, image) -> torch.Tensor:
        return self.numbers(self.crop(image))

    def crop(self, image) -> torch.Tensor:
        """Of a PIL image or (..., 3, H, W) uint8: (..., 3, h, w) uint8."""
        if isinstance(image, Image.Image):
            image = pixels.pil_to_tensor(image)
        box = RandomResizedCrop.get_params(image, (0.7, 1.0), (3 / 4, 4 / 3))
        part = pixels.crop(image, *box)
        # torch resizes twice as fast where the colours of a pixel lie together
        part = part.movedim(-3, -1).contiguous().movedim(-1, -3)
        return self.mirror(pixels.resize(part, self.size, self.interpolation))


# ---------- Those that cannot be read ------------------------------------------------------------
KNOWN: dict[str, str] = {}  # a file that was tried, and why it cannot be read, or ""


def what_is_wrong(file: str) -> str:
    """Why an image cannot be read, or ""."""
    try:
        decode(file)
    except Exception as error:  # decoders fail in ways of their own
        return reason(file, error)
    return ""


def reasons(files: list[str]):
    """`what_is_wrong` with each of them, in their order, many at a time."""
    Image.init()  # threads that load Pillow's readers at once may miss one
    with ThreadPool() as pool:
        yield from pool.imap(what_is_wrong, files, chunksize=16)


def files_of(parts: dict[str, list]) -> list[str]:
    """All images of {part: [(file, label, ...), ...]}, each once."""
    files = {}
    for items in parts.values():
        files |= dict.fromkeys(str(file) for file, *_ in items)
    return list(files)


def try_all(files: list[str]) -> None:
    """Read every file that is not `KNOWN`, once, and say which cannot be read."""
    new = [file for file in files if file not in KNOWN]
    if not new:
        return
    print(f"--skip-broken: reading {len(new)} images, once, to see which can be read", flush=True)
    KNOWN.update(zip(new, reasons(new)))
    print(left_out() or "--skip-broken: all can be read", flush=True)


def left_out() -> str:
    """How many images this command leaves out, and the first of them; "" for none."""
    broken = [wrong for wrong in KNOWN.values() if wrong]
    if not broken:
        return ""
    first = ", ".join(broken[:3]) + ", ..." * (len(broken) > 3)
    return f"--skip-broken: {len(broken)} of {len(KNOWN)} images are left out: {first}"


def leave_out_broken(classes, parts: dict[str, list]) -> dict[str, list]:
    """The items of {part: [(file, label, ...), ...]} whose file can be read.

    Raises: InputError if a part loses all images of a class.
    """
    try_all(files_of(parts))
    kept = {}
    for part, items in parts.items():
        kept[part] = [item for item in items if not KNOWN[str(item[0])]]
        labels = {item[1] for item in kept[part]}
        for file, label, *_ in items:
            if label not in labels:
                raise InputError(
                    f"--skip-broken: no image of class {classes[label]!r} in {part} can be read, "
                    f"such as {KNOWN[str(file)]}; add one that can"
                )
    return kept
