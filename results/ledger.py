"""Write ledger.md: every published number that a command here can reproduce, beside ours.

    python results/ledger.py

Published numbers, commands and known deviations are data, assets/published.json. A command writes
its records to results/benchmark-....json; where one is there, its numbers are taken from it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from support.report import average_records

FOLDER = Path(__file__).resolve().parent
MISSING = "not run yet"
INTRODUCTION = f"""# The ledger: published numbers, and ours

Written by `python results/ledger.py` from `assets/published.json` and the records in this folder.
Accuracies in %, as the papers print them; `-` is a number that is not known here. *{MISSING}*
means: needs data and a GPU. Run a command from the root of the repository, then the script above
again.

LDFS has no table here: none of its published numbers is known to us yet. CLIPood's rows ERM, MIRO
and DPL, and CLIPStyler's pictures in LDFS, are other methods, which no command of ours runs.
"""


def record_file(table: dict, dataset: str) -> str:
    return f"benchmark-{table['script']}-{table['name']}-{dataset}.json"


def commands(table: dict) -> dict[str, str]:
    """{data set: the whole command line}."""
    lines = {}
    for dataset in table["sets"]:
        own = table["command"].replace("{set}", dataset)
        summary = f"results/{record_file(table, dataset)}"
        lines[dataset] = f"python {table['script']}.py {own} --summary {summary}"
    return lines


def read_records(table: dict, folder: Path) -> dict[str, list[dict]]:
    """{data set: records} of those that have been run."""
    found = {}
    for dataset in table["sets"]:
        path = folder / record_file(table, dataset)
        if path.exists():
            found[dataset] = json.loads(path.read_text())["records"]
    return found


def our_number(found: dict, table: dict, row: str, column: list[str]) -> str:
    """A cell: mean and deviation over seeds. column: data set or "average", measure and, where one
    is meant, the target."""
    dataset, measure, *target = column
    records = found.get(dataset, [])
    if dataset == "average" and len(found) == len(table["sets"]):
        records = average_records(found)
    if target:
        (wanted,) = map(common.plain, target)
        records = [record for record in records if common.plain(record["target"]) == wanted]
    if not records:
        return MISSING
    return common.percent(common.seed_means(records, row, measure))


def published_number(numbers: dict, place: int) -> str:
    accuracy = numbers["accuracy"][place]
    if accuracy is None:
        return "-"
    deviation = f" ± {numbers['deviation'][place]}" if "deviation" in numbers else ""
    return f"{accuracy}{deviation}"


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def section(table: dict, folder: Path) -> str:
    """One table of a paper: commands, numbers, deviations."""
    found = read_records(table, folder)
    titles = []
    for dataset, measure, *target in table["columns"]:
        one_set = len(table["sets"]) == 1
        parts = [*target, measure] if one_set else [dataset, measure]
        titles.append(", ".join(part for part in parts if part != "target"))
    lines = [markdown_row(["", *titles]), "|---" * (len(titles) + 1) + "|"]
    for name, numbers in table["rows"].items():
        theirs = [published_number(numbers, place) for place in range(len(titles))]
        ours = [our_number(found, table, numbers["ours"], column) for column in table["columns"]]
        lines.append(markdown_row([f"**{name}**, published", *theirs]))
        lines.append(markdown_row([f"ours, `{numbers['ours']}`", *ours]))
    shell = "\n".join(commands(table).values())
    numbers = "\n".join(lines)
    text = f"### {table['table']}\n```bash\n{shell}\n```\n\n{numbers}\n"
    return f"{text}\nKnown deviations: {table['deviations']}\n"


def ledger(folder: Path = FOLDER) -> str:
    parts, paper = [INTRODUCTION], None
    for table in common.published():
        if table["paper"] != paper:
            paper = table["paper"]
            parts.append(f"## {paper}\n")
        parts.append(section(table, folder))
    return "\n".join(parts)


def main():
    (FOLDER / "ledger.md").write_text(ledger())
    print("wrote results/ledger.md")


if __name__ == "__main__":
    main()
