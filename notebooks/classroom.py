"""What the six notebooks share: one look for pictures, code shown from the files, exercises.

    from notebooks import classroom
    from notebooks.checks import clipood as check

A method keeps its colour and its mark in all notebooks; both can be told apart in grey and by the
colour-blind (the palette is that of Okabe and Ito, 2008).
"""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

import common
from support import ASSETS, tables

# ---------- One look -----------------------------------------------------------------------------
GREY, ORANGE, SKY, GREEN = "#6e6e6e", "#e69f00", "#56b4e9", "#009e73"
BLUE, RED, PINK = "#0072b2", "#d55e00", "#cc79a7"
INK, PAPER = "#222222", "#f4f4f4"

# what a method starts from, what learns without care, the method before, the method itself
LOOKS = {
    "zero-shot": (GREY, "s"),
    **dict.fromkeys(("plain", "full", "linear", "ms", "lora", "erm"), (ORANGE, "o")),
    **dict.fromkeys(("mms", "lads", "ha-lora", "div", "lora+dig"), (SKY, "^")),
    **dict.fromkeys(("erm+sel", "mms+wise-ft", "dig", "text"), (PINK, "v")),
    **dict.fromkeys(("ha-lora+dig", "mms+bma", "ldfs", "div+sel"), (BLUE, "D")),
    # 05: combinations
    **dict.fromkeys(("purified", "purified+probe", "zero-shot+probe"), (ORANGE, "o")),
    **dict.fromkeys(("purified+bma", "purified+mms"), (SKY, "^")),
    **dict.fromkeys(("purified+mms+bma", "purified+ldfs", "zero-shot+ldfs"), (BLUE, "D")),
}
# curves that are no methods: seeds, classes
SERIES = (
    (BLUE, "o"),
    (ORANGE, "^"),
    (GREEN, "s"),
    (RED, "D"),
    (PINK, "v"),
    (SKY, "P"),
    (GREY, "X"),
)
# the four domains of the tiny world
DOMAINS = {"photo": BLUE, "art_painting": ORANGE, "cartoon": GREEN, "sketch": RED}


def use_look() -> None:
    """Fonts, sizes and lines of every picture."""
    look = {
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY]),
        "image.cmap": "cividis",
        "legend.frameon": False,
        "lines.linewidth": 2,
    }
    plt.rcParams.update(look)


def look(row: str) -> dict:
    """Colour and mark of a row, `mms+bma/beta=0.1` as `mms+bma`, for any plot of matplotlib."""
    color, marker = LOOKS.get(row.split("/")[0], (INK, "x"))
    return {"color": color, "marker": marker}


def panels(columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 3.2, **options):
    """A figure of so many inches, at most 8 wide to be readable on a page, and its panels: one, or
    an array of them."""
    return plt.subplots(rows, columns, figsize=(width, height), **options)


def image_rows(rows: dict[str, list], frames: dict | None = None, titles=(), size=0.9) -> None:
    """A line of pictures (h, w, 3) or (h, w) for each label.

    frames: {label: a colour or None for each of its pictures}; titles: above each column; size:
    of a picture's longer side, in inches.
    """
    columns = max(map(len, rows.values()))
    longest = max(map(len, rows))
    tall, wide, *_ = np.shape(next(iter(rows.values()))[0])
    width = size * columns * min(1, wide / tall) + 0.09 * longest + 0.3
    lines = max((title.count("\n") + 1 for title in titles), default=0)
    height = size * len(rows) * min(1, tall / wide) + 0.19 * lines + 0.1
    _, grid = panels(columns, len(rows), width, height, squeeze=False)
    for cells, (label, pictures) in zip(grid, rows.items()):
        cells[0].set_ylabel(label, rotation=0, ha="right", va="center")
        colors = (frames or {}).get(label, [None] * len(pictures))
        for cell in cells:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        for cell, picture, color in zip(cells, pictures, colors):
            cell.imshow(np.asarray(picture))
            if color:
                cell.spines[:].set(visible=True, color=color, linewidth=4)
    for cell, title in zip(grid[0], titles):
        cell.set_title(title, loc="center", fontsize=9)
    plt.show()


