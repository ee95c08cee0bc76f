"""Run notebooks from a clean kernel and keep what they show, in place.

python notebooks/run.py                        # all six
python notebooks/run.py 02_clipood             # one of them
"""

from __future__ import annotations

import argparse
import base64
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(notebook, folder, more: dict[str, str] | None = None) -> tuple[float, dict]:
    """Run all cells in a clean kernel that starts in a folder; then more code in the same kernel.

    Args: more: {name: code}. Returns: the seconds of the notebook; {name: its outputs}.
    Raises: CellExecutionError at the first cell that stops.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    own = list(notebook.cells)
    extra = {name: nbformat.v4.new_code_cell(code) for name, code in (more or {}).items()}
    notebook.cells = [*own, *extra.values()]
    start = time.perf_counter()
    try:
        with client.setup_kernel():
            for place, cell in enumerate(own):
                client.execute_cell(cell, place)
            seconds = time.perf_counter() - start
            for place, cell in enumerate(extra.values(), start=len(own)):
                client.execute_cell(cell, place)
    finally:
        notebook.cells = own
    keep_readable(notebook)
    return seconds, {name: cell.outputs for name, cell in extra.items()}


def keep_readable(notebook) -> None:
    """Take out progress bars, which no page shows, and what differs from run to run."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def tagged(notebook, start: str) -> dict:
    """{tag: cell} of the cells with a tag that starts so."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(start):
                found[tag] = cell
    return found


def with_value(source: str, name: str, value: str) -> str:
    """A cell's code with another value in its line `name = ...`."""
    changed, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"no single line {name!r} = ... in {source!r}")
    return changed


def write_cover(notebook, path: Path) -> None:
    """The last picture of the cell tagged "cover", for the list of notebooks."""
    pictures = []
    for output in tagged(notebook, "cover")["cover"].outputs:
        if "image/png" in output.get("data", {}):
            pictures.append(output["data"]["image/png"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(pictures[-1]))


def answer_of(cell) -> str:
    """The code in an answer's collapsed text."""
    return re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args().names or names
    for name in chosen:
        path = HERE / f"{name.removesuffix('.ipynb')}.ipynb"
        if not path.exists():
            parser.error(f"there is no notebook {name!r}; there are {', '.join(names)}")
        notebook = nbformat.read(path, as_version=4)
        seconds, _ = run(notebook, HERE)
        nbformat.write(notebook, path)
        write_cover(notebook, HERE / "pictures" / f"{path.stem}.png")
        print(f"{path.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
