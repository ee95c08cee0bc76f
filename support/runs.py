"""What every command needs: flags, rows with settings of their own, a run's folder, errors.

A *row* of a table is a name with settings behind it: `ha-lora+dig/alpha=3`. A *run* is one target
and seed. It leaves a *record* in its result.json: {"target", "seed", "rows": {row: {measure: number
in [0, 1]}}, "extra"}.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from support import InputError, did_you_mean, reason, slug, why_not_loaded
from support.parallel import init_process_group, local_rank, rank, world_size


# ---------- Flags --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of all flags."""

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def at_least(low: float, number: Callable = int, most: float = 1e30) -> Callable:
    """The type of a flag: a number from `low` to `most`, whole unless `number` is float."""

    def read(text: str):
        try:
            value = number(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not low <= value <= most:
            kind = "a whole number" if number is int else "a number"
            limit = f", at most {most:.10g}" if value is not None and value > most else ""
            raise argparse.ArgumentTypeError(f"must be {kind}, at least {low}{limit}, got {text}")
        return value

    return read


def positive(text: str) -> float:
    """The type of a flag: a finite number above 0."""
    value = at_least(0, float)(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def data_set(names: list[str]) -> Callable:
    """The type of a flag: one of these data sets, or folder:PATH where they have domains."""

    def read(text: str) -> str:
        if text in names or ("pacs" in names and text.startswith("folder:")):
            return text
        hint = f"{did_you_mean(text, names)} Choose from {', '.join(names)}."
        raise argparse.ArgumentTypeError(f"unknown data set {text!r}{hint}")

    return read


ONE_PLACE = "{} once, where the name goes, and no other brace"


def has_one_place(text: str) -> bool:
    """Whether a text has exactly one {} and no other brace, which `str.format` would act on."""
    rest = text.replace("{}", "", 1)
    return rest != text and "{" not in rest and "}" not in rest


def template(text: str) -> str:
    """The type of a flag: a prompt with a place for a name, or `ensemble`."""
    if text != "ensemble" and not has_one_place(text):
        raise argparse.ArgumentTypeError(f"a template needs {ONE_PLACE}, got {text!r}")
    return text


def flag(parser, name: str, kind, default, text: str) -> None:
    """Add the flag --name to a parser or a group of one.

    kind: a function that reads a value, a tuple of choices, [kind] for several values, or bool for
    a switch.
    """
    options = {"help": text.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(f"--{name}", action="store_true", **options)
        return
    if default is not None:
        options["help"] += " (default: %(default)s)"
    if isinstance(kind, tuple):
        options["choices"] = kind
    elif isinstance(kind, list):
        options |= {"type": kind[0], "nargs": "+", "metavar": "X"}
    else:
        options |= {"type": kind, "metavar": "X"}
    parser.add_argument(f"--{name}", default=default, **options)


def command_parser(script: str, doc: str, method: Parser, datasets, rows, modes, studies) -> Parser:
    """The parser of a script's command line.

    Args:
        script, doc: the script's name and docstring.
        method: a parser of the method's own flags, which rows may set too.
        datasets: names for --dataset, the default first.
        rows, modes, studies: names of all rows; the default rows; {study: its rows}.
    """
    form = functools.partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=26)
    options = {"description": doc, "formatter_class": form, "allow_abbrev": False}
    options["usage"] = f"python {script}.py [--flag value ...]"
    parser = Parser(parents=[method], **options)
    parser.set_defaults(script=script)
    data = parser.add_argument_group("rows and data")
    names = ", ".join(datasets) + " or folder:PATH" * ("pacs" in datasets)
    flag(data, "dataset", data_set(datasets), datasets[0], names)
    compared = data.add_mutually_exclusive_group()
    text = f"rows of the table: {', '.join(rows)}; each may have settings of its own, as in "
    text += f"{modes[-1]}/lr=1e-3; the last one is exported (default: {' '.join(modes)})"
    compared.add_argument("--modes", nargs="+", metavar="ROW", default=modes, help=text)
    text = "a comparison of the paper in place of --modes; it writes results/SCRIPT-STUDY-....json"
    compared.add_argument("--study", choices=studies, help=text)
    seed = at_least(0, most=10**9)  # generators use 1000 * seed + 0, 1, ...
    data.add_argument("--seeds", "--seed", type=seed, nargs="+", default=[0], metavar="SEED")
    share = at_least(0, float, most=1)
    flag(data, "cue", share, None, "tiny data: share of images on their class's own background")
    run = parser.add_argument_group("model, device, output")
    flag(run, "data-root", str, "data", "folder that holds the benchmarks' folders")
    text = "tiny (default of tiny data), a name of open_clip (default: ViT-B-16), hf-hub:ORG/NAME "
    flag(run, "model", str, None, text + "or local-dir:PATH")
    flag(run, "pretrained", str, None, "tag or file (OpenAI's weights in a FILE: NAME-quickgelu)")
    flag(run, "device", str, "auto", "auto, cpu, cuda, cuda:1 or mps")
    flag(run, "precision", ("auto", "fp32", "bf16", "fp16"), "auto", "auto: bf16 where a GPU can")
    flag(run, "workers", at_least(0, most=1024), None, "processes that read images (one a core)")
    flag(run, "output", Path, Path("runs"), "folder of all runs")
    flag(run, "summary", Path, None, "also write the records of all runs to this JSON file")
    flag(run, "resume", bool, False, "keep finished runs and continue interrupted ones")
    flag(run, "figures", bool, False, "draw more pictures into the runs' folders")
    return parser


def read_command(parser: Parser, preset: Callable, studies: dict, argv=None) -> argparse.Namespace:
    """Parse a command line. Nothing is loaded yet.

    preset(args): {flag: default} of flags that depend on the data set, the model or the task.
    Raises: InputError for values that make no sense.
    """
    dataset = parser.parse_args(argv).dataset
    tiny = dataset.startswith("tiny-")
    parser.set_defaults(model="tiny" if tiny else "ViT-B-16")
    parser.set_defaults(workers=0 if tiny else cores(), cue=0.4)
    parser.set_defaults(**preset(parser.parse_args(argv)))
    args = parser.parse_args(argv)
    if len({*args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds: one is given twice, {' '.join(map(str, args.seeds))}")
    if args.study:
        args.modes = studies[args.study]
        parts = args.script, args.study, slug(dataset), getattr(args, "task", None)
        name = "-".join(part for part in parts if part)
        args.summary = args.summary or Path("results", f"{name}.json")
    if args.summary and (args.summary.is_dir() or not os.access(args.summary.parent, os.W_OK)):
        raise InputError(f"--summary {args.summary}: give a file in a folder that can be written")
    args.device, args.precision = pick_device(args.device, args.precision)
    return args


def read_row(parser: Parser, args: argparse.Namespace, rows: dict, text: str):
    """A row's settings: the command's, then what makes it this row, then its own.

    Raises: InputError for an unknown name or setting.
    """
    name, *own = text.split("/")
    if name not in rows:
        hint = did_you_mean(name, rows)
        raise InputError(f"--modes: no row {name!r}{hint} Choose from {', '.join(rows)}.")
    tokens = [*rows[name].split(), *(f"--{setting}" for setting in own)]
    try:
        return parser.parse_args(tokens, argparse.Namespace(**vars(args), name=text))
    except InputError as error:
        raise InputError(f"--modes {text}: {error}") from None


def cores() -> int:
    """Cores that this process may use, at most 16; shared by torchrun's ranks on this machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def pick_device(name: str, precision: str) -> tuple[torch.device, str]:
    """--device and --precision without "auto". Raises: InputError for what is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        hint = "use auto, cpu, cuda, cuda:1 or mps"
        raise InputError(f"--device {name!r} cannot be used ({reason(error)}); {hint}") from None
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "fp32"
    if device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32 where half precision would be too coarse
    return device, precision


# ---------- Files --------------------------------------------------------------------------------
def write_file(path, save: Callable) -> None:
    """Write a file whole or not at all: `save` is given another name to write under, whose file
    then takes the place of `path`. Only rank 0 writes.

    Raises: InputError if it cannot be written, say on a full disk; the file before stays.
    """
    if rank():
        return
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        raise InputError(f"cannot write {path}: {reason(error)}") from None
    finally:
        remove(partial)


def write_json(path, value) -> None:
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_file(path, lambda partial: partial.write_text(text))


def write_tensors(path, value) -> None:
    """`torch.save`, into an open file: it would put the name of its file into what it writes."""

    def save(partial):
        with open(partial, "wb") as file:
            torch.save(value, file)

    write_file(path, save)


def remove(path: Path) -> None:
    """Remove a file if it is there. Only rank 0 does."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # another process may have removed it
            path.unlink()


# ---------- A run --------------------------------------------------------------------------------
NOT_OF_A_RUN = (  # what changes where and how a run goes, but none of its numbers
    "data_root device workers output resume seeds target source summary figures download study"
).split()


class Run:
    """One target and seed: a folder, and what was recorded so far.

    The folder is OUTPUT/SCRIPT/[STUDY/]DATASET-[LABEL-]TARGET-seedSEED. It holds checkpoint.pt
    until the run is finished, and result.json from then on. With --resume a finished run is read,
    and an interrupted one goes on from its checkpoint to the same numbers; without, both files are
    removed first.

    Attributes: record; state: what training continues from, see `save`; finished.
    Raises: InputError if --resume finds a run with other settings.
    """

    def __init__(self, args, target: str, seed: int, label: str = ""):
        name = "-".join(part for part in (args.dataset, label, target, f"seed{seed}") if part)
        self.folder = args.output / args.script / (args.study or "") / slug(name)
        settings = {key: value for key, value in vars(args).items() if key not in NOT_OF_A_RUN}
        settings |= {"target": target, "seed": seed}
        self.settings = json.loads(json.dumps(settings, default=str))
        self.record = {"target": target, "seed": seed, "rows": {}, "extra": {}}
        self.state = {}
        self.finished = False
        self.result = self.folder / "result.json"
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume:
            self.load()
        else:
            remove(self.result)
            remove(self.checkpoint)

    @property
    def rows(self) -> dict[str, dict]:
        return self.record["rows"]

    @property
    def extra(self) -> dict:
        return self.record["extra"]

    def add(self, row: str, metrics: dict[str, float], extra: dict | None = None) -> None:
        """A row is finished: print its numbers in [0, 1] as %, and keep them."""
        self.rows[row] = metrics
        if extra:
            self.extra.setdefault(row, {}).update(extra)
        shown = [f"{name} {100 * x:.1f}" for name, x in metrics.items() if "/" not in name]
        print(f"{row}: {', '.join(shown)} %", flush=True)
        self.save(self.state)

    def save(self, state: dict) -> None:
        """Replace the checkpoint. state: tensors and numbers from which training continues."""
        self.state = state
        checkpoint = {"settings": self.settings, "record": self.record, "state": state}
        write_tensors(self.checkpoint, checkpoint)

    def finish(self) -> None:
        """Write result.json, after which the checkpoint is not needed any more."""
        self.record = json.loads(json.dumps(self.record))
        write_json(self.result, {"settings": self.settings, **self.record})
        remove(self.checkpoint)

    def load(self) -> None:
        """Fill this run with a finished or an interrupted one, if there is one."""
        file = self.result if self.result.exists() else self.checkpoint
        if not file.exists():
            return
        try:
            if file == self.result:
                record = json.loads(file.read_text())
                saved = {"settings": record.pop("settings"), "record": record, "state": {}}
            else:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            record, settings, state = saved["record"], saved["settings"], saved["state"]
        except Exception as error:  # a file of another kind can raise anything
            hint = "remove it, or leave --resume out"
            raise InputError(
                f"--resume: cannot read {file}: {why_not_loaded(error)}; {hint}"
            ) from None
        changes = []
        for key, value in self.settings.items():
            if settings.get(key) != value:
                changes.append(f"{key} {settings.get(key)!r}, now {value!r}")
        if changes:
            hint = "give those, or leave --resume out to start anew"
            raise InputError(f"--resume: {file} has other settings ({'; '.join(changes)}); {hint}")
        self.record, self.state = record, state
        self.finished = file == self.result
        if self.finished:
            remove(self.checkpoint)  # which a kill may have left
        print(f"--resume: found {file}", flush=True)


# ---------- Training -----------------------------------------------------------------------------
def check_finite(loss: torch.Tensor, where: str, lr: float) -> None:
    """Raises: InputError if a loss is not finite; once one loss is nan, all later ones are. It is
    called before an evaluation only: asking a GPU for a number waits for all work it still has."""
    if not loss.isfinite():
        raise InputError(f"{where}: the loss is {loss.item()} at learning rate {lr:.3g}; lower it")


def compiled(module: nn.Module, wanted: bool) -> nn.Module:
    """With --compile a module that computes the same from the same weights in fewer kernels, else
    the module itself. Only calls of the result are compiled; no hook may be set during them."""
    if not wanted:
        return module
    torch.compiler.reset()  # earlier compilations count towards a limit
    torch._functorch.config.donated_buffer = False  # two losses: one graph, two backward passes
    return torch.compile(module)


# ---------- A script as a command ----------------------------------------------------------------
def command(main: Callable) -> None:
    """Run a script's `main`. An `InputError` becomes one line and exit status 2."""
    try:
        init_process_group()
        main()
    except InputError as error:
        message = str(error).rsplit("InputError: ", 1)[-1]  # from a worker with its traceback
        print("error:", message.strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
