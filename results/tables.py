"""Write every table and number of README.md and results/README.md anew, from the records here.

    python results/tables.py

Whatever stands between a marker and its `<!-- end -->` is written by this script; the rest of the
text is left as it is. ROW is a row of the table that a script prints, MEASURE one of its columns:

    <!-- table: FILE.json -->                         rows x measures, mean ± deviation over seeds
    <!-- table: FILE.json versus=target -->           and what the last row gains over each other
    <!-- table: FILE.json closing=target -->          and the line below it that says what it shows
    <!-- targets: FILE.json MEASURE -->               rows x targets
    <!-- value: FILE.json ROW MEASURE -->38.6         one number of these, in %
    <!-- gain: FILE.json ROW OTHER MEASURE -->+1.3 (se 0.8, 5 seeds)

A marker may end in `rows=a,b`, `measures=a,b`, `target=sketch`, `seed=0`, each of which leaves out
all the others, `title=...`, and `view=...`, a function below: other numbers of the same records.
Of several files, `a.json,b.json`, rows of the same target and seed are put together.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import headpurify
import vit_diverse
from support import head_study

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "results/README.md")
TABLE = re.compile(r"(<!-- (table|targets): (.*?) -->\n).*?(<!-- end -->)", re.S)
NUMBER = re.compile(r"(<!-- (value|gain): (.*?) -->).*?(<!-- end -->)", re.S)


# ---------- Views: numbers that lie beside the rows ----------------------------------------------
def synthesised(record: dict) -> dict:
    """ldfs: what the features are like that each row trained on."""
    return record["extra"]["synthesised"]


def interference(record: dict) -> dict:
    """headpurify: |cosine| between the low-rank updates of two heads, averaged over layers."""
    rows = {}
    for row, extra in record["extra"].items():
        if extra.get("interference"):  # only rows with low-rank updates have some
            rows[row] = {"|cosine|": float(np.mean(extra["interference"]))}
    return rows


def drop(record: dict) -> dict:
    """headpurify: accuracy on the target against the number of heads that are left out."""
    return headpurify.by_dropped(record, "target")


def carry(record: dict) -> dict:
    """headpurify: rank correlation over heads of what they carry, in hundredths."""
    return head_study.correlations(record)


def heads(record: dict) -> dict:
    """vit_diverse: single heads, and how alike the heads of one network are."""
    rows = {}
    for row, extra in record["extra"].items():
        if "robust" not in extra:
            continue
        correlation = np.array(extra["correlation"])  # (H, H), of a head with itself 1
        others = ~np.eye(len(correlation), dtype=bool)
        rows[row] = {
            "best robust": max(extra["robust"]),
            "mean robust": float(np.mean(extra["robust"])),
            "most spurious": max(extra["spurious"]),
            "|correlation|": float(np.abs(correlation[others]).mean()),
            "|cosine| before": extra["cosine before"],
            "|cosine| after": extra["cosine after"],
        }
    return rows


def budget(record: dict) -> dict:
    """vit_diverse: OOD accuracy with heads chosen on n labelled OOD images, mean of the draws."""
    rows = {}
    for row, numbers in vit_diverse.by_budget(record).items():
        rows[row] = {"all heads": record["rows"][row.replace("+sel", "")]["ood"]}
        for n, accuracy in numbers.items():
            rows[row][f"n = {n}"] = accuracy
        rows[row]["all of val_ood"] = record["rows"][row]["ood"]
    return rows


VIEWS = {view.__name__: view for view in (synthesised, interference, drop, carry, heads, budget)}


# ---------- Markers ------------------------------------------------------------------------------
OPTIONS = ("rows", "measures", "target", "seed", "title", "view", "versus", "closing")


def read_records(files: str) -> list[dict]:
    """The records of one or several files; those of the same target and seed become one."""
    records = {}  # {(target, seed): record}
    for name in files.split(","):
        for record in json.loads((ROOT / "results" / name).read_text())["records"]:
            first = records.setdefault((record["target"], record["seed"]), record)
            first["rows"] |= record["rows"]
            for row, extra in record["extra"].items():
                first["extra"].setdefault(row, {}).update(extra)
    return list(records.values())


def pick(numbers: dict, wanted: list[str]) -> dict:
    """Some measures of a row; a part, `target/land`, is asked for by its whole name."""
    return {name.split("/")[-1]: numbers[name] for name in wanted if name in numbers}


def narrow(records: list[dict], options: dict) -> list[dict]:
    """The records, rows and measures that a marker asks for, in its order."""
    chosen = []
    for record in records:
        if options.get("target", record["target"]) != record["target"]:
            continue
        if int(options.get("seed", record["seed"])) != record["seed"]:
            continue
        rows = VIEWS[options["view"]](record) if "view" in options else record["rows"]
        if "rows" in options:
            rows = {row: rows[row] for row in options["rows"].split(",")}
        if "measures" in options:
            wanted = options["measures"].split(",")
            rows = {row: pick(numbers, wanted) for row, numbers in rows.items()}
        chosen.append({**record, "rows": rows})
    return chosen


def written(kind: str, marker: str) -> str:
    """What a marker stands for, `kind: marker`."""
    files, *words = shlex.split(marker)  # quotes hold names with spaces together
    options, names = {}, []
    for word in words:
        key, _, value = word.partition("=")
        if value and key in OPTIONS:  # a row may hold a `=` too, ldfs/sigma=0.1
            options[key] = value
        else:
            names.append(word)
    records = narrow(read_records(files), options)
    title = options.get("title", re.search(r"tiny-[a-z-]+|$", files)[0] + ", %")
    if kind == "table":
        table = common.table(title, records, options.get("versus"))
        if "closing" in options:
            table += "\n\n" + common.closing_line(records, options["closing"])
        return table
    if kind == "targets":
        return common.target_table(title, records, *names)
    if kind == "value":
        return f"{100 * np.mean(common.seed_means(records, *names)):.1f}"
    return common.gain(*common.paired(records, *names))


def renewed(text: str) -> str:
    """A text with all of its tables and numbers written anew."""
    text = TABLE.sub(lambda m: f"{m[1]}```text\n{written(m[2], m[3])}\n```\n{m[4]}", text)
    return NUMBER.sub(lambda m: f"{m[1]}{written(m[2], m[3])}{m[4]}", text)


def main():
    for name in TEXTS:
        path = ROOT / name
        path.write_text(renewed(path.read_text()))
        print(f"wrote the tables of {name}")


if __name__ == "__main__":
    main()
