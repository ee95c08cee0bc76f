"""results/: tables.md and ledger.md are up to date, and the texts say what the records hold."""

import json
import re
import subprocess

import pytest

from results import write
from support import tables

ROOT = write.RESULTS.parent
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
TABLES = (write.RESULTS / "tables.md").read_text()
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", TABLES, re.M | re.S))
NUMBER = re.compile(
    r"(?<![\w.=/+-])[+-]\d+\.\d(?: \((?:se \d+\.\d, \d+ seeds|1 seed))?"  # +1.3 (se 0.8, 5 seeds
    r"|\bse \d+\.\d|(?<![\d.+-])\d+\.\d(?= (?:%|hundredths))"
)


def shown(text):
    """(what a text shows, the section of tables.md that it names or None), in two kinds: tables as
    tuples of rows, and numbers. The section is that of the next link in the same paragraph."""
    for label, address in re.findall(r"^\[(.+)\]: (\S+)$", text, re.M):
        text = text.replace(f"[{label}]", f"[{label}]({address})")
    for block in re.findall(r"```text\n(.*?)```", text, re.S):
        yield table_rows(block), None
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\|)", text):
        paragraph = " ".join(paragraph.split())
        for number in NUMBER.finditer(paragraph):
            link = re.search(r"tables\.md#([\w-]+)", paragraph[number.end() :])
            yield number[0], link and link[1]


def table_rows(block):
    """The rows of a table as text: all lines with columns."""
    return tuple(" ".join(line.split()) for line in block.splitlines() if "  " in line)


def is_there(item, section):
    if isinstance(item, tuple):
        blocks = re.findall(r"```text\n(.*?)```", TABLES, re.S)
        return any(set(item) <= set(table_rows(block)) for block in blocks)
    text = SECTIONS.get(section, "") if section else TABLES
    return re.search(rf"(?<![\d.+-]){re.escape(item)}(?!\d)", text)


@pytest.mark.parametrize("name", TEXTS)
def test_numbers_of_the_texts_stand_in_the_tables(name):
    items = list(shown(TEXTS[name]))
    assert len(items) > 4
    assert [item for item in items if not is_there(*item)] == []
    if name == "results/README.md":
        assert all(section for item, section in items if isinstance(item, str))


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("better +6.1", "better -6.1"),
        ("#headpurify-tiny-pacs", "#headpurify-tiny-office"),
        ("67.3 ± 1.2", "67.4 ± 1.2"),
    ],
)
def test_a_wrong_number_is_noticed(right, wrong):
    text = """At 57.2 % it is better +6.1 (se 0.4, 5
seeds; [table](tables.md#headpurify-tiny-pacs)).

```text
tiny-pacs-16-heads, %    hold-out      source      target         last minus this
lora                   67.3 ± 1.2  60.7 ± 1.4  55.6 ± 0.7  +0.5 (se 0.1, 5 seeds)
```
"""
    assert len(list(shown(text))) == 3 and all(is_there(*item) for item in shown(text))
    assert not all(is_there(*item) for item in shown(text.replace(right, wrong)))


AHEAD = """
headpurify-tiny-pacs                        target  ha-lora+dig - zero-shot
clipood-components-tiny-pacs-domain-shift   target  mms - linear
clipood-components-tiny-office-open-class   new     mms+bma - mms
ldfs-tiny-pacs                              target  ldfs - plain
ldfs-tiny-waterbirds                        target  ldfs - lads
vit_diverse-tiny-mnist-cifar                ood     erm+sel - erm
""".strip().splitlines()
LEVEL = """
headpurify-tiny-pacs                        target  ha-lora+dig - lora
headpurify-tiny-pacs                        target  ha-lora+dig - full
clipood-components-tiny-pacs-domain-shift   target  mms+bma - mms
ldfs-tiny-pacs                              source  ldfs - plain
vit_diverse-tiny-mnist-cifar                ood     div+sel - erm+sel
""".strip().splitlines()


