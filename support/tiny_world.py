"""The tiny world: 32 x 32 images of 16 (+ 2) things, painted in four styles on eight backgrounds.

A *drawing* is a list of polygons in unit coordinates: x points to the right, y points down, and the
thing fills -1 ... 1. A *domain* is a way to paint it. An image also has a colour, a background and
a pose. The tiny data sets are at the end of this file; `common.py` turns them into image sets.

The shipped CLIP was pretrained on these images, so the random streams must not change: a call to
`rng` that is added, removed or moved changes every image after it.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from support import InputError

SIDE = 32  # pixels
OVERSAMPLING = 3  # polygons are drawn on a canvas of 96 pixels and averaged down
TINY_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
OFFICE_CLASSES = (
    "bird",
    "boat",
    "car",
    "cup",
    "dog",
    "elephant",
    "fish",
    "flower",
    "giraffe",
    "guitar",
    "horse",
    "house",
    "person",
    "star",
    "tree",
    "truck",
)
WATERBIRD_CLASSES = ("landbird", "waterbird")
COLORS = {
    "red": (205, 45, 45),
    "orange": (235, 135, 35),
    "yellow": (235, 215, 60),
    "green": (60, 165, 75),
    "blue": (60, 95, 215),
    "purple": (140, 65, 175),
    "pink": (240, 145, 185),
    "brown": (125, 80, 45),
}
BACKGROUNDS = {
    "grass": (85, 150, 60),
    "sky": (135, 190, 235),
    "sand": (225, 200, 145),
    "night": (28, 28, 62),
    "water": (35, 100, 180),
    "road": (115, 115, 120),
    "snow": (236, 238, 244),
    "brick": (170, 82, 66),
}


def oval(x, y, rx, ry):
    """Ellipse around (x, y) as a polygon, (18, 2)."""
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def bar(x0, y0, x1, y1, width, end_width=None):
    """Thick line from (x0, y0) to (x1, y1), which may taper, as a polygon, (4, 2)."""
    end_width = width if end_width is None else end_width
    start = np.array([x0, y0])
    end = np.array([x1, y1])
    across = np.array([y0 - y1, x1 - x0]) / (2 * np.hypot(x1 - x0, y1 - y0))
    start_half = across * width
    end_half = across * end_width
    return np.stack([start + start_half, end + end_half, end - end_half, start - start_half])


def polygon(*points):
    return np.array(points, float)


def legs(xs, top, bottom, width):
    return [bar(x, top, x, bottom, width) for x in xs]


def petals(turn):
    """Six ovals around the head of a flower, rotated by `turn` radians."""
    angles = np.arange(6) * np.pi / 3 + turn
    return [oval(0.36 * np.sin(a), -0.4 + 0.36 * np.cos(a), 0.23, 0.23) for a in angles]


def five_points(inner):
    """A star whose inner corners lie at this radius, as a polygon, (10, 2)."""
    angle = np.arange(10) * np.pi / 5
    radius = np.resize((0.95, inner), 10)  # outer and inner corners alternate
    return np.stack([radius * np.sin(angle), radius * -np.cos(angle)], 1)


# A drawing varies its proportions with u(low, high), a uniform random number. The first polygon is
# furthest back.
DRAWINGS = {
    "dog": lambda u: [
        bar(-0.55, 0, -0.9, -u(0.25, 0.55), 0.12),
        *legs((-0.45, -0.25, 0.25, 0.45), 0.1, u(0.6, 0.75), 0.14),
        oval(0, 0.05, 0.58, u(0.22, 0.28)),
        oval(0.6, -0.3, 0.26, 0.24),
        oval(0.85, -0.22, 0.18, 0.11),
        oval(0.48, -0.28, 0.1, u(0.2, 0.28)),
    ],
    "elephant": lambda u: [
        *legs((-0.55, -0.3, 0.12, 0.36), 0.2, u(0.75, 0.85), 0.24),
        oval(-0.1, -0.05, u(0.6, 0.68), 0.46),
        bar(0.75, -0.2, 0.92, u(0.5, 0.75), 0.22, 0.12),
        oval(0.58, -0.22, 0.3, 0.32),
        oval(0.36, -0.24, u(0.2, 0.28), 0.36),
    ],
    "giraffe": lambda u: [
        *legs((-0.5, -0.32, 0.05, 0.22), 0.2, 1.0, 0.1),
        oval(-0.14, 0.15, 0.48, 0.22),
        bar(0.2, 0.15, u(0.42, 0.6), -0.82, 0.26, 0.14),
        oval(u(0.56, 0.66), -0.85, 0.24, 0.12),
        bar(0.46, -0.9, 0.42, -1.05, 0.06),
    ],
    "guitar": lambda u: [
        bar(0, 0, 0, -0.85, u(0.12, 0.17)),
        polygon((-0.13, -1), (0.13, -1), (0.1, -0.76), (-0.1, -0.76)),
        oval(0, 0.05, u(0.3, 0.36), 0.3),
        oval(0, 0.52, u(0.42, 0.5), 0.42),
        oval(0, 0.3, 0.12, 0.12),
    ],
    "horse": lambda u: [
        bar(-0.6, -0.1, -0.85, u(0.4, 0.6), 0.14, 0.22),
        *legs((-0.5, -0.3, 0.25, 0.42), 0.1, 0.92, 0.12),
        oval(-0.05, 0.03, 0.6, u(0.25, 0.31)),
        bar(0.35, 0, 0.62, -0.65, 0.4, 0.26),
        bar(0.52, -0.68, u(0.9, 1.0), -0.4, 0.26, 0.17),
        polygon((0.5, -0.75), (0.6, -1), (0.68, -0.72)),
    ],
    "house": lambda u: [
        polygon((-0.62, -0.1), (0.62, -0.1), (0.62, 0.8), (-0.62, 0.8)),
        bar(0.4, -0.95, 0.4, -0.3, 0.18),
        polygon((-u(0.78, 0.9), -0.1), (0, -u(0.8, 1.0)), (0.85, -0.1)),
        bar(-0.2, 0.25, -0.2, 0.8, u(0.24, 0.32)),
        polygon((0.15, 0.15), (0.42, 0.15), (0.42, 0.42), (0.15, 0.42)),
    ],
    "person": lambda u: [
        bar(-0.14, 0.25, -u(0.15, 0.32), 1, 0.2),
        bar(0.14, 0.25, u(0.15, 0.32), 1, 0.2),
        bar(-0.25, -0.35, -u(0.55, 0.72), u(-0.4, 0.2), 0.15),
        bar(0.25, -0.35, u(0.55, 0.72), u(-0.4, 0.2), 0.15),
        polygon((-0.3, -0.48), (0.3, -0.48), (0.24, 0.35), (-0.24, 0.35)),
        oval(0, -0.74, 0.22, 0.25),
    ],
    "bird": lambda u: [
        bar(0, 0.3, 0, 0.75, 0.06),
        bar(0.16, 0.3, 0.16, 0.75, 0.06),
        polygon((-0.45, 0), (-1, -0.2), (-0.95, 0.2)),
        oval(0, 0.08, 0.56, u(0.27, 0.34)),
        polygon((0.76, -0.4), (1.05, -0.27), (0.74, -0.2)),
        oval(0.58, -0.3, 0.24, 0.22),
        polygon((0.15, -0.05), (-0.55, -u(0.05, 0.75)), (-0.2, 0.2)),
    ],
    "boat": lambda u: [
        bar(0, -1, 0, 0.4, 0.07),
        polygon((0.07, -0.9), (u(0.6, 0.78), 0.2), (0.07, 0.2)),
        polygon((-0.07, -0.75), (-u(0.4, 0.55), 0.2), (-0.07, 0.2)),
        polygon((-0.9, 0.35), (0.9, 0.35), (u(0.5, 0.65), 0.8), (-0.6, 0.8)),
    ],
    "car": lambda u: [
        polygon((-0.5, -0.05), (-0.3, -u(0.4, 0.5)), (0.3, -0.45), (0.55, -0.05)),
        polygon((-0.95, -0.08), (0.95, -0.02), (0.95, u(0.3, 0.38)), (-0.95, 0.34)),
        oval(-0.52, 0.38, 0.22, 0.22),
        oval(0.52, 0.38, 0.22, 0.22),
    ],
    "cup": lambda u: [
        oval(0.55, 0, u(0.3, 0.38), 0.34),
        polygon((-0.6, -0.65), (0.52, -0.65), (u(0.3, 0.46), 0.7), (-0.48, 0.7)),
        oval(-0.04, -0.65, 0.56, 0.14),
    ],
    "fish": lambda u: [
        polygon((-0.4, 0), (-0.95, -u(0.3, 0.48)), (-0.8, 0), (-0.95, 0.4)),
        polygon((-0.1, -0.2), (0.25, -0.62), (0.3, -0.2)),
        oval(0.15, 0, 0.65, u(0.3, 0.42)),
        oval(0.55, -0.08, 0.08, 0.08),
    ],
    "flower": lambda u: [
        bar(0, 0, 0, 1, 0.09),
        oval(0.26, u(0.55, 0.7), 0.24, 0.1),
        *petals(turn=u(0, 1)),
        oval(0, -0.4, 0.2, 0.2),
    ],
    "star": lambda u: [five_points(inner=u(0.36, 0.46))],
    "tree": lambda u: [
        bar(0, 0.1, 0, 1, u(0.16, 0.26)),
        oval(-0.36, -0.15, 0.36, 0.32),
        oval(0.36, -0.15, 0.36, 0.32),
        oval(0, -0.5, u(0.42, 0.52), 0.44),
    ],
    "truck": lambda u: [
        polygon((0.35, -0.3), (0.75, -u(0.2, 0.3)), (0.98, 0.1), (0.98, 0.42), (0.35, 0.42)),
        polygon((-0.98, -u(0.5, 0.68)), (0.32, -0.6), (0.32, 0.42), (-0.98, 0.42)),
        oval(-0.6, 0.46, 0.2, 0.2),
        oval(0, 0.46, 0.2, 0.2),
        oval(0.68, 0.46, 0.2, 0.2),
    ],
    "digit 0": lambda u: [oval(0, 0, u(0.4, 0.6), u(0.75, 0.9))],
    "digit 1": lambda u: [bar(u(-0.2, 0.2), -0.85, u(-0.2, 0.2), 0.85, 0.05)],
    "landbird": lambda u: [
        bar(-0.1, 0.4, -0.12, 0.95, 0.07),
        bar(0.12, 0.4, 0.12, 0.95, 0.07),
        bar(-0.25, 0.2, -0.75, u(0.6, 0.8), 0.2),
        oval(0, 0.1, u(0.36, 0.42), 0.48),
        polygon((0.38, -0.62), (0.7, -0.5), (0.38, -0.4)),
        oval(0.2, -0.52, 0.28, 0.28),
    ],
    "waterbird": lambda u: [
        polygon((-0.55, 0.3), (-1, 0), (-0.5, 0.55)),
        bar(0.4, 0.4, u(0.45, 0.6), -0.5, 0.2, 0.15),
        oval(-0.05, 0.45, 0.66, u(0.27, 0.33)),
        bar(0.62, -0.52, 1.05, -0.46, 0.16, 0.1),
        oval(0.55, -0.55, 0.21, 0.19),
    ],
}


@dataclass(frozen=True)
class Pose:
    """Size, rotation and position of a thing in its image. Each image draws its own values."""

    size: tuple[float, float]  # smallest and largest, 1 fills the image
    turn: float  # at most so many degrees in either direction
    shift: float  # at most, in either direction; 1 is half the image


# CLIP is pretrained on large things near the centre. In every downstream set they are smaller and
# further off centre. All domains share this shift, so what a model learns on the source domains can
# help on the target; without it, fine-tuning would have nothing to learn that transfers. The shift
# and the default cue were chosen once, on seed 1000.
PRETRAINING_POSE = Pose(size=(0.60, 0.95), turn=20, shift=0.15)
TASK_POSE = Pose(size=(0.45, 0.65), turn=20, shift=0.30)


def trace(names, pose, line_width, rng):
    """Draw things as three maps: tone, area and outline, each (N, 32, 32) in [0, 1]."""
    maps = np.empty((len(names), SIDE, SIDE, 3), np.float32)
    for i, name in enumerate(names):
        rotation, shift = _random_pose(pose, rng)
        width = line_width * OVERSAMPLING * rng.uniform(0.8, 1.25)
        maps[i] = _trace_one(name, rotation, shift, max(1, round(width)), rng)
    tone, area, outline = np.moveaxis(maps / 255, -1, 0)
    return tone / np.maximum(area, 1e-3), area, outline


def _random_pose(pose, rng):
    """A matrix (2, 2) that rotates and scales a drawing, and a shift (2,)."""
    size = rng.uniform(*pose.size)
    turn = np.radians(rng.uniform(-pose.turn, pose.turn))
    sin, cos = np.sin(turn), np.cos(turn)
    rotation = size * np.array([[cos, sin], [-sin, cos]])
    rotation[0] *= rng.choice((-1, 1))  # facing left or right
    rotation *= rng.uniform(0.88, 1.12, (1, 2))  # wider or taller
    shift = rng.uniform(-pose.shift, pose.shift, 2)
    return rotation, shift


def _trace_one(name, rotation, shift, width, rng):
    """An image of 32 x 32 pixels: tone is red, area is green, outline is blue."""
    side = SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(canvas)
    for part in DRAWINGS[name](rng.uniform):
        points = part @ rotation + shift  # (P, 2) in [-1, 1]
        points = ((points + 1) * (side / 2)).ravel().tolist()
        tone = int(rng.integers(170, 256))
        pen.polygon(points, fill=(tone, 255, 0))
        closed = points + points[:4]  # repeat two corners: no gap where the line closes
        pen.line(closed, fill=(tone, 255, 255), width=width)
    return canvas.reduce(OVERSAMPLING)


def smooth_noise(rng, n, rows, columns=None):
    """Random fields, (n, 32, 32) in [0, 1]: a grid of uniform numbers, bilinearly enlarged.

    The fewer rows and columns the grid has, the smoother the field.
    """
    columns = columns or rows
    grid = rng.random((n, rows, columns), dtype=np.float32)
    return _enlarge(rows) @ grid @ _enlarge(columns).T


def _enlarge(cells):
    """Weights of bilinear interpolation, (32, cells)."""
    position = np.linspace(0, cells - 1, SIDE)[:, None]
    distance = np.abs(position - np.arange(cells))
    return np.maximum(0, 1 - distance).astype(np.float32)


def _wave(rng, n, frequency, wobble):
    phase = 2 * np.pi * rng.random((n, 1, 1)) + wobble * smooth_noise(rng, n, 5)
    return 0.5 + 0.5 * np.sin(frequency * np.arange(SIDE)[None, :, None] + phase)


def _shifted_grid(rng, n):
    shift = rng.integers(0, 16, (2, n, 1, 1))
    return np.mgrid[:SIDE, :SIDE][:, None] + shift  # y and x, (2, n, 32, 32)


def _brick(rng, n):
    y, x = _shifted_grid(rng, n)
    course = y // 6  # every second course is shifted by half a brick
    mortar = (y % 6 == 0) | ((x + 5 * (course % 2)) % 10 == 0)
    return 1.0 - mortar


def _road(rng, n):
    y, x = _shifted_grid(rng, n)
    return 0.35 + 0.65 * ((x % 16 < 2) & (y % 8 < 5))


# The texture of each background, (n, 32, 32) in [0, 1]. Painted domains colour it; sketches turn it
# into hatching.
TEXTURES = {
    "grass": lambda rng, n: smooth_noise(rng, n, 8, 32),  # upright blades
    "sky": lambda rng, n: np.clip(2.4 * smooth_noise(rng, n, 7, 4) - 0.7, 0, 1),  # clouds
    "sand": lambda rng, n: rng.random((n, SIDE, SIDE)),  # grains
    "night": lambda rng, n: (rng.random((n, SIDE, SIDE)) > 0.96) * 1.0,  # stars
    "water": lambda rng, n: _wave(rng, n, 1.1, 7),  # waves
    "road": _road,  # lane markings
    "snow": lambda rng, n: np.clip(3 * smooth_noise(rng, n, 14) - 1, 0, 1),  # flakes
    "brick": _brick,
}


def _texture(backgrounds, rng):
    field = np.empty((len(backgrounds), SIDE, SIDE), np.float32)
    for background in BACKGROUNDS:
        indices = np.flatnonzero(np.asarray(backgrounds) == background)
        field[indices] = TEXTURES[background](rng, len(indices))
    return field


def _tint(color, shade):
    """Colours (N, 3) times shades (N, 32, 32): (N, 32, 32, 3)."""
    return color[:, None, None] * shade[..., None]


def _compose(thing, ground, area):
    return ground + area[..., None] * (thing - ground)  # (N, 32, 32, 3)


def _shaded(names, backgrounds, colors, pose, rng, line_width=0.6, line=0.45):
    """Things on their backgrounds, with light and texture: the basis of photos and paintings."""
    n = len(names)
    tone, area, outline = trace(names, pose, line_width, rng)
    light = 0.72 + 0.5 * smooth_noise(rng, n, 3)
    texture = 0.68 + 0.55 * _texture(backgrounds, rng)
    texture = texture + 0.3 * (smooth_noise(rng, n, 6) - 0.5)
    grain = 0.85 + 0.3 * smooth_noise(rng, n, 12)
    shade = tone * light * grain * (1 - line * outline)
    thing = _tint(colors[:, 0], shade)
    ground = _tint(colors[:, 1], texture)
    return _compose(thing, ground, area)


def paint_photo(names, backgrounds, colors, pose, rng):
    """A shaded and textured image, slightly blurred, with sensor noise."""
    image = _shaded(names, backgrounds, colors, pose, rng)
    neighbours = sum(np.roll(image, shift, axis) for axis in (1, 2) for shift in (-1, 1))
    image = 0.6 * image + 0.1 * neighbours
    return image + 0.035 * rng.standard_normal(image.shape, dtype=np.float32)


def paint_art(names, backgrounds, colors, pose, rng):
    """A tinted photo in patches of one colour each, like strokes of a broad brush."""
    n = len(names)
    image = _shaded(names, backgrounds, colors, pose, rng, line_width=1.1, line=0.6)
    stroke_y, stroke_x = _brush_strokes(n, rng)
    image = np.clip(1.1 * image, 0, 1)
    index = np.arange(n)[:, None, None]
    image = image[index, stroke_y, stroke_x]  # (N, 32, 32, 3)
    palette = np.eye(3) + 0.15 * rng.standard_normal((n, 3, 3))  # each image mixes red, green, blue
    image = np.einsum("nhwc,ncd->nhwd", image, palette.astype(np.float32))
    return np.round(np.clip(image, 0, 1) * 6) / 6


def _brush_strokes(n, rng, cells=18):
    """The pixel that gives each pixel its colour: row and column, each (n, 32, 32).

    It is the nearest of `cells` x `cells` jittered points.
    """
    jitter_y, jitter_x = rng.random((2, n, cells, cells), dtype=np.float32)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    nearest = np.full((n, SIDE, SIDE), np.inf, np.float32)
    stroke_y = np.zeros_like(nearest)
    stroke_x = np.zeros_like(nearest)
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):  # a pixel's cell and its neighbours
        row = np.clip(y * cells // SIDE + dy, 0, cells - 1).astype(int)
        column = np.clip(x * cells // SIDE + dx, 0, cells - 1).astype(int)
        center_y = (row + jitter_y[:, row, column]) * SIDE / cells
        center_x = (column + jitter_x[:, row, column]) * SIDE / cells
        distance = (center_y - y) ** 2 + 2.5 * (center_x - x) ** 2  # strokes are tall
        nearer = distance < nearest
        nearest[nearer] = distance[nearer]
        stroke_y[nearer] = center_y[nearer]
        stroke_x[nearer] = center_x[nearer]
    # in the last cell 17 + jitter may round up to 18, which is outside the image
    stroke_y = np.minimum(stroke_y.astype(int), SIDE - 1)
    stroke_x = np.minimum(stroke_x.astype(int), SIDE - 1)
    return stroke_y, stroke_x


def paint_cartoon(names, backgrounds, colors, pose, rng):
    """Flat colours and a thick black outline."""
    tone, area, outline = trace(names, pose, 1.7, rng)
    texture = np.where(_texture(backgrounds, rng) > 0.6, 1.0, 0.86)  # two tones
    shade = np.where(tone > 0.82, 1, 0.85)
    ground = _tint(colors[:, 1], texture)
    thing = np.minimum(1, _tint(1.15 * colors[:, 0], shade))
    image = _compose(thing, ground, area)
    return image * (1 - outline[..., None])


def paint_sketch(names, backgrounds, colors, pose, rng):
    """Thin, faint, broken pencil strokes on grey, smudged paper; backgrounds are hatched."""
    n = len(names)
    tone, area, outline = trace(names, pose, 0.9, rng)
    paper = rng.uniform(0.78, 0.97, (n, 1, 1))
    smudges = np.clip(smooth_noise(rng, n, 4) - 0.45, 0, 1)
    paper = paper - 0.2 * smudges
    pressure = rng.uniform(0.5, 0.9, (n, 1, 1))
    gaps = np.clip(2.6 * smooth_noise(rng, n, 9) - 0.3, 0.15, 1)
    pressure = pressure * gaps
    hatching = rng.uniform(0.08, 0.22, (n, 1, 1))
    hatching = hatching * (_texture(backgrounds, rng) > 0.6) * (1 - area)
    shading = 0.25 * (1 - tone) * area
    image = paper * (1 - pressure * outline) * (1 - hatching) * (1 - shading)
    image = image + 0.03 * rng.standard_normal(image.shape)
    paper_color = 1 + 0.04 * rng.standard_normal((n, 1, 1, 3))
    return image[..., None] * paper_color


PAINTERS = {
    "art_painting": paint_art,
    "cartoon": paint_cartoon,
    "photo": paint_photo,
    "sketch": paint_sketch,
}


def draw(names, domain, backgrounds, colors, rng, pose=TASK_POSE):
    """One image for each entry of `names`, `backgrounds` and `colors`, keys of the tables above.

    Returns: (N, 3, 32, 32) uint8. The same state of `rng` gives the same images.
    """
    base = _base_colors(backgrounds, colors, rng)  # (N, 2, 3)
    images = []
    for start in range(0, len(names), 256):  # small enough for the CPU's cache
        batch = slice(start, start + 256)
        images.append(PAINTERS[domain](names[batch], backgrounds[batch], base[batch], pose, rng))
    pixels = np.clip(255 * np.concatenate(images), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _base_colors(backgrounds, colors, rng):
    """Randomly varied colours of things and backgrounds, (N, 2, 3) in [0, 1]."""
    pairs = [(COLORS[color], BACKGROUNDS[name]) for color, name in zip(colors, backgrounds)]
    base = np.array(pairs, np.float32) / 255
    brightness = rng.uniform(0.85, 1.12, (len(base), 2, 1))
    hue = rng.uniform(-0.05, 0.05, base.shape)
    base = np.clip(base * brightness + hue, 0, 1)
    thing, ground = base[:, 0], base[:, 1]  # views: assigning to them changes `base`
    # things that can hardly be told from their background become lighter or darker
    hidden = np.linalg.norm(thing - ground, axis=1) < 0.45
    opposite = ground[hidden].mean(1, keepdims=True) < 0.5
    thing[hidden] = 0.55 * thing[hidden] + 0.45 * opposite
    return base.astype(np.float32)


def random_colors(rng, n):
    return rng.choice(list(COLORS), n)


def tiny_rng(seed, *key):
    """A separate random generator for each seed and purpose, so that no two sets share images."""
    purpose = "/".join(map(str, key))
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


# ---------- The tiny sets ------------------------------------------------------------------------
# A part is (pixels (N, 3, h, w) uint8, labels (N,), groups (N,)) and has its own random stream.


def check_cue(cue):
    if not 0 <= cue <= 1:
        raise InputError(f"--cue is a probability between 0 and 1, got {cue}")


def as_part(pixels, labels, groups):
    return pixels, torch.from_numpy(labels), torch.from_numpy(groups)


def draw_domain(name, classes, domain, seed, cue, sizes):
    """One domain of a tiny benchmark: its training part, then its balanced part.

    Each class has a typical background. In the training part a thing stands on it with probability
    `cue`, else on one of the seven others. In the balanced part backgrounds do not depend on the
    class.

    Args:
        sizes: images per class, in the training part and in the balanced part.
    Yields: (pixels, labels, groups, attributes), twice. Group 1 has the typical background, group 0
    another one. Attributes are "background" and "color", (N,) indices into `BACKGROUNDS` and
    `COLORS`.
    Raises: InputError if `cue` is no probability.
    """
    check_cue(cue)
    kinds, color_names = list(BACKGROUNDS), list(COLORS)
    for part, size in zip(("training", "balanced"), sizes):
        rng = tiny_rng(seed, name, domain, part)
        labels = np.repeat(np.arange(len(classes)), size)
        n = len(labels)
        typical = labels % len(kinds)
        if part == "training":
            step = rng.integers(1, len(kinds), n)  # to one of the seven others
            other = (typical + step) % len(kinds)
            grounds = np.where(rng.random(n) < cue, typical, other)
        else:
            grounds = np.arange(n) % len(kinds)
        names = [classes[label] for label in labels]
        backgrounds = [kinds[ground] for ground in grounds]
        colors = random_colors(rng, n)
        pixels = draw(names, domain, backgrounds, colors, rng)
        groups = (typical == grounds).astype(np.int64)
        color_indices = [color_names.index(color) for color in colors]
        attributes = {"background": torch.from_numpy(grounds), "color": torch.tensor(color_indices)}
        yield *as_part(pixels, labels, groups), attributes


def draw_waterbirds(seed, cue, sizes=(2000, 400, 800)):
    """Photos of land- and waterbirds on land and water, like Waterbirds (Sagawa et al., 2020).

    In the training part a bird stands in its own kind of place with probability `cue`. In the
    validation and test parts all four groups are equally large. Groups are 2 * bird + place.

    Returns: {"train", "val" and "test": part}.
    Raises: InputError if `cue` is no probability.
    """
    check_cue(cue)
    parts = {}
    for part, size in zip(("train", "val", "test"), sizes):
        rng = tiny_rng(seed, "tiny-waterbirds", part)
        birds = np.arange(size) % 2
        places = np.arange(size) // 2 % 2
        if part == "train":
            places = np.where(rng.random(size) < cue, birds, 1 - birds)
        land = rng.choice(("grass", "sand"), size)
        backgrounds = np.where(places == 1, "water", land)
        names = [WATERBIRD_CLASSES[bird] for bird in birds]
        pixels = draw(names, "photo", backgrounds, random_colors(rng, size), rng)
        parts[part] = as_part(pixels, birds, 2 * birds + places)
    return parts


SPURIOUS_SPLITS = {  # how often digit and vehicle agree
    "train": 0.9,
    "val_id": 0.9,
    "test_id": 0.9,
    "val_ood": 0.5,
    "test_ood": 0.5,
}
VEHICLES = ("car", "truck")
VEHICLE_POSE = Pose(size=(0.8, 0.95), turn=5, shift=0.05)  # large: it has only 16 x 16 pixels


def spurious_digits(vehicles, split, rng):
    """A digit (0 or 1) for every vehicle (0 or 1), equal as often as `SPURIOUS_SPLITS` says."""
    agree = rng.random(len(vehicles)) < SPURIOUS_SPLITS[split]
    return np.where(agree, vehicles, 1 - vehicles)


def half_size(pixels) -> torch.Tensor:
    """Averages of 2 x 2 pixels, float32."""
    return F.avg_pool2d(torch.as_tensor(pixels, dtype=torch.float32), 2)


def draw_digits_and_vehicles(seed, sizes=(3000, 600, 1200), contrast=0.4, noise=0.22):
    """A digit above a vehicle, 32 x 16 pixels, like MNIST-CIFAR (Shah et al., 2020).

    The label is the vehicle, 0 for a car and 1 for a truck; `SPURIOUS_SPLITS` says how often the
    digit, 0 or 1, agrees with it. Groups are 2 * vehicle + digit. The digit is easy to see. The
    vehicle is faint and noisy, so in training the digit predicts the label more reliably than what
    can be seen of the vehicle, and a model that relies on the digit does well there.

    Args:
        sizes: images for training, for each validation part and for each test part.
        contrast, noise: of the vehicle; 1 is the range of a pixel.
    Returns: {name in `SPURIOUS_SPLITS`: part}.
    """
    parts = {}
    for part, size in zip(SPURIOUS_SPLITS, (*sizes, *sizes[1:])):
        rng = tiny_rng(seed, "tiny-mnist-cifar", part)
        vehicles = np.arange(size) % 2
        digits = spurious_digits(vehicles, part, rng)
        names = [f"digit {digit}" for digit in digits]
        _, _, strokes = trace(names, PRETRAINING_POSE, 4, rng)  # (N, 32, 32)
        top = half_size(strokes)[:, None].expand(-1, 3, -1, -1)  # (N, 3, 16, 16)
        backgrounds = rng.choice(("sky", "snow", "sand"), size)
        colors = random_colors(rng, size)
        names = [VEHICLES[vehicle] for vehicle in vehicles]
        pixels = draw(names, "photo", backgrounds, colors, rng, VEHICLE_POSE)
        clear = half_size(pixels) / 255
        grain = rng.standard_normal((size, 1, 16, 16), dtype=np.float32)
        faint = 0.5 + contrast * (clear - 0.5)
        bottom = faint + noise * torch.from_numpy(grain)  # (N, 3, 16, 16)
        pixels = 255 * torch.cat([top, bottom], 2)  # (N, 3, 32, 16)
        pixels = pixels.clamp(0, 255).to(torch.uint8)
        parts[part] = as_part(pixels, vehicles, 2 * vehicles + digits)
    return parts
