"""What a user meets who gives something wrong: one line that names it, and nothing is changed."""

import functools
import importlib
import shlex
import shutil
import socket

import numpy as np
import pytest
import torch

import common
from support import InputError, tiny_world

SCRIPTS = ("headpurify", "clipood", "ldfs", "vit_diverse")
BIRDS = "--dataset tiny-waterbirds"
ONE_PLACE = "{} once"

# (a command, words that its message has)
FLAGS = [
    # numbers that are none, or too small, or too large
    *((f"{script} --lr nan", ("--lr", "nan")) for script in SCRIPTS),
    ("headpurify --cue 2", ("--cue", "at most 1", "2")),
    ("headpurify --seeds 99999999999999999999", ("--seed", "at most 1000000000")),
    ("clipood --seeds 3 1 3", ("--seeds", "twice", "3 1 3")),
    ("vit_diverse --heads 17", ("17 heads",)),
    # names
    ("headpurify --target skech", ("skech", "did you mean 'sketch'")),
    ("ldfs --source phto", ("unknown source 'phto'", "did you mean 'photo'")),
    ("ldfs --targets sketch photo", ("--targets names 'photo', the source",)),
    ("headpurify --dataset tiny-pac", ("'tiny-pac'", "did you mean 'tiny-pacs'")),
    ("clipood --dataset caltech101 --task in-the-wild", ("caltech101", "--task open-class")),
    # templates and words
    ("clipood --templates photo", (ONE_PLACE, "'photo'")),
    ("headpurify --templates zebra{}", ("zebra",)),
    ("ldfs --descriptions sketch=pencil", ("--descriptions", "sketch='pencil'", ONE_PLACE)),
    # devices; this machine is said to have no GPU
    ("clipood --device cuda", ("--device 'cuda' cannot be used", "use auto, cpu")),
    ("headpurify --device cpu --precision fp16", ("--precision fp16", "fp32")),
    # what does not go together
    ("headpurify --modes zero-shot --prompt file", ("zero-shot", "--class-features FILE")),
    ("ldfs --captioner file", ("--captioner file needs --caption-file",)),
    # places
    ("clipood --summary nowhere/all.json", ("nowhere/all.json", "a folder that can be written")),
    ("headpurify --output taken", ("cannot write taken/headpurify", "Not a directory")),
    # files of other things
    ("ldfs --caption-file text", ("tiny data are drawn",)),
    ("headpurify --class-features wrong.npy", ("wrong.npy", "(3, 64)", "(7, 64)", "dog")),
    ("headpurify --class-features nan.npy", ("nan.npy", "finite", "(7, 64)")),
    ("headpurify --class-features text", ("text", "no array of numbers", "(7, 64)")),
    # data and models
    ("headpurify --dataset folder:nowhere", ("nowhere", "<domain>/<class>/<image>")),
    ("headpurify --model RN50 --pretrained gone.pt", ("gone.pt", "neither a file nor a tag")),
    (f"vit_diverse {BIRDS} --model ViT-B-33", ("ViT-B-33", "did you mean")),
]
NOT_THERE = [  # with what is expected, where to get it, and what to try
    ("clipood --dataset ucf101", ("not in data/ucf101", "split_zhou_UCF101.json", "CoOp")),
    ("ldfs --dataset domainnet-mini", ("not in data/domain_net", "tiny-office")),
    ("vit_diverse --dataset waterbirds", ("metadata.csv", "img_filename, y, split, place")),
    ("vit_diverse --dataset mnist-cifar", ("MNIST/raw", "cifar-10-batches-py", "--download")),
]
WEIGHTS = [  # with the way out in a second line
    ("headpurify --model small-vit --pretrained text", ("text", "no file of tensors alone")),
    ("clipood --model small-vit --pretrained zipped", ("zipped", "could run code is not loaded")),
    ("ldfs --model small-vit --pretrained other", ("other", "not those of this model")),
    (f"vit_diverse {BIRDS} --model vit_b_16 --pretrained zipped", ("vit_b_16's weights zipped: ",)),
    ("headpurify --model ViT-B-16", ("(openai)", "models--", "--model tiny")),
]
LINES = {1: FLAGS, 4: NOT_THERE, 2: WEIGHTS}
CASES = [(line, words, lines) for lines, cases in LINES.items() for line, words in cases]


