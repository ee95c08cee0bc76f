"""The commands, names and links of README.md and results/README.md are right. (Numbers and tables:
test_results.py.)"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from support.runs import NOT_OF_A_RUN

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
SCRIPTS = ("headpurify", "clipood", "ldfs", "vit_diverse")


def commands(text):
    """The lines of a text's bash blocks; of `a && b` the last."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    lines = [line.split("#")[0].split("&&")[-1].strip() for line in lines]
    return [line for line in lines if line]


COMMANDS = list(dict.fromkeys(sum(map(commands, TEXTS.values()), [])))
STARTS = tuple(f"python {script}.py" for script in SCRIPTS)
OF_SCRIPTS = [line for line in COMMANDS if line.startswith(STARTS)]


def test_the_front_page_is_short_and_has_the_two_commands():
    text = TEXTS["README.md"]
    assert len(text.encode()) <= 15_000
    for command in ("python headpurify.py", "pytest"):
        assert f"pip install -r requirements.txt && {command}\n" in text
    assert "python headpurify.py --dataset pacs --target sketch" in commands(text)


@pytest.mark.parametrize("command", OF_SCRIPTS)
def test_commands_are_understood(command, settings_of):
    """And where one writes records, those that are committed were made with the same settings."""
    args = settings_of(command)
    if "folder:" in command or not args.summary:
        return
    stored = json.loads((ROOT / args.summary).read_text())
    records = stored["records"]
    rows = [row.replace("prompt=file", "prompt=promptstyler") for row in records[0]["rows"]]
    assert rows == list(args.rows)
    assert list(dict.fromkeys(record["seed"] for record in records)) == args.seeds
    not_compared = (*NOT_OF_A_RUN, "modes", "descriptions", "class_features")
    for key, value in vars(args).items():
        if key in stored["settings"] and key not in not_compared:
            assert stored["settings"][key] == value, f"made with another --{key}"


def test_other_commands_exist():
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "python" and line not in OF_SCRIPTS:
            files = (words[1], "headpurify.py", "support/runs.py")
            source = "".join((ROOT / file).read_text() for file in files)
            named = words[2:] if "bench" in words[1] else re.findall(r" --(\S+)", line)
            assert all(re.search(rf'"(--)?{word}"', source) for word in named), line


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


def test_the_loop_of_the_front_page_is_the_code():
    (loop,) = re.findall(r"```python\n(for step.*?)```", TEXTS["README.md"], re.S)
    lines = [line.strip() for line in loop.splitlines()]
    code = [line.strip() for line in (ROOT / "headpurify.py").read_text().splitlines()]
    start = code.index(lines[0])
    assert code[start : start + len(lines)] == lines


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for path in re.findall(r"\]\((?!http)(.*?)(?:#.*)?\)", text):
            assert ((ROOT / name).parent / path).exists(), path
