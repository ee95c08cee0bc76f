"""What records say: tables, paired differences, a closing line, a picture of every study.

All of it reads records: [{"target", "seed", "rows": {row: {measure: number in [0, 1]}}}, ...]
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from support import parallel
from support.files import write_json
from support.images import left_out
from support.pictures import plot_dots, plot_panels


# ---------- Numbers ------------------------------------------------------------------------------
def seed_means(records: list[dict], row: str, measure: str) -> list[float]:
    """A row's number averaged over targets, for every seed; [] where it has none."""
    by_seed = {}
    for record in records:
        numbers = record["rows"][row]
        if measure in numbers:
            by_seed.setdefault(record["seed"], []).append(numbers[measure])
    return [float(np.mean(values)) for values in by_seed.values()]


def paired(records: list[dict], row: str, other: str, measure: str) -> tuple[float, float, int]:
    """What a row is above another. Both saw the same images in every run, so differences are taken
    within runs and averaged over the targets of a seed; their spread is that between seeds.

    Returns: (mean, standard error over seeds, number of seeds); nan for the error of one seed.
    """
    ours = seed_means(records, row, measure)
    theirs = seed_means(records, other, measure)
    gains = np.subtract(ours, theirs)
    seeds = len(gains)
    if seeds == 1:
        return float(gains[0]), math.nan, 1
    error = gains.std(ddof=1) / seeds**0.5
    return float(gains.mean()), float(error), seeds


def measures_of(records: list[dict]) -> list[str]:
    """What tables show: the measures of the row that has most, without parts `target/photo`."""
    longest = max(records[0]["rows"].values(), key=len)
    return [name for name in longest if "/" not in name]


# what runs are about; the first that a table has
MAIN_MEASURES = ("target", "total", "H", "average OOD", "base", "ood")


def main_measure(records: list[dict]) -> str:
    measures = measures_of(records)
    return next(name for name in MAIN_MEASURES if name in measures)


def name_of(dataset: str, record: dict) -> str:
    """A run in words: `pacs sketch seed 0`."""
    return " ".join(filter(None, (dataset, record["target"], f"seed {record['seed']}")))


def targets_of(records: list[dict]) -> list[str]:
    targets = [record["target"] for record in records]
    return list(dict.fromkeys(targets))


# ---------- Text ---------------------------------------------------------------------------------
def percent(values: list[float]) -> str:
    """`62.1` for one value, `62.1 ± 0.4` (mean, sample standard deviation) for several, `-` for
    none."""
    if not len(values):
        return "-"
    values = 100 * np.asarray(values, float)
    mean = f"{values.mean():.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1):.1f}"


def gain(mean: float, error: float, seeds: int) -> str:
    """`+1.3 (se 0.8, 5 seeds)`, in percentage points; see `paired`."""
    spread = f"se {100 * error:.1f}, {seeds} seeds" if seeds > 1 else "1 seed"
    return f"{100 * mean:+.1f} ({spread})"


