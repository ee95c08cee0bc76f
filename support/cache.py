"""Training images kept small and decoded: JPEGs are read once, and not in every epoch.

A cache is two files in DATA_ROOT/.cache: `<domain>-<key>.pixels`, one image after another, (h, w,
3) uint8 each, which processes map into their memory and so share; and `<domain>-<key>.npy`, where
in it they are. The key is made of the images' names, sizes and times of change, so that other
images have another cache. The second file is written last: where it is, the cache is whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels
from tqdm.auto import tqdm

from support import InputError, slug
from support.files import replacing
from support.images import read_image
from support.locks import locked
from support.stop import stop_if_asked


@functools.cache
def mapped(file: Path) -> np.ndarray:
    """A file's bytes, read when they are asked for."""
    return np.memmap(file, mode="c")  # nothing is written: torch warns of what cannot be


@dataclass
class Cache:
    """Images of a cache, by number: (3, h, w) uint8."""

    file: Path
    places: np.ndarray  # (N, 3) int64: where an image starts, its height and width

    def __getitem__(self, index: int) -> torch.Tensor:
        start, height, width = self.places[index]
        image = mapped(self.file)[start : start + 3 * height * width]
        return torch.from_numpy(image.reshape(height, width, 3)).permute(2, 0, 1)

    def subset(self, indices) -> Cache:
        return replace(self, places=self.places[indices])


def open_cache(files: list[str], folder: Path, domain: str, side: int) -> Cache:
    """The cache of some images, which is made if it is not there: their shorter side becomes `side`
    where it is longer, resized as for a test.

    Raises: InputError if an image cannot be read, or the cache not be written.
    """
    name, state = keys(files, folder, side)
    start = f"{slug(domain)}-{name}"
    places = folder / f"{start}-{state}.npy"
    cache = places.with_suffix(".pixels")
    if not places.exists():
        make_room(files, folder, domain, side)
        with locked(folder / f".{start}.lock", "wait"):
            if not places.exists():  # another process made it while this one waited
                for old in folder.glob(f"*{start}-*"):  # of images that changed since
                    old.unlink()
                table = write_pixels(files, cache, domain, side)
                with replacing(places) as partial, partial.open("wb") as file:
                    np.save(file, table)
    return Cache(cache, np.load(places))


def keys(files: list[str], folder: Path, side: int) -> tuple[str, str]:
    """What stands for the images' names, and for their sizes and times of change."""
    names, states = [str(side)], []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            read_image(file)  # which says what is wrong
            raise
        names.append(os.path.relpath(file, folder))
        states.append(f"{found.st_size} {found.st_mtime_ns}")
    return short_hash(names), short_hash(states)


def short_hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def small(file: str, side: int) -> np.ndarray:
    """An image as it is kept: (h, w, 3) uint8."""
    image = read_image(file)
    if min(image.size) > side:
        image = pixels.resize(image, [side], v2.InterpolationMode.BICUBIC)
    return np.asarray(image)


def make_room(files: list[str], folder: Path, domain: str, side: int) -> None:
    """Say how large a cache becomes, judged by a hundred images. Raises: InputError if the disk has
    no room for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"--cache: cannot write {folder}: {error.strerror or error}") from None
    some = files[:: 1 + len(files) // 100]
    needed = sum(small(file, side).size for file in some) / len(some) * len(files)
    sizes = f"{domain}: {len(files):,} images, about {needed / 1e9:.2g} GB in {folder}"
    if needed > free:
        advice = "make room, link that folder to a larger disk, or leave --cache out"
        raise InputError(f"--cache: {sizes}, where {free / 1e9:.2g} GB are free; {advice}")
    print(f"--cache: {sizes}", flush=True)


def write_pixels(files: list[str], path: Path, domain: str, side: int) -> np.ndarray:
    """Returns: `Cache.places`. Many images at a time are read, as threads."""
    Image.init()  # threads that load Pillow's readers at once may miss one
    shapes = []
    with replacing(path) as partial, partial.open("wb") as file, ThreadPool() as pool:
        for first in tqdm(range(0, len(files), 256), f"cache of {domain}", disable=None):
            some = files[first : first + 256]
            for image in pool.map(lambda name: small(name, side), some):
                file.write(image)
                shapes.append(image.shape[:2])
            stop_if_asked()
    shapes = np.array(shapes)  # (N, 2)
    ends = 3 * shapes.prod(1).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    return np.column_stack([starts, shapes])
