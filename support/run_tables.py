"""All finished runs of all methods, in one table a data set, beside what the papers published.

python common.py table                         # of all runs in runs/
python common.py table runs/clipood elsewhere  # of all runs in these folders

Numbers are means ± deviations over seeds, an average is over seeds that have all targets. Only
runs with the same settings are put together: where some differ, their rows are numbered, and it is
said below the table in what.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from support import InputError, slug
from support.report import format_table, main_measure, measures_of, percent, seed_means

SCRIPTS = [path.stem for path in Path(__file__).parent.parent.glob("*.py")]
NOT_OF_A_ROW = ("dataset", "target", "seed", "modes")  # settings in which its runs may differ


# ---------- Runs, as they lie in folders ---------------------------------------------------------
def read_runs(folders: list[Path]) -> tuple[dict, list[Path]]:
    """{file: record} of finished runs, and the folders of others. Raises: InputError if there are
    none, or if a result is not of a run."""
    found, unfinished = {}, []
    for folder in folders:
        for path in sorted(folder.resolve().rglob("result.json")):
            if not path.parent.name.startswith("."):  # else it is not in its place yet
                found[path] = read_run(path)
        unfinished += sorted(folder.resolve().rglob(".*.partial"))
    if not found and not unfinished:
        names = ", ".join(map(str, folders))
        raise InputError(f"there are no runs in {names}: give folders that have some, as --output")
    return found, list(dict.fromkeys(unfinished))


def read_run(path: Path) -> dict:
    """A record with its settings and its method, which is the name of a folder above it."""
    try:
        record = json.loads(path.read_text())
        method = [part for part in path.parts if part in SCRIPTS][-1]
        known = {name: record[name] for name in ("target", "seed", "rows", "settings")}
        return known | {"method": method, "dataset": known["settings"]["dataset"]}
    except (ValueError, LookupError, TypeError):
        what = "no result of a run in its method's folder"
        raise InputError(f"{path} is {what}: move it away, or give other folders") from None


# ---------- What goes together -------------------------------------------------------------------
def by_target(record: dict) -> list[dict]:
    """A record for each of its targets: of ldfs, which has several, seen from one source."""
    longest = max(record["rows"].values(), key=len)
    targets = [name for name in longest if name.startswith("target/")]
    records = []
    for target in targets:
        rows = {row: {"target": numbers[target]} for row, numbers in record["rows"].items()}
        records.append({**record, "target": target.removeprefix("target/"), "rows": rows})
    return records or [record]


def title_of(record: dict) -> str:
    """Of the table that a run goes into; what is seen from one source has a table of its own."""
    source = f" {record['target']}" if record["target"].startswith("from ") else ""
    return f"{record['dataset']}{source}, {main_measure([record])} accuracy, %"


def differences(records: list[dict]) -> list[str]:
    """Of each run, in words, the settings in which not all are the same; "" if all are."""
    names = {}
    for record in records:
        names |= record["settings"]
    differing = []
    for name in names:
        values = {str(record["settings"].get(name)) for record in records}
        if len(values) > 1 and name not in NOT_OF_A_ROW:
            differing.append(name)
    found = []
    for record in records:
        own = [f"{name} {record['settings'].get(name)}" for name in differing]
        found.append(", ".join(own))
    return found


def rows_of(records: list[dict]) -> tuple[dict[str, list[dict]], list[str]]:
    """{row: its records}, all runs of one method in one table, and what its numbers stand for. Of
    runs alike in row, settings, target and seed the last one counts."""
    rows, kinds = {}, {}
    for record, settings in zip(records, differences(records)):
        number = kinds.setdefault(settings, len(kinds) + 1)
        kind = f" [{number}]" if settings else ""
        for own in by_target(record):
            for row, numbers in own["rows"].items():
                same = rows.setdefault(f"{record['method']} {row}{kind}", {})
                same[own["target"], own["seed"]] = {**own, "rows": {row: numbers}}
    rows = {name: list(same.values()) for name, same in rows.items()}
    method = records[0]["method"]
    return rows, [f"{method} [{number}]: {own}" for own, number in kinds.items() if own]


# ---------- A table ------------------------------------------------------------------------------
def cell(records: list[dict], measure: str) -> str:
    (row,) = records[0]["rows"] if records else [""]
    return percent(seed_means(records, row, measure))


def measure_cells(records: list[dict], measures: list[str]) -> list[str]:
    """A row's cells where runs have one target: its measures, and how many seeds they are of."""
    return [*(cell(records, measure) for measure in measures), str(len(records))]


def target_cells(records: list[dict], measure: str, targets: list[str]) -> list[str]:
    """A row's cells: its targets, their average over seeds that have all of them, how many those
    are."""
    cells, whole = [], {record["seed"] for record in records}
    for target in targets:
        own = [record for record in records if record["target"] == target]
        whole &= {record["seed"] for record in own}
        cells.append(cell(own, measure))
    of_whole = [record for record in records if record["seed"] in whole]
    return [*cells, cell(of_whole, measure), str(len(whole))]


def published_rows(tables: list[dict], places: list[tuple]) -> dict[str, list[str]]:
    """What papers print of some columns, (data set, measure) or (data set, measure, slug of the
    target)."""
    rows = {}
    for table in tables:
        for name, numbers in table["rows"].items():
            cells = ["-"] * len(places)
            for (dataset, measure, *target), accuracy in zip(table["columns"], numbers["accuracy"]):
                place = dataset, measure, *map(slug, target)
                if place in places and accuracy is not None:
                    cells[places.index(place)] = str(accuracy)
            if {*cells} != {"-"}:
                paper = table["paper"].split(" (")[0]
                rows[f"{paper}, published: {name}"] = [*cells, "-"]
    return rows


def run_table(title: str, records: list[dict], published: list[dict]) -> str:
    """All runs of a table, and the papers of their methods: a column for each target and for their
    average; or for each measure, where there is one target."""
    dataset, measure = records[0]["dataset"], main_measure(records[:1])
    by_method, rows, below = {}, {}, []
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    for own in by_method.values():
        own_rows, kinds = rows_of(own)
        rows |= own_rows
        below += kinds
    targets = sorted({record["target"] for own in rows.values() for record in own})
    if len(targets) > 1 or measure == "target":
        titles = [*targets, "average"]
        places = [(dataset, measure, slug(target)) for target in targets] + [(dataset, measure)]
        cells = {name: target_cells(own, measure, targets) for name, own in rows.items()}
    else:
        titles = measures_of(records)
        places = [(dataset, own) for own in titles]
        cells = {name: measure_cells(own, titles) for name, own in rows.items()}
    papers = [table for table in published if table["script"] in by_method]
    cells |= published_rows(papers, places)
    return "\n".join([format_table(title, [*titles, "seeds"], cells), *below])


def main(published: list[dict]) -> None:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("common.py", description=__doc__, formatter_class=text)
    parser.add_argument("what", choices=["table"])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    found, unfinished = read_runs(parser.parse_args().folders)
    tables = {}
    for record in found.values():
        tables.setdefault(title_of(record), []).append(record)
    for title, records in sorted(tables.items()):
        print(f"{run_table(title, records, published)}\n")
    print(f"Finished runs: {len(found)}. Not finished: {len(unfinished)}.")
    for path in unfinished:
        print(f"  {path}")
