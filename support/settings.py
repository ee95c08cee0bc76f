"""Flags of a script, and rows of its tables that lay settings of their own over them.

A setting is a tuple (name, kind, default, default with the tiny CLIP, help). Its kind says what may
be given: a function that reads a text or refuses it, a tuple of choices, [kind] for several, bool
for a switch. A method's own settings may also be set by single rows: `lora/lr=1e-3`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support import InputError, did_you_mean, parallel, slug
from support.graphs import check_compiler
from support.profiling import EVERY, profile

# ---------- Kinds of settings ---------------------------------------------------------------------
LARGEST = 1e30  # float32 ends at 3e38, and optimizers multiply what they are given


def at_least(low: float, number: Callable = int, most: float = LARGEST) -> Callable:
    """A kind of setting: a number from `low` to `most`; whole unless `number` is float."""

    def read(text: str):
        try:
            value = number(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= most:
            whole = "a whole number" if number is int else "a number"
            limit = f", at most {most:.10g}" if value > most else ""
            raise argparse.ArgumentTypeError(f"must be {whole}, at least {low}{limit}, got {text}")
        return value

    return read


def positive(text: str) -> float:
    """A kind of setting: a finite number above 0."""
    value = at_least(0, float)(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A kind of setting: a number between 0 and 1."""
    value = at_least(0, float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


ONE_PLACE = "{} once, where the name goes, and no other brace"


def has_one_place(text: str) -> bool:
    """Is there exactly one {} in a text, and no other brace that `str.format` would act on?"""
    rest = text.replace("{}", "", 1)
    return rest != text and "{" not in rest and "}" not in rest


def prompt_template(text: str) -> str:
    """A kind of setting: a text with a place for a name, or `ensemble`."""
    if text != "ensemble" and not has_one_place(text):
        raise argparse.ArgumentTypeError(f"a template needs {ONE_PLACE}, got {text!r}")
    return text


SHARE = "resume, and leave runs that another process is at to it: start the same command as often "
SHARE += "as there are GPUs, on any machines with one disk for --output, and they share its runs"
COMMON_SETTINGS = [
    ("data-root", str, "data", "data", "folder that holds the benchmarks' folders"),
    ("cue", share, None, None, "tiny data: share of images on their class's background"),
    ("model", str, None, None, "tiny, open_clip's name, hf-hub:... or local-dir:..."),
    ("pretrained", str, None, None, "tag or file (openai; its weights in a FILE: NAME-quickgelu)"),
    ("device", str, "auto", "auto", "auto, cpu, cuda, cuda:1 or mps"),
    ("precision", ("auto", "fp32", "bf16", "fp16"), "auto", "auto", "auto: bf16 where a GPU can"),
    ("workers", at_least(0, most=1024), None, None, "that read images (one a core; tiny data 0)"),
    ("output", Path, Path("runs"), Path("runs"), "folder of all runs"),
    ("summary", Path, None, None, "also write the records of all runs to this JSON file"),
    # not given is None: so runs from before there was this flag can be continued
    ("skip-broken", bool, None, None, "leave out images that cannot be read, and say how many"),
    ("save-every", at_least(0, float), 5.0, 0.0, "minutes between two checkpoints within a row"),
    ("resume", bool, False, False, "keep complete runs, continue interrupted ones"),
    ("share", bool, False, False, SHARE),
    ("figures", bool, False, False, "write analysis.npz and more pictures into the runs' folders"),
]


CACHE = "train on images resized once, shorter side 256 or as it is, kept in DATA_ROOT/.cache"
PROFILE = f"print every {EVERY} steps: images/s, share of time waiting for data, GPU memory"
SPEED = [  # of scripts that train a tower; not given is None, as above
    ("cache", bool, None, None, CACHE),
    ("compile", bool, None, None, "the tower's training pass as one graph"),
    ("profile", bool, None, None, PROFILE),
]
TARGET = ("target", str, "sketch", "sketch", "held-out domain: name, its start, number, or all")
PROMPT = ["a photo of a {}."]
TEMPLATES = ("templates", [prompt_template], PROMPT, PROMPT, "prompts, averaged; or: ensemble")


class Parser(argparse.ArgumentParser):
    """One line says what is wrong, where argparse would print the usage of all flags before it."""

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


@dataclass(frozen=True)
class Method:
    """What a script has to offer: its settings, and the rows and studies they are compared in.

    needs: {setting: pattern} of settings without effect on rows whose name does not match; shared:
    may several processes train together?
    """

    name: str
    settings: list[tuple]
    rows: dict[str, dict]
    studies: dict[str, list[str]]
    needs: dict[str, str] = field(default_factory=dict)
    shared: bool = False


def add_settings(group, settings: list[tuple]) -> None:
    """Make a flag of every setting. What is not given stays None until `settle`."""
    for name, kind, default, tiny, text in settings:
        if default is not None and kind is not bool:
            text += f" (default: {default}" + (")" if tiny == default else f"; tiny CLIP: {tiny})")
        options = {"help": text.replace("%", "%%"), "default": None}
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options["choices"] = kind
        elif isinstance(kind, list):
            options |= {"type": kind[0], "nargs": "+"}
        else:
            options["type"] = kind
        group.add_argument(f"--{name}", **options)


def flags(method: Method, doc: str, modes: list[str], datasets: list[str], more=(), argv=None):
    """Read the command line.

    Args:
        method: its settings become flags.
        doc: the script's docstring, for --help.
        modes: rows that are compared by default; the last one is the method itself.
        datasets: names for --dataset, the default first.
        more: settings of this script that say what a run sees, so that no single row may set them.
    Returns: a namespace in which what was not given is None.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(method.name, description=doc, formatter_class=raw, allow_abbrev=False)
    data = parser.add_argument_group("what is compared, on what")
    names = ", ".join(datasets) + " or folder:PATH" * ("pacs" in datasets)
    names += f"; several: one after the other, then their average (default: {datasets[0]})"
    data.add_argument("--dataset", default=datasets[0], help=names)
    rows = f"rows of the table, the last is the method: {', '.join(method.rows)}; a row may have "
    rows += f"settings of its own, {modes[-1]}/lr=1e-3 (default: {' '.join(modes)})"
    data.add_argument("--modes", nargs="+", metavar="ROW", help=rows)
    study = "a comparison of the paper in place of --modes; writes results/<method>-<study>-..."
    data.add_argument("--study", choices=method.studies, help=study)
    seed = at_least(0, most=10**9)  # generators count on from 1000 times it
    data.add_argument("--seeds", "--seed", type=seed, nargs="+", default=[0])
    add_settings(data, more)
    add_settings(parser.add_argument_group("method and training"), method.settings)
    add_settings(parser.add_argument_group("model, device, output"), COMMON_SETTINGS)
    args = parser.parse_args(argv)
    if parallel.world_size() > 1 and not method.shared:
        raise InputError(
            f"{method.name}.py runs in one process: start it with python, not torchrun"
        )
    if args.study and args.modes:
        raise InputError("--study and --modes both say what to compare: give one of them")
    if len({*args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds: one is given twice, {' '.join(map(str, args.seeds))}")
    args.modes = method.studies[args.study] if args.study else args.modes or modes
    args.method, args.more = method, list(more)
    return args


def settle(args: argparse.Namespace, preset: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given, check what can be checked before anything is loaded, read rows.

    Args:
        args: of `flags`.
        preset: {name: default} that comes before those of the settings; it depends on the data set.
    Returns: args, with `rows`: {text: its settings}, see `read_row`.
    Raises: InputError for values that do not go together.
    """
    preset = dict(preset or {})
    tiny_data = args.dataset.startswith("tiny-")
    if args.cue is not None and not tiny_data:
        raise InputError(f"--cue {args.cue} is for tiny data and has no effect on {args.dataset}")
    for name in ("skip-broken", "cache"):
        given = getattr(args, name.replace("-", "_"), None)
        if given and (tiny_data or args.dataset == "mnist-cifar"):
            what = "is for images in files of their own"
            raise InputError(f"--{name} {what} and has no effect on {args.dataset}")
    preset.setdefault("cue", 0.95 if args.dataset == "tiny-waterbirds" else 0.4)
    preset.setdefault("workers", 0 if tiny_data else readers())
    args.model = args.model or preset.get("model") or ("tiny" if tiny_data else "ViT-B-16")
    if args.model == "tiny" and args.pretrained:
        raise InputError(f"--pretrained {args.pretrained} has no effect with --model tiny")
    if args.study:
        name = f"{args.method.name}-{args.study}-{slug(args.dataset)}.json"
        preset.setdefault("summary", Path("results", name))
    refuse_idle(args)
    for name, _, default, tiny, _ in [*COMMON_SETTINGS, *args.more, *args.method.settings]:
        key = name.replace("-", "_")
        if getattr(args, key) is None:
            usual = tiny if args.model == "tiny" else default
            setattr(args, key, preset.get(key, usual))
    args.resume = args.resume or args.share
    profile.on = getattr(args, "profile", False)
    if args.summary:
        check_summary(args.summary)
    settle_device(args)
    if getattr(args, "compile", None):
        check_compiler(args.device)
    args.rows = {text: read_row(text, args) for text in args.modes}
    return args


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where --cache keeps training images; None without it."""
    return Path(args.data_root) / ".cache" if args.cache else None


def readers() -> int:
    """Processes that read images: one for each core that this one may use, at most 16; shared by
    the processes of this machine that train."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // parallel.count_on_this_machine()))


def refuse_idle(args: argparse.Namespace) -> None:
    """Raises: InputError for a setting that was given and has no effect on any row, or for one that
    a row has of its own and that has none on it; see `Method`."""
    names = [text.split("/")[0] for text in args.modes]
    if not args.method.rows.keys() >= {*names}:
        return  # `read_row` says which is unknown
    for setting, pattern in args.method.needs.items():
        given = getattr(args, setting.replace("-", "_")) is not None
        if given and not any(re.search(pattern, name) for name in names):
            raise InputError(f"--{setting} has no effect on any row: {' '.join(args.modes)}")
        for text, name in zip(args.modes, names):
            if f"/{setting}=" in text and not re.search(pattern, name):
                raise InputError(f"--modes {text}: {setting} has no effect on {name}")


def check_summary(path: Path) -> None:
    """Raises: InputError if no file can be written there, before hours of training."""
    wrong = None
    if path.is_dir():
        wrong = "it is a folder; give a file in it"
    elif not path.parent.is_dir():
        wrong = f"there is no folder {path.parent}; make it first"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        wrong = "it cannot be written"
    if wrong:
        raise InputError(f"--summary {path}: {wrong}")


def settle_device(args: argparse.Namespace) -> None:
    """Turn --device and --precision into what is there."""
    wanted = args.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and parallel.world_size() > 1:
        wanted = f"cuda:{parallel.local_rank()}"
    hint = "use auto, cpu, cuda, cuda:1 or mps"
    try:
        args.device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"--device {wanted!r} is not a device; {hint}") from None
    kind = args.device.type
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if kind == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InputError(f"--device {args.device}: GPUs are cuda:0 ... cuda:{last} here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {args.device}: PyTorch sees none here; use --device cpu")
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {wanted!r} cannot train; {hint}")
    if args.precision == "fp16" and args.device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if args.precision == "auto":
        bf16 = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if bf16 else "fp32"
    if kind == "cuda" and args.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32 where half precision would be too coarse


