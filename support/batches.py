"""Batches with equally many images of every source domain, read ahead by one set of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from support import InputError, parallel
from support.profiling import profile


def as_is(batch):
    """In place of collecting images one by one: an `ImageSet` gives whole batches."""
    return batch


# ---------- Which images -------------------------------------------------------------------------
def endless_order(size: int, seed: int) -> Iterator[int]:
    """0 ... size - 1 in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty((), dtype=torch.int64)
    first.random_(generator=generator)  # a number that a DataLoader drew when results/ were made
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def seed_cpu(seed: int) -> None:
    """torch.manual_seed seeds GPUs too, which takes as long as cropping an image."""
    torch.default_generator.manual_seed(seed)


class Draws:
    """What each step draws: from every domain its next images, (image, seed of its augmentation)
    each. Of several processes each has its share of every domain's.

    It follows from the seed alone, so that it can start at any step, `first`, and end at `last`.
    """

    def __init__(self, sizes: list[int], per_domain: int, seed: int):
        self.sizes, self.per_domain, self.seed = sizes, per_domain, seed
        self.first, self.last = 0, None

    def __iter__(self) -> Iterator[list[list[tuple]]]:
        return itertools.islice(self.all_steps(), self.first, self.last)

    def all_steps(self) -> Iterator[list[list[tuple]]]:
        orders = []
        for domain, size in enumerate(self.sizes):
            orders.append(endless_order(size, self.seed * 1000 + domain))
        own = parallel.slice_of_rank(self.per_domain)
        for step in itertools.count():
            places = range(step * self.per_domain, (step + 1) * self.per_domain)
            drawn = []
            for domain, order in enumerate(orders):
                of_domain = [(next(order), hash((self.seed, domain, place))) for place in places]
                drawn.append(of_domain[own])
            yield drawn

    def of_step(self, step: int) -> list[list[tuple]]:
        """What step 1, 2, ... draws."""
        return next(itertools.islice(self.all_steps(), step - 1, None))


class Sources(Dataset):
    """All source domains as one set, whose items are batches; see `draws`."""

    def __init__(self, sets: list):
        self.sets = sets

    def __getitems__(self, drawn: list) -> tuple:
        """Images (B, 3, h, w) and labels (B,), domain after domain."""
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for own, some in zip(self.sets, drawn):
                x, y = self.augmented(own, some)
                images.append(x)
                labels.append(y)
        return torch.cat(images), torch.cat(labels)

    @staticmethod
    def augmented(own, some: list) -> tuple:
        """Each file is cropped and mirrored by a seed of its own, so that it does not matter which
        process reads it; pixels in memory are all by that of the first."""
        if isinstance(own.images, torch.Tensor):
            seed_cpu(some[0][1])
            return own.__getitems__([image for image, _ in some])
        crop = getattr(own.transform, "crop", own.transform)  # of an `Augment` only that part
        images = []
        for image, seed in some:
            seed_cpu(seed)
            x = crop(own.read(image))
            images.append(x.movedim(0, -1))  # (h, w, 3), as they lie in memory
        return torch.stack(images).movedim(-1, 1), own.labels[[image for image, _ in some]]


# ---------- Their batches ------------------------------------------------------------------------
class SourceBatches:
    """Endless batches with equally many images of every source domain.

    `next` gives images (S * b, 3, h, w), labels and domain numbers (S * b,), domain after domain; b
    is `per_domain`, or a process's share of it. The same seed gives the same images, cropped and
    mirrored alike, however many processes read them.

    Args:
        sets: {domain: `ImageSet`}; per_domain: images of each in a batch.
        workers: processes that read files; they stay from one `restart` to the next.
        device: on the way to a GPU, batches wait where copying them need not be waited for.
    """

    def __init__(self, sets: dict, per_domain: int, seed: int, workers: int = 0, device="cpu"):
        self.sets, self.device = sets, device
        transform = next(iter(sets.values())).transform
        self.numbers = getattr(transform, "numbers", None)  # of an `Augment`
        self.draws = Draws([len(images) for images in sets.values()], per_domain, seed)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        options |= {"collate_fn": as_is, "pin_memory": torch.device(device).type == "cuda"}
        self.loader = DataLoader(Sources([*sets.values()]), batch_sampler=self.draws, **options)
        own = range(per_domain)[parallel.slice_of_rank(per_domain)]
        self.domain = torch.arange(len(sets)).repeat_interleave(len(own))
        self.restart(seed)

    def restart(self, seed: int, step: int = 0, steps: int | None = None) -> None:
        """Go on with other orders, after some step of theirs; with `steps`, for no more of them."""
        self.draws.seed, self.draws.first = seed, step
        self.draws.last = None if steps is None else step + steps
        self.step = step
        self.batches = None  # nothing is read before it is asked for

    def __next__(self) -> tuple:
        if self.batches is None:
            self.batches = profile.batches(self.loader)
        images, labels = next(self.batches)
        if images.dtype == torch.uint8:
            images = self.numbers(images.to(self.device, non_blocking=True))
        self.step += 1
        return images, labels, self.domain

    def names(self, step: int | None = None) -> list[str]:
        """The images of a step, 1, 2, ..., by default the last, for a message: their domain, and
        file or number."""
        drawn = self.draws.of_step(step or self.step)
        names = []
        for (domain, images), some in zip(self.sets.items(), drawn):
            names += [f"{domain} {images.name(image)}" for image, _ in some]
        return names


def check_batch_sizes(rows: dict, sets: dict) -> None:
    """Raises: InputError for a row whose batch would hold every image of every source many times.

    A domain smaller than a batch is cycled through, as in DomainBed, so that published batch sizes
    go with few images. Above 64, as large as those are, a batch ends at the largest source.
    """
    largest = max(map(len, sets.values()))
    most = max(64, largest)
    for row in rows.values():
        if row.batch_size % parallel.world_size():
            raise InputError(
                f"--batch-size {row.batch_size} per source domain cannot be shared by "
                f"{parallel.world_size()} processes: give a multiple of {parallel.world_size()}"
            )
        if row.batch_size > most:
            raise InputError(
                f"--batch-size {row.batch_size} is per source domain, and the largest has only "
                f"{largest} training images: at most {most}"
            )
