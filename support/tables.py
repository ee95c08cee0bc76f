"""What records say: text tables, paired differences, a closing line, pictures, all finished runs.

A record is what a run leaves in its result.json: {"target", "seed", "rows": {row: {measure: number
in [0, 1]}}, "extra"}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support import InputError, parallel
from support.runs import write_file, write_json


# ---------- Numbers ------------------------------------------------------------------------------
def targets_of(records: list[dict]) -> list[str]:
    targets = [record["target"] for record in records]
    return list(dict.fromkeys(targets))


def rows_of(records: list[dict]) -> list[str]:
    names = {}
    for record in records:
        names |= record["rows"]
    return list(names)


def measures_of(records: list[dict]) -> list[str]:
    """The columns of a table: measures of the longest row, without parts such as `target/photo`."""
    rows = []
    for record in records:
        rows += record["rows"].values()
    return [name for name in max(rows, key=len) if "/" not in name]


# the first of these that a record has is what its comparison is about
MAIN_MEASURES = ("target", "total", "H", "average OOD", "base", "ood")


def main_measure(records: list[dict]) -> str:
    measures = measures_of(records)
    return next(name for name in MAIN_MEASURES if name in measures)


def means_by_seed(records: list[dict], row: str, measure: str) -> dict[int, float]:
    """{seed: mean of a row's measure over all targets}, of seeds that have all targets."""
    targets = targets_of(records)
    by_seed = {}  # {seed: {target: number}}
    for record in records:
        measures = record["rows"].get(row, {})
        if measure in measures:
            by_seed.setdefault(record["seed"], {})[record["target"]] = measures[measure]
    means = {}
    for seed, by_target in by_seed.items():
        if len(by_target) == len(targets):
            means[seed] = float(np.mean([*by_target.values()]))
    return means


def seed_means(records: list[dict], row: str, measure: str) -> list[float]:
    """The mean of a row's measure over targets, one number for each seed; [] if it has none."""
    return list(means_by_seed(records, row, measure).values())


def paired(records: list[dict], row: str, other: str, measure: str) -> tuple[float, float, int]:
    """How far a row is above another row.

    Both rows saw the same images in every run, so the difference is taken within runs: averaged
    over the targets of a seed first, then over seeds.

    Returns: (mean difference, its standard error over seeds, number of seeds). The standard error
        of a single seed is nan.
    """
    gains = np.subtract(seed_means(records, row, measure), seed_means(records, other, measure))
    seeds = len(gains)
    error = gains.std(ddof=1) / seeds**0.5 if seeds > 1 else math.nan
    return float(gains.mean()), float(error), seeds


def average_records(by_dataset: dict[str, list[dict]]) -> list[dict]:
    """The average over the data sets of {data set: records}: a record for each seed.

    It has the rows, measures and seeds that all data sets have. H is the harmonic mean of the
    averaged accuracies on base and new classes, as in the papers' tables.
    """
    averaged = {}  # {seed: {row: {measure: mean over data sets}}}
    first, *_ = by_dataset.values()
    for row in rows_of(first):
        for measure in measures_of(first):
            means = [means_by_seed(records, row, measure) for records in by_dataset.values()]
            for seed in set.intersection(*map(set, means)):
                measures = averaged.setdefault(seed, {}).setdefault(row, {})
                measures[measure] = float(np.mean([mean[seed] for mean in means]))
    for rows in averaged.values():
        for measures in rows.values():
            if "H" in measures:
                base, new = measures["base"], measures["new"]
                measures["H"] = 2 * base * new / (base + new) if base + new else 0.0
    seeds = sorted(averaged)
    return [{"target": "average", "seed": seed, "rows": averaged[seed]} for seed in seeds]


# ---------- Text tables --------------------------------------------------------------------------
def percent(values: list[float]) -> str:
    """`62.1` for one value, `62.1 ± 0.4` (mean, sample standard deviation) for several values, `-`
    for none."""
    if not len(values):
        return "-"
    values = 100 * np.asarray(values, float)
    mean = f"{values.mean():.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1):.1f}"


def gain(mean: float, error: float, seeds: int) -> str:
    """The result of `paired` in percentage points: `+1.3 (se 0.8, 5 seeds)`."""
    spread = f"se {100 * error:.1f}, {seeds} seeds" if seeds > 1 else "1 seed"
    return f"{100 * mean:+.1f} ({spread})"


def format_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Text columns: names on the left, cells aligned at the right of their columns."""
    table = [[title, *columns]]
    for name, cells in rows.items():
        table.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for name, *cells in table:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    head, *body = lines
    return "\n".join([head, "-" * len(head), *body])


def value_table(title: str, rows: dict[str, dict]) -> str:
    """A table of {row: {column: value}}, in which all rows have the same columns."""
    columns = list(next(iter(rows.values())))
    cells = {}
    for name, values in rows.items():
        cells[name] = [str(value) for value in values.values()]
    return format_table(title, columns, cells)


def measure_columns(records: list[dict]) -> dict[str, tuple]:
    """{title: (records, measure)}: a column for each measure."""
    return {measure: (records, measure) for measure in measures_of(records)}


def target_columns(records: list[dict], measure: str) -> dict[str, tuple]:
    """{title: (records, measure)}: a column for each target and one for their average."""
    columns = {}
    for target in targets_of(records):
        columns[target] = [run for run in records if run["target"] == target], measure
    return {**columns, "average": (records, measure)}


def cells_of(records: list[dict], columns: dict[str, tuple]) -> dict[str, list[str]]:
    """{row: its cells}: mean over the targets of a seed, ± deviation over seeds."""
    rows = {}
    for row in rows_of(records):
        rows[row] = [percent(seed_means(runs, row, measure)) for runs, measure in columns.values()]
    return rows


def difference(records: list[dict], row: str, other: str, measure: str) -> str:
    """The gain of a row over another; `-` where one of them lacks the measure."""
    if not seed_means(records, row, measure) or not seed_means(records, other, measure):
        return "-"
    return gain(*paired(records, row, other, measure))


def table(title: str, records: list[dict], versus: str | None = None) -> str:
    """A column for each measure, see `cells_of`. With versus, a measure, there is one more column:
    the gain of the last row over each of the others."""
    columns = measure_columns(records)
    rows = cells_of(records, columns)
    titles = [*columns]
    if versus:
        titles.append("last minus this")
        *others, last = rows
        for row in others:
            rows[row].append(difference(records, last, row, versus))
        rows[last].append("-")
    return format_table(title, titles, rows)


def target_table(title: str, records: list[dict], measure: str = "target") -> str:
    """The papers' table: a column for each target and for their average, see `cells_of`."""
    columns = target_columns(records, measure)
    return format_table(title, [*columns], cells_of(records, columns))


def closing_line(records: list[dict], measure: str = "target") -> str:
    """One sentence about a table: the best row, how far it is above the last row (or, if it is the
    last, above the second best), and whether that is more than two standard errors."""
    means = {}
    for row in records[0]["rows"]:
        values = seed_means(records, row, measure)
        if values:
            means[row] = np.mean(values)
    *_, last = means
    best, *others = sorted(means, key=means.get, reverse=True)
    text = f"Best {measure} accuracy: {best}, {100 * means[best]:.1f} %."
    if not others:
        return text
    other = others[0] if best == last else last
    mean, error, seeds = paired(records, best, other, measure)
    text += f" It is {gain(mean, error, seeds)} above {other}: "
    if seeds == 1:
        return text + "one seed says nothing about chance, try --seeds 0 1 2 3 4."
    if mean > 2 * error:
        return text + "more than two standard errors."
    return text + "less than two standard errors, no difference shown."


# ---------- Pictures -----------------------------------------------------------------------------
def make_panels(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    """A figure (width and height in inches) and its panels, an array (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")  # apart from pyplot's figures
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path: Path) -> None:
    write_file(path, lambda partial: figure.savefig(partial, dpi=110))


def add_legend(figure, axes) -> None:
    """A legend at the right of all panels."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")


def mean_and_deviation(values) -> tuple:
    """Mean and sample deviation of (..., seeds) over the last axis; None for that of one seed."""
    values = np.asarray(values, float)
    deviation = values.std(-1, ddof=1) if values.shape[-1] > 1 else None
    return values.mean(-1), deviation


def plot_panels(panels: dict, x_label: str, y_label: str, path: Path, **axes) -> None:
    """A panel for each title of {title: {label: (x, y)}}, with a line for each label.

    y is (n,) or, for mean and deviation, (n, seeds). With x None it is a level at the mean of y.
    `axes` are passed on to matplotlib's `Axes.set`.
    """
    figure, grid = make_panels(1, len(panels), 4.2 * len(panels) + 2, 3.6)
    for panel, (title, curves) in zip(grid[0], panels.items()):
        for index, (label, (x, y)) in enumerate(curves.items()):
            look = {"label": label, "color": f"C{index}"}
            if x is None:
                panel.axhline(np.mean(y), linestyle="dashed", **look)
            else:
                mean, deviation = mean_and_deviation(np.asarray(y).reshape(len(x), -1))
                marker = "." if len(x) < 50 else ""
                panel.errorbar(x, mean, deviation, marker=marker, capsize=3, **look)
        panel.set(title=title, xlabel=x_label, ylabel=y_label, **axes)
    add_legend(figure, grid[0, -1])
    save_figure(figure, path)


def plot_points(panels: dict, x_label: str, y_label: str, path: Path) -> None:
    """A panel for each title of {title: {label: (x, y)}}, with a colour for each label's points."""
    figure, grid = make_panels(1, len(panels), 4.2 * len(panels) + 2, 3.6)
    for panel, (title, groups) in zip(grid[0], panels.items()):
        for label, (x, y) in groups.items():
            panel.scatter(x, y, s=30, alpha=0.7, label=label)
        panel.set(title=title, xlabel=x_label, ylabel=y_label)
    add_legend(figure, grid[0, -1])
    save_figure(figure, path)


def plot_heat(
    values, title: str, x_label: str, y_label: str, path, center=None, names=None
) -> None:
    """One heat map, see `plot_heats`."""
    plot_heats({title: values}, x_label, y_label, path, {title: center}, names)


def plot_heats(tables: dict, x_label: str, y_label: str, path, centers: dict, names=None) -> None:
    """A heat map for each title of {title: (rows, columns)}, at most four side by side, with the
    numbers in the cells where they fit.

    Args:
        centers: {title: the value shown in white}, for the titles that have one; values above it
            are red, values below it blue.
        names: (names of columns, names of rows) in place of numbers from 1.
    """
    rows, columns = np.shape(next(iter(tables.values())))
    column_names, row_names = names or (range(1, columns + 1), range(1, rows + 1))
    across = min(4, len(tables))
    down = math.ceil(len(tables) / across)
    width, height = 1.8 + 0.45 * min(columns, 16), 1.4 + 0.35 * rows
    figure, grid = make_panels(down, across, width * across, height * down)
    for axes in grid.flat[len(tables) :]:
        axes.remove()
    for axes, (title, values) in zip(grid.flat, tables.items()):
        values = np.asarray(values)
        center = centers.get(title)
        scale = {}
        if center is not None:
            reach = max(0.05, np.abs(values - center).max())
            scale = {"cmap": "RdBu_r", "vmin": center - reach, "vmax": center + reach}
        image = axes.imshow(values, aspect="auto", **scale)
        if columns <= 20:
            write_cells(axes, image, values)
        axes.set_xticks(range(columns), column_names, rotation=90 if names else 0)
        axes.set_yticks(range(rows), row_names)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        figure.colorbar(image)
    save_figure(figure, path)


def write_cells(axes, image, values, text=".2f", size=8) -> None:
    """Write the number into every cell of a heat map, black on light and white on dark colours."""
    for row, column in np.ndindex(values.shape):
        number = values[row, column]
        r, g, b, _ = image.cmap(image.norm(number))
        brightness = 0.3 * r + 0.6 * g + 0.1 * b
        ink = "white" if brightness < 0.5 else "black"
        look = {"ha": "center", "va": "center", "fontsize": size, "color": ink}
        axes.text(column, row, format(number, text), **look)


def plot_images(rows: dict[str, list], path: Path, frames=None, titles=()) -> None:
    """A line of images, (h, w, 3) or (h, w), for each label of {label: images}.

    Args:
        frames: {label: a colour or None for each of its images}.
        titles: of the columns.
    """
    frames = frames or {}
    columns = max(map(len, rows.values()))
    figure, grid = make_panels(len(rows), columns, 1.3 + columns, 1.08 * len(rows) + 0.4)
    for cells, (label, images) in zip(grid, rows.items()):
        cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        colors = frames.get(label, [None] * len(images))
        for cell, image, color in zip(cells, images, colors):
            cell.imshow(np.asarray(image))
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(color=color or "none", linewidth=4)
    for cell, title in zip(grid[0], titles):
        cell.set_title(title, fontsize=9)
    save_figure(figure, path)


# ---------- Pictures of records ------------------------------------------------------------------
def plot_rows(records: list[dict], path: Path) -> None:
    """A panel for each measure: rows below each other, mean and deviation over seeds, in %."""
    measures, rows = measures_of(records), list(records[0]["rows"])
    width, height = 1.5 + 3 * len(measures), 1.2 + 0.28 * len(rows)
    figure, grid = make_panels(1, len(measures), width, height, sharey=True)
    for panel, measure in zip(grid[0], measures):
        for index, row in enumerate(rows):
            values = 100 * np.array(seed_means(records, row, measure))  # (seeds,)
            if len(values):
                mean, deviation = mean_and_deviation(values)
                panel.errorbar(mean, index, xerr=deviation, capsize=3, fmt="o", color="C0")
        panel.set(title=measure, xlabel="%")
        panel.grid(axis="x", alpha=0.3)
    first = grid[0, 0]
    first.set_yticks(range(len(rows)), rows)
    first.invert_yaxis()  # the first row on top
    save_figure(figure, path)


def plot_curves(
    panels: dict[str, list[dict]], x_label: str, y_label: str, path: Path, **axes
) -> None:
    """A panel for each title of {title: records}, a line for each row over its measures, whose
    names are numbers (8, 16, ...): mean over targets, deviation over seeds."""
    lines = {}
    for title, records in panels.items():
        lines[title] = {}
        for row, measures in records[0]["rows"].items():
            x = [float(measure) for measure in measures]
            y = [seed_means(records, row, measure) for measure in measures]  # (n, seeds)
            lines[title][row] = x, y
    plot_panels(lines, x_label, y_label, path, **axes)


def swept_setting(rows: dict) -> str | None:
    """The one numeric setting in which rows differ, `sigma` of ldfs/sigma=0.1 and ldfs/sigma=0.2;
    None if rows differ in no setting, in several, or in one that is no number."""
    names = set()
    for row in rows:
        for setting in row.split("/")[1:]:
            name, _, value = setting.partition("=")
            names.add(name)
            try:
                float(value)
            except ValueError:
                return None
    return names.pop() if len(names) == 1 else None


def plot_sweep(records: list[dict], setting: str, default: float, path: Path) -> None:
    """Accuracy over the one setting in which rows differ. A panel for each measure, in it a line
    for each name of rows, or a level if the name has one value only.

    Args:
        default: the setting's value in rows that do not set it.
    """
    rows_by_name = {}  # {name: {value: row}}
    for row in records[0]["rows"]:
        name, _, assignment = row.partition("/")
        value = float(assignment.partition("=")[2] or default)
        rows_by_name.setdefault(name, {})[value] = row
    panels = {}
    for measure in measures_of(records):
        panels[measure] = {}
        for name, rows in rows_by_name.items():
            x = sorted(rows)
            y = [100 * np.array(seed_means(records, rows[value], measure)) for value in x]
            if len(y[0]):
                panels[measure][name] = (x if len(x) > 1 else None), y
    values = max(rows_by_name.values(), key=len)
    plot_panels(panels, setting, "accuracy, %", path, xscale=scale_of(values))


def scale_of(values) -> str:
    """A logarithmic axis if values span more than a factor of 15; `symlog` if one of them is 0."""
    smallest = min(value for value in values if value > 0)
    if max(values) < 15 * smallest:
        return "linear"
    return "log" if min(values) > 0 else "symlog"


# ---------- The end of a command -----------------------------------------------------------------
def report(args, records: list[dict]) -> None:
    """Print the tables of a command's runs and the closing line; write the records (--summary) and
    the picture of a study. Only rank 0 does.

    args: the command's settings, see `runs.command_parser`.
    """
    if parallel.rank():
        return
    measure = main_measure(records)
    several = len(records) > 1
    title = f"{args.dataset}, {len(records)} run{'s' * several}, %"
    print("\n" + table(title, records, measure if several else None))
    if len(targets_of(records)) > 1:
        print("\n" + target_table(f"{args.dataset}, {measure} accuracy, %", records, measure))
    print("\n" + closing_line(records, measure))
    print(f"Runs are in {args.output / args.script / (args.study or '')}/")
    if args.summary:
        write_json(args.summary, {"settings": vars(args), "records": records})
        print(f"Records are in {args.summary}")
    if args.study:
        path = args.summary.with_suffix(".png")
        setting = swept_setting(records[0]["rows"])
        if setting:
            plot_sweep(records, setting, getattr(args, setting.replace("-", "_")), path)
        else:
            plot_rows(records, path)
        print(f"A picture is in {path}")


# ---------- All finished runs: `python common.py table` ------------------------------------------
HELP = """All finished runs of all methods: a table for each data set, then the average of these.

python common.py table                                        # all runs in runs/
python common.py table runs/clipood/pacs* runs/clipood/vlcs*  # only the runs in these folders

Numbers are means ± deviations over seeds; an average over targets is over the seeds that have all
of them. Only runs with the same settings share a row; where settings differ, its name says how.
The average over data sets has the rows that all of them have with the same settings.
"""
NOT_COMPARED = ("dataset", "target", "seed", "modes")  # settings in which runs of a row may differ


def read_run(path: Path) -> dict:
    """A finished run: its record, its settings, and the keys by which `table_runs` groups it."""
    try:
        run = json.loads(path.read_text())
        settings, target = run["settings"], run["target"]
        source = target if target.startswith("from ") else ""  # of ldfs: one run has all targets
        keys = {"script": settings["script"], "dataset": settings["dataset"], "source": source}
        return {**run, **keys, "measure": main_measure([run])}
    except (ValueError, LookupError, TypeError):
        advice = "move it away, or give other folders"
        raise InputError(f"{path} is not the result of a run: {advice}") from None


def grouped(runs: list[dict], *keys: str) -> dict:
    """{value of the key, or tuple of values: runs with it}, sorted."""
    groups = {}
    for run in runs:
        groups.setdefault(itemgetter(*keys)(run), []).append(run)
    return dict(sorted(groups.items()))


def differing_settings(runs: list[dict]) -> list[str]:
    """The names of the settings in which runs differ, apart from NOT_COMPARED."""
    first, names = runs[0]["settings"], {}
    for run in runs:
        settings = run["settings"]
        for name in {**first, **settings}:
            if settings.get(name) != first.get(name) and name not in NOT_COMPARED:
                names[name] = None
    return list(names)


def named_by_settings(runs: list[dict]) -> list[dict]:
    """The runs, with new names for their rows: the script, the row, and the settings in which the
    runs of this script differ, `clipood mms (lr 0.1)`."""
    named = []
    for script, runs_of_script in grouped(runs, "script").items():
        differing = differing_settings(runs_of_script)
        for run in runs_of_script:
            settings = ", ".join(f"{name} {run['settings'].get(name)}" for name in differing)
            suffix = f" ({settings})" if settings else ""
            rows = {f"{script} {row}{suffix}": numbers for row, numbers in run["rows"].items()}
            named.append({**run, "rows": rows})
    return named


def run_table(title: str, records: list[dict]) -> str:
    """A column for each target, or for each measure if there is one target; the number of seeds."""
    targets, measure = targets_of(records), main_measure(records)
    if len(targets) > 1:
        title += f", {measure} accuracy, %"
        columns = target_columns(records, measure)
    else:
        title = f"{title} {targets[0]}".strip() + ", %"
        columns = measure_columns(records)
    rows = cells_of(records, columns)
    for row, cells in rows.items():
        seeds = [len(seed_means(records, row, name)) for name in measures_of(records)]
        cells.append(str(max(seeds)))
    return format_table(title, [*columns, "seeds"], rows)


def table_runs(argv: list[str] | None = None) -> None:
    """`python common.py table [FOLDER ...]`; argv: folders in place of the command line's."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("common.py table", description=HELP, formatter_class=form)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    folders = parser.parse_args(sys.argv[2:] if argv is None else argv).folders
    finished, started = set(), set()
    for folder in folders:
        finished |= {path.parent for path in folder.rglob("result.json")}
        started |= {path.parent for path in folder.rglob("checkpoint.pt")}
    if not finished | started:
        names = ", ".join(map(str, folders))
        raise InputError(f"there are no runs in {names}: give the folder of a command's --output")
    runs = [read_run(folder / "result.json") for folder in sorted(finished)]
    for runs_of_kind in grouped(runs, "measure", "source").values():
        datasets = grouped(runs_of_kind, "dataset")
        for dataset, runs_of_dataset in datasets.items():
            print(run_table(dataset, named_by_settings(runs_of_dataset)) + "\n")
        averaged = average_records(grouped(named_by_settings(runs_of_kind), "dataset"))
        if len(datasets) > 1 and averaged:
            print(run_table(" + ".join(datasets), averaged) + "\n")
    unfinished = sorted(started - finished)
    print(f"Finished runs: {len(runs)}. Not finished: {len(unfinished)}.")
    for folder in unfinished:
        print(f"  {folder}")