@pytest.mark.parametrize("line", AHEAD + LEVEL)
def test_words_around_the_numbers(line):
    """What the texts call ahead is so by two standard errors; what they call level is not."""
    name, measure, row, _, other = line.split()
    mean, error, _ = tables.paired(write.read_records(name), row, other, measure)
    assert mean > 2 * error if line in AHEAD else abs(mean) <= 2 * error


def test_files_are_what_write_writes():
    assert write.all_tables() == TABLES
    assert write.ledger() == (write.RESULTS / "ledger.md").read_text()
    assert len(TEXTS["results/README.md"].encode()) <= 25_000


def test_every_record_is_shown_and_has_a_command(settings_of):
    assert list(write.RECORDS) == list(SECTIONS)
    command = ["git", "ls-files", "results"]  # not what a study has written since
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    stems = re.findall(r"^results/(?!benchmark-)(\S+)\.json$", listed, re.M)
    assert not listed or sorted(stems) == sorted(write.RECORDS)
    written = ["together-tiny-pacs"]  # by notebooks/05_together.ipynb
    for command in re.findall(r"^python \w.*--.*", TEXTS["results/README.md"], re.M):
        command = command.split("#")[0]
        summary = re.search(r"--summary results/(\S+)\.json", command)
        if summary:
            written.append(summary[1])
        elif "--study" in command:
            written.append(settings_of(command).summary.stem)
    assert sorted(written) == sorted(write.RECORDS)


PUBLISHED = write.published()
COMMANDS = [(table, line) for table in PUBLISHED for line in write.commands(table)]


@pytest.mark.parametrize("table, line", COMMANDS, ids=lambda value: str(value)[:80])
def test_commands_of_the_ledger_are_understood(table, line, settings_of):
    args = settings_of(line)
    assert args.summary.name == write.summary_file(table, args.dataset)
    assert {numbers["ours"] for numbers in table["rows"].values()} <= set(args.rows)


def our_cells(folder, table, name, records, **changes):
    """Our cells of one row of a published table, with the records {data set: [...]} in a folder."""
    table = {**table, **changes, "rows": {name: table["rows"][name]}}
    for dataset, runs in records.items():
        path = folder / write.summary_file(table, dataset)
        path.write_text(json.dumps({"settings": {}, "records": runs}))
    (line,) = re.findall(r"^\| ours, .*", write.ledger_section(table, folder), re.M)
    return [cell.strip() for cell in line.split("|")[2:-1]]


def run(domain, seed, row, **measures):
    return {"target": domain, "seed": seed, "rows": {row: measures}, "extra": {}}


def test_our_numbers_of_data_sets_and_their_average(tmp_path):
    """Means over targets, then over seeds; an average only where every set was run."""
    columns = [["pacs", "target"], ["vlcs", "target"], ["average", "target"]]
    changes = {"sets": ["pacs", "vlcs"], "columns": columns}
    accuracies = {("art", 0): 0.9, ("photo", 0): 1.0, ("art", 1): 0.88, ("photo", 1): 0.98}
    pacs = [run(*name, "mms+bma", target=number) for name, number in accuracies.items()]
    cells = our_cells(tmp_path, PUBLISHED[0], "CLIPood", {"pacs": pacs}, **changes)
    # 95 and 93: mean 94, sample deviation sqrt(2)
    assert cells == ["94.0 ± 1.4", "not run yet", "not run yet"]
    vlcs = [run("sun09", seed, "mms+bma", target=0.8) for seed in (0, 1)]
    cells = our_cells(tmp_path, PUBLISHED[0], "CLIPood", {"vlcs": vlcs}, **changes)
    assert cells == ["94.0 ± 1.4", "80.0 ± 0.0", "87.0 ± 0.7"]  # 87.5 and 86.5


def test_harmonic_mean_of_an_average_is_that_of_the_averages(tmp_path):
    runs = {
        "imagenet": [run("", 0, "zero-shot", base=0.9, new=0.6, H=0.72)],
        "dtd": [run("", 0, "zero-shot", base=0.5, new=0.2, H=0.29)],
    }
    cells = our_cells(tmp_path, PUBLISHED[2], "CLIP", runs, sets=list(runs))
    assert cells == ["90.0", "60.0", "72.0", "70.0", "40.0", "50.9"]  # H of 70 and 40
