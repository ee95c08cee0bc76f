"""The ledger: its commands are understood, and numbers come from the records that they write."""

import json

import pytest

import common
from results import ledger

TABLES = common.published()
COMMANDS = [(table, line) for table in TABLES for line in ledger.commands(table).values()]


def test_it_is_written_from_the_data():
    """`python results/ledger.py` would change nothing, and names every paper with a table."""
    text = (ledger.FOLDER / "ledger.md").read_text()
    assert text == ledger.ledger()
    assert all(f"## {table['paper']}\n" in text for table in TABLES)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["table"])
def test_published_numbers_are_complete(table):
    datasets = {dataset for dataset, *_ in table["columns"]}
    assert datasets - {"average"} <= set(table["sets"])
    assert table["deviations"]
    for numbers in table["rows"].values():
        assert len(numbers["accuracy"]) == len(table["columns"])
        assert len(numbers.get("deviation", table["columns"])) == len(table["columns"])
        known = [number for number in numbers["accuracy"] if number is not None]
        assert known and all(0 < number < 100 for number in known)


@pytest.mark.parametrize("table, line", COMMANDS, ids=lambda value: str(value)[:80])
def test_commands_are_understood(table, line, settings_of):
    args = settings_of(line)
    assert args.dataset in table["sets"]
    assert args.summary.name == ledger.record_file(table, args.dataset)
    assert {numbers["ours"] for numbers in table["rows"].values()} <= set(args.rows)


def narrowed(table, row, **changes):
    """A table with one of its rows."""
    return {**table, "rows": {row: table["rows"][row]}, **changes}


def write(folder, table, dataset, records):
    path = folder / ledger.record_file(table, dataset)
    path.write_text(json.dumps({"settings": {}, "records": records}))


def record(domain, seed, row, **measures):
    return {"target": domain, "seed": seed, "rows": {row: measures}, "extra": {}}


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_our_numbers_of_domains_and_their_average(tmp_path):
    """Means over targets, then over seeds; an average only where every set was run."""
    columns = [["pacs", "target"], ["vlcs", "target"], ["average", "target"]]
    table = narrowed(TABLES[0], "CLIPood", sets=["pacs", "vlcs"], columns=columns)
    row = "| ours, `mms+bma`"
    records = [
        record("art", 0, "mms+bma", target=0.9),
        record("photo", 0, "mms+bma", target=1.0),
        record("art", 1, "mms+bma", target=0.88),
        record("photo", 1, "mms+bma", target=0.98),
    ]
    write(tmp_path, table, "pacs", records)
    # 95 and 93: mean 94, sample deviation sqrt(2)
    assert cells(ledger.section(table, tmp_path), row) == ["94.0 ± 1.4", *["not run yet"] * 2]
    others = [record("sun09", seed, "mms+bma", target=0.8) for seed in (0, 1)]
    write(tmp_path, table, "vlcs", others)
    # 87.5 and 86.5
    expected = ["94.0 ± 1.4", "80.0 ± 0.0", "87.0 ± 0.7"]
    assert cells(ledger.section(table, tmp_path), row) == expected


def test_our_numbers_of_single_targets(tmp_path):
    """A target is known by its name, however it is written."""
    (table,) = [table for table in TABLES if table["table"].endswith("Office-Home")]
    table = narrowed(table, "CLIPood")
    records = []
    for place, target in enumerate(("Art", "Clipart", "Product", "Real_World")):
        numbers = {"base": 0.5, "new": 0.25, "total": 0.1 * (place + 1)}
        records.append(record(target, 0, "mms+bma", **numbers))
    write(tmp_path, table, "officehome", records)
    found = cells(ledger.section(table, tmp_path), "| ours, `mms+bma`")
    assert found == ["50.0"] * 4 + ["25.0"] * 4 + ["10.0", "20.0", "30.0", "40.0"]
    theirs = cells(ledger.section(table, tmp_path), "| **CLIPood**, published")
    assert theirs[0] == "90.1" and theirs[-1] == "91.0"


def test_harmonic_mean_of_an_average_is_that_of_the_averages(tmp_path):
    table = narrowed(TABLES[2], "CLIP", sets=["imagenet", "dtd"])
    write(tmp_path, table, "imagenet", [record("", 0, "zero-shot", base=0.9, new=0.6, H=0.72)])
    write(tmp_path, table, "dtd", [record("", 0, "zero-shot", base=0.5, new=0.2, H=0.29)])
    found = cells(ledger.section(table, tmp_path), "| ours, `zero-shot`")
    # H of 70 and 40
    assert found == ["90.0", "60.0", "72.0", "70.0", "40.0", "50.9"]