def lay_over(axes, picture, attention, title: str = "") -> None:
    """What a head attends to, laid over the image: where it does not look, the image is dark.

    picture: (h, w, 3) uint8; attention: (rows, columns) of patches, >= 0.
    """
    attention = np.asarray(attention, float)
    height, width = np.shape(picture)[:2]
    rows, columns = attention.shape
    light = np.kron(attention / attention.max(), np.ones((height // rows, width // columns)))
    light = 0.25 + 0.75 * light[..., None]
    axes.imshow((np.asarray(picture)[: len(light), : light.shape[1]] * light).astype(np.uint8))
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="center", fontsize=9)
    axes.spines[:].set_visible(False)


def heat(axes, values, x_names=None, y_names=None, center=None, text=".2f") -> None:
    """A table of numbers as colours, each number written into its cell.

    center: the value that is white, orange above and blue below it.
    """
    values = np.asarray(values, float)
    scale = {"vmin": values.min() - 1e-9, "vmax": values.max() + 1e-9}
    if center is not None:
        reach = max(1e-6, np.abs(values - center).max())
        scale = {"cmap": "PuOr_r", "vmin": center - reach, "vmax": center + reach}
    image = axes.imshow(values, aspect="auto", **scale)
    tables.write_cells(axes, image, values, text, size=9)
    rows, columns = values.shape
    axes.set_xticks(range(columns), x_names or range(1, columns + 1))
    axes.set_yticks(range(rows), y_names or range(1, rows + 1))
    axes.spines[:].set_visible(False)


def seeds(axes, records: list[dict], rows: list[str], measure: str) -> None:
    """Every seed of every row as a dot, averaged over its targets; a line joins those of a seed,
    and a bar is the mean. In %, from records as `records` reads them."""
    values = [100 * np.array(tables.seed_means(records, row, measure)) for row in rows]
    axes.plot(range(len(rows)), np.array(values), color=GREY, linewidth=0.7, alpha=0.6, zorder=1)
    for place, (row, own) in enumerate(zip(rows, values)):
        axes.scatter([place] * len(own), own, s=45, zorder=2, **look(row))
        bar = {"color": INK, "linewidth": 2.5, "zorder": 3}
        axes.plot([place - 0.25, place + 0.25], [own.mean()] * 2, **bar)
    axes.set_xticks(range(len(rows)), rows)


# ---------- Code and numbers, as they stand in the files ------------------------------------------
def show(*functions) -> None:
    """The source of functions or classes, or of one method of a class, read from its file."""
    for function in functions:
        code = textwrap.dedent(inspect.getsource(function)).rstrip()
        file = Path(inspect.getsourcefile(inspect.unwrap(function))).name
        display(Markdown(f"`{file}`\n```python\n{code}\n```"))


def table(rows: dict[str, dict], corner: str = "") -> None:
    """A table of {row: {column: text or number}}, as a page shows it."""
    columns = []
    for cells in rows.values():
        columns += [column for column in cells if column not in columns]
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    for name, cells in rows.items():
        lines.append([name, *(str(cells.get(column, "")) for column in columns)])
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


def published(script: str, *names: str) -> None:
    """The paper's own numbers of a script, %, from assets/published.json: all tables or some."""
    for entry in json.loads((ASSETS / "published.json").read_text()):
        if entry["script"] != script or (names and entry["name"] not in names):
            continue
        columns = []
        for place in entry["columns"]:
            columns.append(", ".join(part for part in place if part != "target"))
        rows = {}
        for name, row in entry["rows"].items():
            numbers = ["" if number is None else number for number in row["accuracy"]]
            rows[name] = dict(zip(columns, numbers))
        display(Markdown(f"**{entry['paper']}, {entry['table']}, accuracy in %**"))
        table(rows)


def records(name: str) -> list[dict]:
    """Of runs that were made before: results/NAME.json. common.py says what a record is."""
    file = Path(common.__file__).with_name("results") / f"{name}.json"
    return json.loads(file.read_text())["records"]


def own_data(folder: str, model: str) -> tuple | None:
    """(CLIP, domains) of a reader's pictures, folder/<domain>/<class>/<image>; None, with a
    message, where there is no folder or weights cannot be had."""
    if not folder:
        print("Skipped: fill in FOLDER, which holds <domain>/<class>/<image>, and run this again.")
        return None
    try:
        return common.load_clip(model), common.load_domains(f"folder:{folder}")
    except common.InputError as error:
        print(f"Skipped: {error}")
        return None


# ---------- Exercises ----------------------------------------------------------------------------
class Wrong(Exception):
    """Says what is wrong with an answer, to the student."""


@dataclass
class Verdict:
    """What a check says; a notebook shows it as the cell's result."""

    right: bool
    text: str

    def __repr__(self):
        return f"{'Right' if self.right else 'Not yet'}. {self.text}"

    def _repr_markdown_(self):
        return f"**{'Right' if self.right else 'Not yet'}.** {self.text}"


def exercise(check: Callable) -> Callable:
    """Make a check of a function that returns what to say of a right answer, and raises `Wrong` for
    another."""

    @functools.wraps(check)
    def checked(*answer) -> Verdict:
        if any(part is ... for part in answer):
            return Verdict(False, "There is no answer yet: put yours in place of `...`.")
        try:
            return Verdict(True, check(*answer))
        except Wrong as wrong:
            return Verdict(False, str(wrong))

    return checked


def ask(answer: Callable, *arguments):
    """What a student's function returns. Raises: Wrong if it stops or has nothing to say."""
    if not callable(answer):
        raise Wrong(f"A function is needed, this is {answer!r}.")
    try:
        value = answer(*arguments)
    except Exception as error:  # whatever a student's code may raise
        raise Wrong(f"Your code stops with {type(error).__name__}: {error}") from None
    if value is None or value is ...:
        raise Wrong("Your function returns nothing yet: put your code in place of `...`.")
    return value


def close(found, right, tolerance: float = 1e-4) -> bool:
    """Are numbers the same, of whatever kind they are, and of the same shape?"""
    found, right = as_array(found), as_array(right)
    return found.shape == right.shape and bool(np.allclose(found, right, tolerance, tolerance))


def as_array(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    try:
        return np.asarray(value, float)
    except (TypeError, ValueError):
        raise Wrong(f"Numbers are needed, this is {value!r}.") from None


def expect(found, right, hint: str = "", mistakes: dict | None = None) -> None:
    """Raises: Wrong unless numbers are right; says which mistake they come from, if it is known.

    mistakes: {what is wrong: the numbers that one gets by it}.
    """
    if close(found, right):
        return
    for what, numbers in (mistakes or {}).items():
        if close(found, numbers):
            raise Wrong(what)
    shape, needed = as_array(found).shape, as_array(right).shape
    if shape != needed:
        raise Wrong(f"The shape is {shape}, and should be {needed}. {hint}")
    if not shape:
        raise Wrong(f"You get {float(found):.4g}, and not {float(right):.4g}. {hint}")
    difference = np.abs(as_array(found) - as_array(right))
    place = tuple(map(int, np.unravel_index(np.nanargmax(difference), shape)))
    numbers = f"{as_array(found)[place]:.4g}, and not {as_array(right)[place]:.4g}"
    raise Wrong(f"At place {place} you get {numbers}. {hint}")