def format_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Text columns: names at the left, cells at the right of their columns."""
    table = [[title, *columns]]
    for name, cells in rows.items():
        table.append([name, *cells])
    widths = []
    for column in zip(*table):
        widths.append(max(map(len, column)))
    lines = []
    for name, *cells in table:
        aligned = [name.ljust(widths[0])]
        for cell, width in zip(cells, widths[1:]):
            aligned.append(cell.rjust(width))
        lines.append("  ".join(aligned))
    head, *body = lines
    return "\n".join([head, "-" * len(head), *body])


def value_table(title: str, rows: dict[str, dict]) -> str:
    """{row: {column: value}}, all rows with the same columns."""
    columns = list(next(iter(rows.values())))
    cells = {}
    for name, values in rows.items():
        cells[name] = [str(value) for value in values.values()]
    return format_table(title, columns, cells)


def table(title: str, records: list[dict], versus: str | None = None) -> str:
    """A column for each measure: averages over the targets of a seed, mean ± deviation over seeds,
    - where a row lacks it. With `versus`, a measure: what the last row gains over each other."""
    columns, rows = measures_of(records), {}
    for row in records[0]["rows"]:
        rows[row] = [percent(seed_means(records, row, measure)) for measure in columns]
    if versus:
        columns = [*columns, "last minus this"]
        *_, last = rows
        for row, cells in rows.items():
            cells.append(gain_of(records, last, row, versus))
    return format_table(title, columns, rows)


def gain_of(records: list[dict], row: str, other: str, measure: str) -> str:
    """What a row gains over another as text; `-` over itself, or where one lacks the measure."""
    known = seed_means(records, row, measure) and seed_means(records, other, measure)
    if row == other or not known:
        return "-"
    return gain(*paired(records, row, other, measure))


def target_table(title: str, records: list[dict], measure: str = "target") -> str:
    """The papers' table: a column for each target and for their average, mean ± deviation."""
    targets, rows = targets_of(records), {}
    for row in records[0]["rows"]:
        rows[row] = []
        for target in targets:
            own = [record for record in records if record["target"] == target]
            rows[row].append(percent(seed_means(own, row, measure)))
        rows[row].append(percent(seed_means(records, row, measure)))
    return format_table(title, [*targets, "average"], rows)


def closing_line(records: list[dict], measure: str = "target") -> str:
    """What the table says: which row is best, by how much, and whether seeds agree on that."""
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
    return text + "less than two standard errors, seeds do not agree on it."


# ---------- Pictures of records ------------------------------------------------------------------
def plot_rows(records: list[dict], path: Path) -> None:
    """Every row's numbers: a panel for each measure, mean and deviation over seeds."""
    columns = {}
    for measure in measures_of(records):
        columns[measure] = {}
        for row in records[0]["rows"]:
            columns[measure][row] = 100 * np.array(seed_means(records, row, measure))
    plot_dots(columns, "%", path)


def plot_curves(
    panels: dict[str, list[dict]], x_label: str, y_label: str, path: Path, **axes
) -> None:
    """A panel for each title of {title: records}. The measures of these records are numbers, "8",
    "16", ...: every row is a line over them, mean over targets and deviation over seeds."""
    lines = {}
    for title, records in panels.items():
        lines[title] = {}
        for row, numbers in records[0]["rows"].items():
            x = [float(measure) for measure in numbers]
            y = [seed_means(records, row, measure) for measure in numbers]  # (n, seeds)
            lines[title][row] = x, y
    plot_panels(lines, x_label, y_label, path, **axes)


def swept_setting(rows: dict) -> str | None:
    """The one setting, a number, in which rows differ: `sigma` of ldfs/sigma=0.1, ldfs/sigma=0.2;
    None if there is no such setting."""
    settings = set()
    for row in rows:
        for own in row.split("/")[1:]:
            name, _, value = own.partition("=")
            settings.add(name)
            if not is_number(value):
                return None
    return settings.pop() if len(settings) == 1 else None


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plot_sweep(records: list[dict], setting: str, usual: float, path: Path) -> None:
    """Accuracies over a setting of the rows, `mms/margin=0.1`; of `mms`, its usual value. A panel
    for each measure, a line for each name; a level for a name that has one value only."""
    values = {}  # {name: {value: row}}
    for row in records[0]["rows"]:
        name, _, own = row.partition("/")
        value = float(own.partition("=")[2] or usual)
        values.setdefault(name, {})[value] = row
    panels = {}
    for measure in measures_of(records):
        panels[measure] = {}
        for name, rows in values.items():
            x = sorted(rows)
            y = [100 * np.array(seed_means(records, rows[value], measure)) for value in x]
            if len(y[0]):
                panels[measure][name] = (x if len(x) > 1 else None), y
    swept = max(values.values(), key=len)
    plot_panels(panels, setting, "accuracy, %", path, xscale=scale_of(swept))


