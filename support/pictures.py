"""General pictures, written as PNG: lines or points, rows of a table, a heat map, images.

They know nothing of runs or records: `support/report.py` brings them numbers of both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.files import replacing


def make_panels(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    """A figure of so many inches and its panels, an array (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")  # no window, whatever else draws
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, dpi=110)


def add_legend(figure, axes, panels: int) -> None:
    """Below the panels, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not any(labels):
        return
    longest = max(map(len, labels))
    columns = max(1, 45 * panels // (6 + longest))
    lines = (len(labels) - 1) // columns
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    columns = min(len(labels), columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def mean_and_deviation(values) -> tuple:
    """Of (..., seeds), over the last axis; the deviation of a single seed is None."""
    values = np.asarray(values, float)
    deviation = values.std(-1, ddof=1) if values.shape[-1] > 1 else None
    return values.mean(-1), deviation


def plot_panels(
    panels: dict, x_label: str, y_label: str, path: Path, style="lines", **axes
) -> None:
    """A panel for each title of {title: {label: (x, y)}}.

    Lines: y is (n,) or, for mean and deviation, (n, seeds); x None: a level at the mean of y.
    With style "points": points.
    """
    figure, grid = make_panels(1, len(panels), 4.2 * len(panels), 3.6)
    for panel, (title, curves) in zip(grid[0], panels.items()):
        for place, (label, (x, y)) in enumerate(curves.items()):
            look = {"label": label, "color": f"C{place}"}
            if style == "points":
                size = 10 if len(x) > 100 else 30
                panel.scatter(x, y, s=size, alpha=0.7, **look)
            elif x is None:
                panel.axhline(np.mean(y), linestyle="dashed", **look)
            else:
                mean, deviation = mean_and_deviation(np.asarray(y).reshape(len(x), -1))
                marker = "." if len(x) < 50 else ""
                panel.errorbar(x, mean, deviation, marker=marker, capsize=3, **look)
        panel.set(title=title, xlabel=x_label, ylabel=y_label, **axes)
    add_legend(figure, grid[0, -1], len(panels))
    save_figure(figure, path)


def plot_dots(columns: dict[str, dict], x_label: str, path: Path) -> None:
    """A panel for each measure of {measure: {row: numbers over seeds}}: rows one below the other,
    mean and deviation."""
    rows = list(next(iter(columns.values())))
    width, height = 1.5 + 3 * len(columns), 1.2 + 0.28 * len(rows)
    figure, grid = make_panels(1, len(columns), width, height, sharey=True)
    for panel, (measure, numbers) in zip(grid[0], columns.items()):
        for place, row in enumerate(rows):
            if len(numbers[row]):
                mean, deviation = mean_and_deviation(numbers[row])
                panel.errorbar(mean, place, xerr=deviation, capsize=3, fmt="o", color="C0")
        panel.set(title=measure, xlabel=x_label)
        panel.grid(axis="x", alpha=0.3)
    left = grid[0, 0]
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()  # the first row on top
    save_figure(figure, path)


def plot_heat(
    values, title: str, x_label: str, y_label: str, path, center=None, names=None
) -> None:
    """A table (rows, columns) of numbers as colours, written into the cells where they fit.

    center: the value that is white, red above and blue below it. names: (of columns, of rows) in
    place of numbers from 1.
    """
    rows, columns = np.shape(values)
    figure, grid = make_panels(1, 1, 2.2 + 0.5 * columns, 1.6 + 0.42 * rows)
    axes = grid[0, 0]
    draw_heat(figure, axes, np.asarray(values), center, names)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    save_figure(figure, path)


def plot_heats(tables: dict, x_label: str, y_label: str, path, centers: dict, across=4) -> None:
    """A heat map for each title of {title: (rows, columns)}, `across` of them side by side.

    centers: {title: the value that is white}, where there is one.
    """
    rows, columns = np.shape(next(iter(tables.values())))
    down = -(-len(tables) // across)
    width, height = 1.5 + 0.4 * min(columns, 16), 1.2 + 0.28 * rows
    figure, grid = make_panels(down, across, width * across, height * down)
    for axes in grid.flat[len(tables) :]:
        axes.remove()
    for axes, (title, values) in zip(grid.flat, tables.items()):
        draw_heat(figure, axes, np.asarray(values), centers.get(title))
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    save_figure(figure, path)


def draw_heat(figure, axes, values, center=None, names=None) -> None:
    """One heat map with its colour bar; see `plot_heat`."""
    rows, columns = values.shape
    scale = {}
    if center is not None:
        reach = max(0.05, np.abs(values - center).max())
        scale = {"cmap": "RdBu_r", "vmin": center - reach, "vmax": center + reach}
    image = axes.imshow(values, aspect="auto", **scale)
    if columns <= 20:
        write_cells(axes, image, values)
    column_names, row_names = names or (range(1, columns + 1), range(1, rows + 1))
    longest = max(len(str(name)) for name in column_names)
    rotation = 90 if longest > 3 else 0
    axes.set_xticks(range(columns), column_names, rotation=rotation)
    axes.set_yticks(range(rows), row_names)
    figure.colorbar(image)


def write_cells(axes, image, values, text=".2f", size=8) -> None:
    """Write its number into every cell of a heat map, in the ink that can be read on it."""
    for row, column in np.ndindex(values.shape):
        number = values[row, column]
        r, g, b, _ = image.cmap(image.norm(number))
        brightness = 0.3 * r + 0.6 * g + 0.1 * b
        ink = "white" if brightness < 0.5 else "black"
        place = {"ha": "center", "va": "center", "fontsize": size}
        axes.text(column, row, format(number, text), color=ink, **place)


def plot_images(rows: dict[str, list], path: Path, frames=None) -> None:
    """A line of pictures (h, w, 3) or (h, w) for each label.

    frames: {label: a colour or None for each of its pictures}.
    """
    frames = frames or {}
    columns = max(map(len, rows.values()))
    figure, grid = make_panels(len(rows), columns, 1.3 + columns, 1.08 * len(rows) + 0.4)
    for cells, (label, pictures) in zip(grid, rows.items()):
        cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        colors = frames.get(label, [None] * len(pictures))
        for cell, picture, color in zip(cells, pictures, colors):
            cell.imshow(np.asarray(picture))
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(color=color or "none", linewidth=4)
    save_figure(figure, path)