def read_row(text: str, args: argparse.Namespace) -> argparse.Namespace:
    """A row `name/setting=value/...`: the command's settings, then its name's, then its own on top.

    Raises: InputError for a name that the method does not have, or a setting that no row may set.
    """
    method = args.method
    name, *own = text.split("/")
    if name not in method.rows:
        hint = did_you_mean(name, method.rows)
        raise InputError(f"--modes: no row {name!r}{hint} Choose from {', '.join(method.rows)}.")
    allowed = [setting[0] for setting in method.settings]
    for setting in own:
        wrong = setting.partition("=")[0]
        if wrong not in allowed or "=" not in setting:
            hint = did_you_mean(wrong, allowed)
            raise InputError(
                f"--modes {text}: cannot read {setting!r}{hint} A row may set "
                f"{', '.join(allowed)}, as in {name}/{allowed[0]}=VALUE."
            )
    parser = Parser(allow_abbrev=False)
    add_settings(parser, method.settings)
    try:
        given = vars(parser.parse_args([f"--{setting}" for setting in own]))
    except InputError as error:
        raise InputError(f"--modes {text}: {error}") from None
    given = {key: value for key, value in given.items() if value is not None}
    return argparse.Namespace(**{**vars(args), **method.rows[name], **given, "name": text})
