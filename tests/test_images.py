"""Random crops of training images, compared with torchvision's on PIL images."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

import common

COLORS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_training_images_are_cropped_as_pillow_would():
    """8-bit tensors take a third of Pillow's time. The difference is a rounding."""
    tiny = common.load_clip()
    picture = Image.fromarray(COLORS).resize((500, 400), Image.Resampling.BICUBIC)
    for seed in range(8):
        torch.manual_seed(seed)
        found = tiny.augment.crop(picture)
        assert found.dtype == torch.uint8 and found.shape == (3, 32, 32)
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(32, (0.7, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        expected = np.asarray(v2.RandomHorizontalFlip()(expected(picture)))
        difference = found.permute(1, 2, 0).numpy().astype(int) - expected
        assert abs(difference).max() <= 2
        torch.manual_seed(seed)
        assert torch.allclose(tiny.augment(picture), (found / 255 - 0.5) / 0.25, atol=1e-6)
