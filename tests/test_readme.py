"""README.md and results/README.md say what the code does and what the committed records hold."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import common
from results import tables

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text() for name in tables.TEXTS}
SCRIPTS = ("headpurify", "clipood", "ldfs", "vit_diverse")


def committed(ending):
    """Names of files in results/, where git tells without those that a study has written since."""
    done = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    paths = map(Path, done.stdout.split()) if done.stdout else (ROOT / "results").iterdir()
    found = [ROOT / "results" / path.name for path in paths]
    return sorted(path.name for path in found if path.suffix == ending and path.exists())


def commands(text):
    """The lines of a text's bash blocks; of `a && b` the last."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    lines = [line.split("#")[0].split("&&")[-1].strip() for line in lines]
    return [line for line in lines if line]


RECORDS = [name for name in committed(".json") if not name.startswith("benchmark-")]
COMMANDS = list(dict.fromkeys(sum(map(commands, TEXTS.values()), [])))
STARTS = tuple(f"python {script}.py" for script in SCRIPTS)
OF_SCRIPTS = [line for line in COMMANDS if line.startswith(STARTS)]


def test_the_front_page_is_short_and_has_the_two_commands():
    text = TEXTS["README.md"]
    assert len(text.encode()) <= 15_000
    for command in ("python headpurify.py", "pytest"):
        assert f"pip install -r requirements.txt && {command}\n" in text
    assert "python headpurify.py --dataset pacs --target sketch" in commands(text)


FROM_NOTEBOOKS = {"together-tiny-pacs.json": "05_together"}  # records, and what writes them


@pytest.mark.parametrize("name", TEXTS)
def test_tables_and_numbers_are_those_of_the_records(name):
    """`python results/tables.py` would change nothing."""
    assert tables.renewed(TEXTS[name]) == TEXTS[name]
    markers = re.findall(r"<!-- (\w+)", TEXTS[name])
    assert markers.count("end") == len(markers) / 2 > 5
    # a comment at the start of a line would end the sentence it stands in
    assert not re.search(r"^\s*<!-- (value|gain)", TEXTS[name], re.M)


@pytest.mark.parametrize("name", RECORDS)
def test_every_file_of_records_is_shown_and_has_a_command(name):
    text = TEXTS["results/README.md"]
    assert re.search(rf"<!-- (table|targets): \S*{re.escape(name)}", text)
    stored = json.loads((ROOT / "results" / name).read_text())
    assert set(stored) == {"settings", "records"}
    for record in stored["records"]:
        assert set(record) == {"target", "seed", "rows", "extra"}
        assert list(record["rows"]) == list(stored["records"][0]["rows"])
        for numbers in record["rows"].values():
            assert all(0 <= number <= 1 for number in numbers.values())


@pytest.mark.parametrize("command", OF_SCRIPTS)
def test_commands_are_understood(command, settings_of):
    """And where one writes records, those that are committed were made with the same settings."""
    args = settings_of(command)
    if "folder:" in command or not args.summary:
        return
    stored = json.loads((ROOT / args.summary).read_text())
    records = stored["records"]
    assert list(records[0]["rows"]) == list(args.rows)
    assert list(dict.fromkeys(record["seed"] for record in records)) == args.seeds
    for name, *_ in [*args.method.settings, *args.more, ("cue",)]:
        key = name.replace("-", "_")
        if key in stored["settings"] and name != "descriptions":  # words.json adds to them
            assert stored["settings"][key] == getattr(args, key), f"made with another --{name}"


def test_every_file_of_records_comes_from_a_command(settings_of):
    written = [settings_of(command).summary for command in OF_SCRIPTS]
    names = [path.name for path in written if path]
    for name, notebook in FROM_NOTEBOOKS.items():
        assert name in (ROOT / "notebooks" / f"{notebook}.ipynb").read_text()
    assert sorted([*names, *FROM_NOTEBOOKS]) == RECORDS


def test_other_commands_exist():
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "python" and line not in OF_SCRIPTS:
            source = (ROOT / words[1]).read_text()
            named = words[2:] if "bench" in words[1] else re.findall(r" (--\S+)", line)
            assert all(f'"{word}"' in source for word in named), line


