"""Write tables.md and ledger.md, the tables of this folder, from its records.

    python results/write.py             # tables.md and ledger.md
    python results/write.py --pictures  # and assets/tiny_world.png, every thing in every domain

tables.md holds the tables that are listed in assets/tables.json. ledger.md shows published
numbers beside ours: they, the commands and deviations are in assets/published.json, and a command
writes its records to results/benchmark-....json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import headpurify
import vit_diverse
from notebooks import head_study
from support import ASSETS, tables, tiny_world

RESULTS = Path(__file__).resolve().parent
NOT_RUN = "not run yet"
TABLES_INTRODUCTION = """# All tables

Written by `python results/write.py` from the records in this folder. [README.md](README.md) says
how to read them, what they show, and which command made each record. A section holds the tables
that its command prints, then differences between rows, then other numbers of the same runs.
"""
LEDGER_INTRODUCTION = f"""# The ledger: published numbers, and ours

Written by `python results/write.py` from `assets/published.json` and the records in this folder.
Accuracies in %, as the papers print them; `-` is a number that is not known here. *{NOT_RUN}*
means: needs data and a GPU. Run a command from the root of the repository, then the script above
again.

LDFS has no table here: none of its published numbers is known to us yet. CLIPood's rows ERM, MIRO
and DPL, and CLIPStyler's pictures in LDFS, are other methods, which no command of ours runs.
"""


# ---------- Views: other numbers of a record, {row: {measure: number}} ---------------------------
def first_run(record: dict) -> dict:
    """headpurify: the run of `python headpurify.py`, with the rows that it compares."""
    if (record["target"], record["seed"]) != ("sketch", 0):
        return {}
    return {row: record["rows"][row] for row in ("zero-shot", "lora", "ha-lora+dig")}


def places(record: dict) -> dict:
    """ldfs: both targets of tiny-waterbirds."""
    rows = {}
    for row, numbers in record["rows"].items():
        rows[row] = {place: numbers[f"target/{place}"] for place in ("water", "land")}
    return rows


def synthesised(record: dict) -> dict:
    """ldfs: measures of the features that each row was trained on."""
    return record["extra"]["synthesised"]


def interference(record: dict) -> dict:
    """headpurify: |cosine| between the low-rank updates of two heads, averaged over layers."""
    rows = {}
    for row, cosines in headpurify.by_layer(record).items():
        rows[row] = {"|cosine|": float(np.mean([*cosines.values()]))}
    return rows


def drop(record: dict) -> dict:
    """headpurify: accuracy on the target by the order and the number of dropped heads."""
    return head_study.by_dropped(record, "target")


def heads(record: dict) -> dict:
    """vit_diverse: accuracy of single heads, and how similar the heads of one network are."""
    rows = {}
    for row, extra in record["extra"].items():
        if "robust" not in extra:
            continue
        correlation = np.array(extra["correlation"])  # (H, H), 1 on the diagonal
        pairs = ~np.eye(len(correlation), dtype=bool)
        rows[row] = {
            "best robust": max(extra["robust"]),
            "mean robust": float(np.mean(extra["robust"])),
            "most spurious": max(extra["spurious"]),
            "|correlation|": float(np.abs(correlation[pairs]).mean()),
            "|cosine| before": extra["cosine before"],
            "|cosine| after": extra["cosine after"],
        }
    return rows


def budget(record: dict) -> dict:
    """vit_diverse: OOD accuracy with heads chosen on n labelled OOD images, mean over draws."""
    rows = {}
    for row, accuracies in vit_diverse.by_budget(record).items():
        rows[row] = {"all heads": record["rows"][row.replace("+sel", "")]["ood"]}
        for n, accuracy in accuracies.items():
            rows[row][f"n = {n}"] = accuracy
        rows[row]["all of val_ood"] = record["rows"][row]["ood"]
    return rows


# ---------- tables.md ----------------------------------------------------------------------------
LISTED = json.loads((ASSETS / "tables.json").read_text())
RECORDS = LISTED["records"]  # {record: differences that a text mentions, "row - other"}
VIEWS = LISTED["views"]  # [[record, title, a view above, differences]]
VIEW_FUNCTIONS = (first_run, places, synthesised, interference, drop, heads, budget)
VIEW_OF = {view.__name__: view for view in (*VIEW_FUNCTIONS, head_study.correlations)}


def read_records(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["records"]


def difference_table(pairs: list[str], columns: dict[str, tuple]) -> str:
    """A row for each pair, "row - other"; columns as those of `tables`."""
    rows = {}
    for pair in pairs:
        row, other = pair.split(" - ")
        cells = [tables.difference(runs, row, other, name) for runs, name in columns.values()]
        rows[pair] = cells
    return tables.format_table("difference", [*columns], rows)


def accuracy_tables(name: str) -> list[str]:
    """The tables that the command of a record prints, and differences between rows."""
    records = read_records(name)
    dataset = name[name.find("tiny-") :] if "tiny-" in name else name
    measure = tables.main_measure(records)
    columns = tables.measure_columns(records)
    texts = [tables.table(f"{dataset}, %", records, measure if len(records) > 1 else None)]
    if len(tables.targets_of(records)) > 1:
        texts.append(tables.target_table(f"{dataset}, {measure}, %", records, measure))
        for target, column in tables.target_columns(records, measure).items():
            columns[f"{measure}/{target}"] = column
        del columns[f"{measure}/average"]  # which is the column `measure`
    if RECORDS[name]:
        texts.append(difference_table(RECORDS[name], columns))
    return texts


def view_tables(name: str) -> list[str]:
    """Other numbers of the same runs, and their differences."""
    texts = []
    for record_name, title, view, pairs in VIEWS:
        if record_name != name:
            continue
        records = [{**record, "rows": VIEW_OF[view](record)} for record in read_records(name)]
        records = [record for record in records if record["rows"]]
        texts.append(tables.table(title, records))
        if pairs:
            texts.append(difference_table(pairs, tables.measure_columns(records)))
    return texts


def all_tables() -> str:
    """The text of tables.md: a section for each record."""
    parts = [TABLES_INTRODUCTION]
    for name in RECORDS:
        parts.append(f"## {name}\nFrom [{name}.json]({name}.json).\n")
        for table in accuracy_tables(name) + view_tables(name):
            parts.append(f"```text\n{table}\n```\n")
    return "\n".join(parts)


# ---------- ledger.md ----------------------------------------------------------------------------
def published() -> list[dict]:
    """The papers' tables as they print them, each with the command of ours that reproduces it.

    Returns: [{"script", "paper", "table", "name", "command", "sets", "columns": [[data set,
        measure, target if one is meant]], "rows": {name: {"ours": row, "accuracy": [%],
        "deviation": [%] if printed}}, "deviations": of ours from the paper's protocol}].
    """
    return json.loads((ASSETS / "published.json").read_text())


def summary_file(table: dict, dataset: str) -> str:
    return f"benchmark-{table['script']}-{table['name']}-{dataset}.json"


def commands(table: dict) -> list[str]:
    """The command line for each data set of a published table."""
    lines = []
    for dataset in table["sets"]:
        flags = table["command"].replace("{set}", dataset)
        summary = f"results/{summary_file(table, dataset)}"
        lines.append(f"python {table['script']}.py {flags} --summary {summary}")
    return lines


def our_records(table: dict, folder: Path) -> dict[str, list[dict]]:
    """{data set: records} of the data sets that have been run, and their "average" if all have."""
    records = {}
    for dataset in table["sets"]:
        path = folder / summary_file(table, dataset)
        if path.exists():
            records[dataset] = json.loads(path.read_text())["records"]
    if len(records) == len(table["sets"]):
        records["average"] = tables.average_records(records)
    return records


def our_number(by_dataset: dict, row: str, dataset: str, measure: str, target=None) -> str:
    """Mean and deviation over seeds of one column, for one target or the average of all."""
    records = by_dataset.get(dataset, [])
    if target:
        records = [record for record in records if record["target"] == target]
    return tables.percent(tables.seed_means(records, row, measure)) if records else NOT_RUN


def published_numbers(row: dict) -> list[str]:
    numbers = ["-" if accuracy is None else str(accuracy) for accuracy in row["accuracy"]]
    if "deviation" in row:
        numbers = [f"{x} ± {deviation}" for x, deviation in zip(numbers, row["deviation"])]
    return numbers


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ledger_section(table: dict, folder: Path) -> str:
    """One table of a paper: commands, numbers, deviations."""
    by_dataset = our_records(table, folder)
    titles = []
    for dataset, *parts in table["columns"]:
        parts = parts[::-1] if len(table["sets"]) == 1 else [dataset, *parts]
        titles.append(", ".join(part for part in parts if part != "target"))
    lines = [markdown_row(["", *titles]), "|---" * (len(titles) + 1) + "|"]
    for name, row in table["rows"].items():
        ours = [our_number(by_dataset, row["ours"], *column) for column in table["columns"]]
        lines.append(markdown_row([f"**{name}**, published", *published_numbers(row)]))
        lines.append(markdown_row([f"ours, `{row['ours']}`", *ours]))
    shell = "\n".join(commands(table))
    numbers = "\n".join(lines)
    text = f"### {table['table']}\n```bash\n{shell}\n```\n\n{numbers}\n"
    return f"{text}\nKnown deviations: {table['deviations']}\n"


def ledger(folder: Path = RESULTS) -> str:
    """The text of ledger.md, with our numbers from the benchmark records in `folder`."""
    parts, paper = [LEDGER_INTRODUCTION], ""
    for table in published():
        if table["paper"] != paper:
            paper = table["paper"]
            parts.append(f"## {paper}\n")
        parts.append(ledger_section(table, folder))
    return "\n".join(parts)


# ---------- assets/tiny_world.png ----------------------------------------------------------------
def draw_contact_sheet() -> None:
    """A column for each thing and two rows for each domain: above as the tiny CLIP was pretrained
    on it, below as the tiny sets show it."""
    names = (*tiny_world.OFFICE_CLASSES, *tiny_world.WATERBIRD_CLASSES)
    kinds = list(tiny_world.BACKGROUNDS)
    poses = {"pretraining": tiny_world.PRETRAINING_POSE, "task": tiny_world.TASK_POSE}
    rows = {}
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        rng = tiny_world.tiny_rng(1000, "contact sheet", domain)
        for index, (label, pose) in enumerate(poses.items()):
            backgrounds = [kinds[(i + 3 * index) % len(kinds)] for i in range(len(names))]
            colors = tiny_world.random_colors(rng, len(names))
            images = tiny_world.draw(names, domain, backgrounds, colors, rng, pose)
            rows[f"{domain}\n{label}"] = list(images.permute(0, 2, 3, 1))  # (h, w, 3) each
    tables.plot_images(rows, ASSETS / "tiny_world.png", titles=names)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", action="store_true", help="draw assets/tiny_world.png too")
    pictures = parser.parse_args().pictures
    (RESULTS / "tables.md").write_text(all_tables())
    (RESULTS / "ledger.md").write_text(ledger())
    print("wrote results/tables.md and results/ledger.md")
    if pictures:
        draw_contact_sheet()
        print("wrote assets/tiny_world.png")


if __name__ == "__main__":
    main()