def scale_of(values) -> str:
    """Logarithmic, where values span more than a factor of 15."""
    smallest = min(value for value in values if value > 0)
    if max(values) < 15 * smallest:
        return "linear"
    return "log" if min(values) > 0 else "symlog"


# ---------- The end of a command -----------------------------------------------------------------
class Elsewhere(Exception):
    """Runs are in the hands of other processes, so that there is no table yet."""

    def __init__(self, runs: list[str]):
        super().__init__(
            f"In the hands of other processes: {', '.join(runs)}. When they are complete, the same "
            "command prints the tables; until then `python common.py table` shows what is there."
        )
        self.runs = runs


def report(args, records: list[dict]) -> tuple[list[dict], str]:
    """Print tables over all runs, what they say, and which files were written. Returns: records and
    their main measure, of which `report_average` makes an average over data sets. Raises: Elsewhere
    if runs were left to other processes."""
    left = [name_of(args.dataset, record) for record in records if not record["rows"]]
    if left:
        raise Elsewhere(left)
    measure = main_measure(records)
    if parallel.rank():
        return records, measure  # the first process says it
    runs = "run" if len(records) == 1 else "runs"
    versus = measure if len(records) > 1 else None
    print("\n" + table(f"{args.dataset}, {len(records)} {runs}, %", records, versus))
    if len(targets_of(records)) > 1:
        print("\n" + target_table(f"{args.dataset}, {measure} accuracy, %", records, measure))
    print("\n" + closing_line(records, measure))
    if left_out():
        print(left_out())
    print(f"Runs are in {args.output / args.method.name / (args.study or '')}/")
    if args.summary:
        settings = {}
        for name, value in vars(args).items():
            if name not in ("method", "rows", "more", "clip"):
                settings[name] = value
        write_json(args.summary, {"settings": settings, "records": records})
        print(f"Records are in {args.summary}")
    if args.study:
        path = args.summary.with_suffix(".png")
        setting = swept_setting(records[0]["rows"])
        if setting:
            plot_sweep(records, setting, getattr(args, setting.replace("-", "_")), path)
        else:
            plot_rows(records, path)
        print(f"A picture is in {path}")
    return records, measure


def average_records(found: dict[str, list[dict]]) -> list[dict]:
    """One record for every seed: rows and measures that all data sets have, averaged over them.

    found: {data set: records}. H is that of the averaged accuracies on base and new classes, as in
    the papers' tables.
    """
    first = next(iter(found.values()))
    seeds = dict.fromkeys(record["seed"] for record in first)
    averaged = [{"target": "average", "seed": seed, "rows": {}} for seed in seeds]
    for row in first[0]["rows"]:
        for measure in measures_of(first):
            known = []
            for records in found.values():
                if row in records[0]["rows"]:
                    known.append(seed_means(records, row, measure))  # (seeds,)
            if len(known) < len(found) or not all(known):
                continue
            for record, mean in zip(averaged, np.mean(known, axis=0)):
                record["rows"].setdefault(row, {})[measure] = float(mean)
    for record in averaged:
        for numbers in record["rows"].values():
            if "H" in numbers:
                base, new = numbers["base"], numbers["new"]
                numbers["H"] = 2 * base * new / (base + new) if base + new else 0.0
    return averaged


def report_average(found: dict[str, list[dict]], measure: str) -> None:
    """Print a column for each data set and for their average; then all measures of the average."""
    averaged = average_records(found)
    rows = {}
    for row in averaged[0]["rows"]:
        cells = [percent(seed_means(records, row, measure)) for records in found.values()]
        rows[row] = [*cells, percent(seed_means(averaged, row, measure))]
    print("\n" + format_table(f"{measure}, %", [*found, "average"], rows))
    title = f"average of {len(found)} data set{'s' * (len(found) > 1)}, %"
    print("\n" + table(title, averaged, measure))
    print("\n" + closing_line(averaged, measure))