@pytest.mark.parametrize("row", ["ha-lora+dig/mmd-grad=both", "mms+bma/margin=0.5", "erm+sel"])
def test_rows_of_the_front_page_are_rows(row, settings_of):
    assert f"`{row}`" in TEXTS["README.md"]
    found = [name for name in SCRIPTS if row.split("/")[0] in importlib.import_module(name).ROWS]
    (script,) = found
    assert list(settings_of(f"python {script}.py --modes {row}").rows) == [row]


def test_the_map_from_paper_to_code():
    """Every name in the right column of a map stands in the file that the map is for."""
    maps = re.findall(r"^\|.*\| `(\w+\.py)` \|\n\|[-|]+\n((?:\|.*\n)+)", TEXTS["README.md"], re.M)
    assert [file for file, _ in maps] == [f"{script}.py" for script in SCRIPTS]
    for file, lines in maps:
        source = (ROOT / file).read_text()
        names = []
        for line in lines.splitlines():
            names += re.findall(r"`(\w+)`", line.split("|")[2])
        assert len(names) >= 4
        for name in names:
            assert re.search(rf"(def|class) {name}\b", source), f"{name} is not in {file}"


def test_pictures_are_there_and_shown():
    linked = set()
    for name, text in TEXTS.items():
        for path in re.findall(r"!\[[^]]+\]\((.*?)\)", text):
            linked.add(((ROOT / name).parent / path).resolve())
    assert all(path.exists() for path in linked)
    assert set(committed(".png")) <= {path.name for path in linked}


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for path in re.findall(r"\]\((?!http)(.*?)(?:#.*)?\)", text):
            assert ((ROOT / name).parent / path).exists(), path


@pytest.mark.parametrize(
    "file, row, other, measure, sign",
    [
        ("headpurify-tiny-pacs.json", "ha-lora+dig", "zero-shot", "target", 1),
        ("headpurify-tiny-pacs.json", "ha-lora+dig", "lora", "target", 0),
        ("headpurify-tiny-pacs.json", "ha-lora+dig", "full", "target", 0),
        ("headpurify-tiny-office.json", "ha-lora+dig", "full", "target", 0),
        (
            "headpurify-mmd-target-tiny-pacs.json",
            "ha-lora+dig",
            "ha-lora+dig/mmd-grad=both",
            "target",
            1,
        ),
        ("clipood-components-tiny-pacs-domain-shift.json", "mms", "linear", "target", 1),
        ("clipood-components-tiny-pacs-domain-shift.json", "mms+bma", "mms", "target", 0),
        ("clipood-components-tiny-pacs-domain-shift.json", "mms+wise-ft", "mms+bma", "target", 1),
        ("clipood-components-tiny-office-open-class.json", "mms+bma", "mms", "new", 1),
        ("clipood-components-tiny-office-open-class.json", "mms+wise-ft", "mms+bma", "H", 0),
        ("ldfs-tiny-pacs.json", "ldfs", "plain", "target", 1),
        ("ldfs-tiny-pacs.json", "ldfs", "plain", "source", 0),
        ("ldfs-tiny-pacs.json", "ldfs", "lads", "target", 1),
        ("ldfs-losses-tiny-pacs.json", "lads/temperature=clip", "lads", "target", 1),
        ("ldfs-tiny-waterbirds.json", "ldfs", "lads", "target", 1),
        ("ldfs-tiny-waterbirds.json", "zero-shot", "ldfs", "target", 1),
        ("ldfs-losses-tiny-waterbirds.json", "ldfs", "ldfs/consistency=1", "target", 1),
        ("vit_diverse-tiny-mnist-cifar.json", "erm+sel", "erm", "ood", 1),
        ("vit_diverse-tiny-mnist-cifar.json", "div+sel", "erm+sel", "ood", 0),
        ("vit_diverse-lambda-tiny-mnist-cifar.json", "div/lambda=100000", "div/lambda=0", "ood", 1),
        (
            "vit_diverse-lambda-token-tiny-mnist-cifar.json",
            "div/lambda=1",
            "div/lambda=0",
            "ood",
            1,
        ),
    ],
)
def test_words_around_the_numbers(file, row, other, measure, sign):
    """What the texts call ahead (1) is so by two standard errors, what they call level (0) not."""
    mean, error, _ = common.paired(tables.read_records(file), row, other, measure)
    assert (mean > 2 * error) == bool(sign)
    assert sign or abs(mean) <= 2 * error
