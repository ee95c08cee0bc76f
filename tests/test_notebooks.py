"""Notebooks run from a clean kernel, show the code that is in the files, and their exercises tell
right answers from wrong ones."""

import base64
import importlib
import io
import json
import re
import textwrap

import numpy as np
import pytest
from PIL import Image

NAMES = ["00_tiny_world", "01_headpurify", "02_clipood", "03_ldfs", "04_vit_diverse", "05_together"]
MOST_BYTES = 2_000_000
MOST_SECONDS = 2 * 180  # three minutes on two free cores; those of a test may be busy


@pytest.fixture
def committed(root, name):
    return json.loads((root / "notebooks" / f"{name}.ipynb").read_text())


def text_of(cell) -> str:
    return "".join(cell["source"])


def outputs_of(notebook):
    for cell in notebook["cells"]:
        yield from cell.get("outputs", [])


def pictures_of(outputs) -> list[np.ndarray]:
    pictures = []
    for output in outputs:
        png = output.get("data", {}).get("image/png")
        if png:
            image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            pictures.append(np.asarray(image))
    return pictures


def said(outputs) -> str:
    """All text that outputs show."""
    parts = []
    for output in outputs:
        data = output.get("data", {})
        parts.append("".join(output.get("text", data.get("text/markdown", ""))))
    return "\n".join(parts)


# ---------- As committed --------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_committed_with_outputs_small_and_clean(root, committed, name):
    path = root / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size <= MOST_BYTES
    places = []
    for cell in committed["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], f"never run: {text_of(cell)[:80]}"
            places.append(cell["execution_count"])
    assert places == list(range(1, len(places) + 1)), "not run top to bottom"
    for output in outputs_of(committed):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output
    assert len(pictures_of(outputs_of(committed))) >= 4
    assert str(root) not in path.read_text()
    assert not re.search("/(home|tmp)/", path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_notebook_shows_is_in_the_files(root, committed, name):
    files = [*root.glob("*.py"), *(root / "support").glob("*.py")]
    files = "\n".join(file.read_text() for file in files)
    shown = []
    for output in outputs_of(committed):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        shown += re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    for code in shown:
        indented = textwrap.indent(code, "    ")
        assert code in files or indented in files, f"no longer in the files:\n{code[:300]}"
    assert shown


# ---------- Run again -----------------------------------------------------------------------------
def wrong_answers(name) -> dict[str, list]:
    """{exercise: [(code in place of its cell, what must be said of it)]}, which look plausible."""
    pytest.importorskip("IPython")
    return importlib.import_module(f"notebooks.checks.{name[3:]}").WRONG


def more_code(notebook, name, tree) -> dict[str, str]:
    """What a reader does after reading: turn dials to both ends, answer, bring own pictures."""
    from notebooks.run import answer_of, tagged, with_value

    more = {}
    for tag, cell in tagged(notebook, "dial").items():
        for dial, ends in cell.metadata["dial"].items():
            for end in ends:
                more[f"{tag}, {dial} = {end}"] = with_value(cell.source, dial, end)
    for tag, cell in tagged(notebook, "answer").items():
        more[f"right {tag}"] = answer_of(cell)
    for tag, codes in wrong_answers(name).items():
        for place, (code, _) in enumerate(codes):
            more[f"wrong {tag} {place}"] = code
    for tag, cell in tagged(notebook, "own-data").items():
        code = with_value(cell.source, "FOLDER", repr(str(tree)))
        more[tag] = with_value(code, "MODEL", '"tiny"')
    return more


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory):
    """PATH/<domain>/<class>/<image>: drawn images as files."""
    import common

    folder = tmp_path_factory.mktemp("own")
    for domain in common.load_domains("tiny-pacs", seed=1):
        for place in range(0, len(domain.images), 16):
            label = domain.images.classes[domain.images.labels[place]]
            path = folder / domain.name / label / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(domain.images.picture(place)).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_a_clean_kernel(root, tree, name):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    from notebooks.run import run

    notebook = nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)
    before = [len(cell.get("outputs", [])) for cell in notebook.cells]
    more = more_code(notebook, name, tree)
    seconds, outputs = run(notebook, root / "notebooks", more)
    assert seconds < MOST_SECONDS
    for count, cell in zip(before, notebook.cells):
        now = cell.get("outputs", [])
        assert len(now) == count, f"{len(now)} outputs, committed are {count}: {cell.source[:80]}"
        assert not [out for out in now if out.get("name") == "stderr"], now
    for picture in pictures_of(outputs_of(notebook)):
        assert picture.std() > 5, "a blank picture"
    for what, found in outputs.items():
        text = said(found)
        if what.startswith("right"):
            assert "**Right.**" in text, (what, text)
        elif what.startswith("wrong"):
            _, tag, place = what.split()
            _, says = wrong_answers(name)[tag][int(place)]
            assert "**Not yet.**" in text and says in text, (what, text)
        elif what.startswith("dial"):
            assert pictures_of(found), what
        else:
            assert pictures_of(found) and "Skipped" not in text, (what, text)


@pytest.mark.parametrize("name", NAMES)
def test_three_exercises_with_answers_and_plausible_wrong_ones(committed, name):
    tags = []
    for cell in committed["cells"]:
        tags += cell["metadata"].get("tags", [])
    exercises = ["exercise-1", "exercise-2", "exercise-3"]
    answers = ["answer-1", "answer-2", "answer-3"]
    assert {*exercises, *answers, "dial", "own-data"} <= {*tags}
    assert sorted(wrong_answers(name)) == exercises
    assert all(wrong_answers(name).values())
