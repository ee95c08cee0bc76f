"""Random crops and flips of training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as pixels


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