@pytest.fixture
def small_world(monkeypatch):
    """Few images, no GPU and no network."""
    small = {name: (row[0], 8, 4) for name, row in common.TINY_BENCHMARKS.items()}
    monkeypatch.setattr(common, "TINY_BENCHMARKS", small)
    for name in ("draw_waterbirds", "draw_digits_and_vehicles"):
        draw = functools.partial(getattr(tiny_world, name), sizes=(60, 8, 40))
        monkeypatch.setattr(tiny_world, name, draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def more_wrong_files(wrong_files):
    (wrong_files / "taken").write_text("a file where a folder should be")
    np.save(wrong_files / "wrong.npy", np.zeros((3, 64)))
    np.save(wrong_files / "nan.npy", np.full((7, 64), np.nan))
    return wrong_files


def contents(folder):
    """{path: bytes} of all that lies below a folder; True for a folder."""
    return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def run(call_main):
    """Run a command line; returns the message that it stops with."""

    def run(line):
        script, *arguments = shlex.split(line)
        return call_main(importlib.import_module(script).main, arguments)

    return run


@pytest.mark.parametrize("line, words, lines", CASES, ids=[line for line, *_ in CASES])
def test_what_is_wrong_is_named_and_nothing_is_changed(
    run, small_world, small_vit, more_wrong_files, line, words, lines
):
    before = contents(more_wrong_files)
    error = run(line)
    assert error.startswith("error: ") and len(error.splitlines()) == lines, error
    assert all(word in error for word in words), error
    assert "weights_only" not in error and "allow_pickle" not in error
    assert contents(more_wrong_files) == before


# ---------- Files that would run code ------------------------------------------------------------
def test_cifar_files_that_would_run_code(run, wrong_files):
    """torchvision unpickles CIFAR-10, but only files with the checksums of the real ones."""
    raw = wrong_files / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 40)):
        sizes = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + sizes + bytes(n * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + sizes[:4] + bytes(n))
    cifar = wrong_files / "data" / "cifar-10-batches-py"
    cifar.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        shutil.copy(wrong_files / "code", cifar / name)
    before = contents(wrong_files)
    error = run("vit_diverse --dataset mnist-cifar")
    assert error.startswith("error: data set 'mnist-cifar'")
    assert contents(wrong_files) == before


# ---------- Weights without a network -------------------------------------------------------------
def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """For weights that it has; what lies in its cache is still found."""
    asked = []

    def no_network(address, seconds):
        asked.append((address, seconds))
        raise OSError

    monkeypatch.setattr(common, "getproxies", dict)
    monkeypatch.setattr(common.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", no_network)
    common.load_clip("tiny")
    assert not asked and not common.constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="cannot load the weights of hf-hub:some/where"):
        common.load_clip("hf-hub:some/where")
    assert asked == [(("huggingface.co", 443), 3)] and common.constants.HF_HUB_OFFLINE


# ---------- Numbers that break on the way ---------------------------------------------------------
DIVERGING = [
    ("headpurify --modes lora --lr 1e30 --epochs 1", "lora, step 3"),
    ("clipood --modes mms mms+bma --lr 1e30 --batch-size 4 --steps-per-epoch 2", "mms/mms+bma, "),
    ("ldfs --lr 1e30", "probe (--lr), the last step"),
    ("ldfs --mapper-lr 1e30", "the mapper (--mapper-lr), epoch "),
    ("vit_diverse --modes erm --lr 1e30 --epochs 2", "lambda 0, epoch 2"),
]


@pytest.mark.parametrize("line, where", DIVERGING, ids=[line for line, _ in DIVERGING])
def test_a_training_that_diverges_is_stopped(run, small_world, tmp_path, line, where):
    """Before a model is exported."""
    error = run(line)
    assert error.startswith(f"error: {where}") and len(error.splitlines()) == 1, error
    assert "learning rate 1e+30; lower it" in error and ("inf" in error or "nan" in error)
    finished = [path for path in tmp_path.rglob("*") if path.name in ("model", "result.json")]
    assert not finished


def test_what_is_not_a_number_has_no_accuracy():
    images = common.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), ("a",))
    with pytest.raises(InputError, match="outputs are nan"):
        common.outputs(lambda x: x * torch.nan, images)
