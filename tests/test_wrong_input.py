"""What a user meets who gives something wrong: one line that names it, and nothing is changed."""

import functools
import importlib
import json
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

import common
from support import weights
from support.vit import torchvision_vit

SCRIPTS = ("headpurify", "clipood", "ldfs", "vit_diverse")
BIRDS = "--dataset tiny-waterbirds"
FEATURES = "headpurify --prompt file --class-features"
ONE_PLACE = "{} once"

# (a command, words that its message has)
FLAGS = [
    # numbers that are none, or too small, or too large
    *((f"{script} --lr {text}", ("--lr", text)) for script in SCRIPTS for text in ("nan", "-1")),
    *((f"{script} --lr 1e999", ("--lr", "at most 1e+30", "1e999")) for script in SCRIPTS),
    ("ldfs --lr 1e39", ("--lr", "at most 1e+30")),
    ("headpurify --rank 0", ("--rank", "at least 1", "got 0")),
    ("headpurify --epochs 0", ("--epochs", "at least 1")),
    ("headpurify --cue 2", ("--cue", "between 0 and 1", "2")),
    ("headpurify --seed -3", ("--seed", "at least 0", "-3")),
    ("headpurify --seeds 99999999999999999999", ("--seed", "at most 1000000000")),
    ("clipood --seeds 3 1 3", ("--seeds", "twice", "3 1 3")),
    ("clipood --workers 100000", ("--workers", "at most 1024")),
    ("clipood --margin -1", ("--margin", "at least 0")),
    ("clipood --beta 0", ("--beta", "above 0")),
    ("clipood --shots 0", ("--shots", "at least 1")),
    ("clipood --steps-per-epoch 0", ("--steps-per-epoch", "at least 1")),
    ("ldfs --sigma -1", ("--sigma", "at least 0", "-1")),
    ("ldfs --hidden 0", ("--hidden", "at least 1", "0")),
    (f"vit_diverse {BIRDS} --cue 3", ("--cue", "between 0 and 1")),
    ("vit_diverse --heads 0", ("--heads", "at least 1")),
    ("vit_diverse --heads 17", ("17 heads",)),
    ("vit_diverse --lambda -1", ("--lambda", "at least 0, got -1")),
    # batches larger than a domain
    ("headpurify --batch-size 100000", ("--batch-size 100000", "at most 90")),
    ("clipood --batch-size 100000", ("--batch-size 100000", "at most 90")),
    ("clipood --modes mms/batch-size=91", ("--batch-size 91", "at most 90")),
    # names
    ("headpurify --target skech", ("skech", "did you mean 'sketch'")),
    ("clipood --target skech", ("skech", "did you mean 'sketch'")),
    ("ldfs --source phto", ("unknown source 'phto'", "did you mean 'photo'")),
    ("ldfs --targets skech", ("unknown target 'skech'", "did you mean 'sketch'")),
    (f"ldfs {BIRDS} --targets air", ("unknown target 'air'", "water, land")),
    ("headpurify --dataset tiny-pac", ("unknown data set 'tiny-pac'", "'tiny-pacs'")),
    ("clipood --dataset caltech102", ("'caltech102'", "did you mean 'caltech101'")),
    ("ldfs --dataset tiny-pac", ("unknown data set 'tiny-pac'", "'tiny-pacs'", "waterbirds")),
    ("vit_diverse --dataset tiny-mnist", ("'tiny-mnist'", "did you mean 'tiny-mnist-cifar'")),
    ("headpurify --dataset folder:nowhere", ("nowhere", "<domain>/<class>/<image>")),
    ("headpurify --dataset folder:empty", ("empty", "no domain folder")),
    ("headpurify --rnk 3", ("--rnk",)),
    # rows
    ("headpurify --modes lroa", ("'lroa'", "did you mean 'lora'")),
    ("clipood --modes zero-shot mmd", ("--modes", "'mmd'", "mms")),
    ("headpurify --modes lroa --lr 1e-3", ("'lroa'", "did you mean 'lora'")),
    ("headpurify --modes lora/seeds=3", ("'seeds=3'", "may set")),
    ("headpurify --modes lora/lr=abc", ("lora/lr=abc", "--lr", "got abc")),
    ("headpurify --modes lora/lora-rank=four", ("--lora-rank", "'four'")),
    ("headpurify --modes lora/rank=0", ("--rank", "at least 1", "got 0")),
    ("ldfs --modes ldfs/sigm=1", ("sigm", "did you mean 'sigma'")),
    # templates
    ("headpurify --templates photo", (ONE_PLACE, "'photo'")),
    ("headpurify --templates 'a {} and {}'", (ONE_PLACE, "'a {} and {}'")),
    ("clipood --templates 'a {x} {}'", (ONE_PLACE, "'a {x} {}'")),
    ("ldfs --templates 'a {0}'", (ONE_PLACE, "'a {0}'")),
    ("clipood --templates 'a {'", (ONE_PLACE, "'a {'")),
    ("clipood --templates ensemble 'a {}'", (ONE_PLACE, "'ensemble'")),
    ("headpurify --templates zebra{}", ("zebra",)),
    ("ldfs --templates zebra{}", ("zebra",)),
    ("ldfs --descriptions sketch=pencil", ("--descriptions", "sketch='pencil'", ONE_PLACE)),
    ("ldfs --descriptions 'sketch=a {0} {}'", ("--descriptions", "{0}", ONE_PLACE)),
    # devices; this machine is said to have no GPU
    ("headpurify --device cuda", ("--device cuda", "no GPU")),
    ("clipood --device cuda:9", ("--device cuda:9", "no GPU")),
    ("ldfs --device mps", ("--device mps", "none here", "--device cpu")),
    ("vit_diverse --device meta", ("--device 'meta'", "use auto, cpu")),
    ("headpurify --device nonsense", ("--device 'nonsense'", "use auto, cpu")),
    # places
    *((f"{script} --summary empty", ("--summary empty", "a folder")) for script in SCRIPTS),
    ("clipood --summary nowhere/all.json", ("--summary", "no folder nowhere")),
    ("vit_diverse --summary nowhere/all.json", ("--summary", "no folder nowhere")),
    *((f"{script} --output taken", ("results to taken", "--output")) for script in SCRIPTS),
    # settings without effect
    ("headpurify --drop 1.1", ("--drop has no effect", "--study drop-heads")),
    ("headpurify --full-lr 1", ("--full-lr has no effect", "ha-lora+dig")),
    ("headpurify --modes ha-lora/lora-rank=double", ("lora-rank has no effect on ha-lora",)),
    ("headpurify --class-features wrong.npy", ("--class-features", "--prompt file")),
    ("headpurify --modes lora --figures", ("--figures", "lora")),
    ("clipood --shots 4", ("--shots has no effect", "domain-shift")),
    ("clipood --dataset ucf101 --target sketch", ("--target has no effect with ucf101",)),
    ("clipood --modes mms/beta=0.1", ("mms/beta=0.1", "beta has no effect on mms")),
    ("clipood --modes zero-shot/lr=1", ("lr has no effect on zero-shot",)),
    ("clipood --modes mms --ema 0.9", ("--ema has no effect on any row: mms",)),
    ("clipood --dataset caltech101 --task in-the-wild", ("caltech101", "--task open-class")),
    ("ldfs --caption-file x", ("--caption-file has no effect",)),
    (f"ldfs {BIRDS} --source photo", ("--source photo has no effect",)),
    ("ldfs --targets sketch photo", ("--targets names 'photo', the source",)),
    ("vit_diverse --cue 0.5", ("--cue has no effect",)),
    ("vit_diverse --pretrained vit.pt", ("--pretrained has no effect", "scratch")),
    (f"vit_diverse {BIRDS} --depth 3", ("--depth has no effect", "tiny")),
    (f"vit_diverse {BIRDS} --download", ("--download has no effect",)),
    ("ldfs --modes plain/sigma=0.1 ldfs", ("plain/sigma=0.1", "sigma has no effect on plain")),
    ("ldfs --modes zero-shot plain --reach 2", ("--reach has no effect on any row",)),
    ("ldfs --modes zero-shot/lr=1", ("lr has no effect on zero-shot",)),
    ("vit_diverse --modes erm/div-lr=1", ("erm/div-lr=1", "div-lr has no effect on erm")),
    ("vit_diverse --modes div/select-by=worst-group", ("select-by has no effect on div",)),
    # heads, captions and class features
    ("headpurify --study drop-heads --drop 7.2", ("--drop 7.2", "1.1 ... 6.6")),
    ("headpurify --study drop-heads --drop two", ("--drop two", "1.1 ... 6.6")),
    ("ldfs --captioner file", ("--captioner file needs --caption-file",)),
    ("ldfs --captioner file --caption-file text", ("--caption-file text", "no JSON")),
    ("ldfs --captioner file --caption-file code", ("--caption-file code", "no JSON")),
    ("headpurify --modes zero-shot --prompt file", ("--class-features", "(7, 64)", "dog")),
    (f"{FEATURES} wrong.npy", ("wrong.npy", "(3, 64)", "(7, 64)", "dog")),
    (f"{FEATURES} turned.npy", ("turned.npy", "(64, 7)", "(7, 64)")),
    (f"{FEATURES} nan.npy", ("nan.npy", "finite", "(7, 64)")),
    (f"{FEATURES} zero.npy", ("zero.npy", "a row of it is 0")),
    (f"{FEATURES} text", ("text", "no array of numbers", "(7, 64)")),
    (f"{FEATURES} code", ("code", "no array of numbers", "(7, 64)")),
    (f"{FEATURES} objects.npy", ("objects.npy", "no array of numbers")),
    (f"{FEATURES} nowhere.npy", ("nowhere.npy", "No such file")),
    (f"{FEATURES} empty", ("empty", "directory")),
    # models
    ("headpurify --model RN50 --pretrained gone.pt", ("gone.pt", "neither a file nor a tag")),
    (f"vit_diverse {BIRDS} --model ViT-B-33", ("ViT-B-33", "did you mean")),
]
NOT_THERE = [  # with what is expected, where to get it, and what to try
    ("clipood --dataset ucf101", ("not in data/ucf101", "split_zhou_UCF101.json", "CoOp")),
    ("clipood --dataset imagenet", ("not in data/imagenet", "classnames.txt")),
    ("clipood --dataset officehome", ("data/office_home", "tiny-office")),
    ("ldfs --dataset domainnet-mini", ("not in data/domain_net", "tiny-office")),
    ("ldfs --dataset cub-paintings", ("data/CUB-200-Painting", "CUB_200_2011")),
    ("ldfs --dataset waterbirds", ("tiny-waterbirds",)),
    ("vit_diverse --dataset waterbirds", ("metadata.csv", "img_filename, y, split, place")),
    ("vit_diverse --dataset mnist-cifar", ("MNIST/raw", "cifar-10-batches-py", "--download")),
]
WEIGHTS = [  # with the way out in a second line
    ("headpurify --model wrong-vit --pretrained text", ("text", "no file of tensors alone")),
    ("clipood --model wrong-vit --pretrained code", ("code", "could run code is not loaded")),
    ("clipood --model wrong-vit --pretrained zipped", ("zipped", "could run code is not loaded")),
    ("ldfs --model wrong-vit --pretrained nothing", ("nothing", "no file of tensors alone")),
    ("ldfs --model wrong-vit --pretrained other", ("other", "not those of this model")),
    (f"vit_diverse {BIRDS} --model wrong-vit --pretrained text", ("text", "a state dict")),
    (f"vit_diverse {BIRDS} --model vit_b_16 --pretrained gone.pt", ("vit_b_16", "--pretrained")),
    ("headpurify --model ViT-B-16", ("(openai)", "no connection to", "models--", "--model tiny")),
    ("ldfs --model hf-hub:some/where", ("hf-hub:some/where", "no connection to")),
    (f"vit_diverse {BIRDS} --model ViT-B-32", ("(openai)", "--pretrained FILE")),
    ("clipood --model local-dir:empty", ("local-dir:empty", "open_clip_config.json")),
]
LINES = {1: FLAGS, 4: NOT_THERE, 2: WEIGHTS}
CASES = [(line, words, lines) for lines, cases in LINES.items() for line, words in cases]


class Code:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.fixture
def small_world(monkeypatch):
    """Few images, no GPU and no network; and an open_clip model that is small."""
    small = {name: (row[0], 16, 8) for name, row in common.TINY_BENCHMARKS.items()}
    monkeypatch.setattr(common, "TINY_BENCHMARKS", small)
    for name in ("draw_waterbirds", "draw_digits_and_vehicles"):
        draw = functools.partial(getattr(common, name), sizes=(60, 8, 40))
        monkeypatch.setattr(common, name, draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(weights, "answers", lambda url: False)


@pytest.fixture
def wrong_files(tmp_path):
    """Files that are something else than what is asked for, in the folder of `call_main`."""
    (tmp_path / "text").write_text("hello, this is no checkpoint\n")
    (tmp_path / "nothing").touch()
    (tmp_path / "taken").write_text("a file where a folder should be")
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").write_bytes(pickle.dumps(Code(), protocol=2))
    torch.save({"weight": Code()}, tmp_path / "zipped")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    np.save(tmp_path / "wrong.npy", np.zeros((3, 64)))
    np.save(tmp_path / "turned.npy", np.ones((64, 7)))
    np.save(tmp_path / "nan.npy", np.full((7, 64), np.nan))
    np.save(tmp_path / "zero.npy", np.zeros((7, 64)))
    np.save(tmp_path / "objects.npy", np.array([Code()], dtype=object), allow_pickle=True)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def wrong_vit(tmp_path_factory):
    """A model of open_clip that is built in no time."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 3, "head_width": 4}
    file = tmp_path_factory.mktemp("open_clip") / "wrong-vit.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)


def contents(folder):
    """{path: bytes} of all that lies below a folder; a folder has none."""
    found = {}
    for path in folder.rglob("*"):
        found[path] = None if path.is_dir() else path.read_bytes()
    return found


def run(call_main, line):
    """The message that a command stops with."""
    script, *arguments = shlex.split(line)
    return call_main(importlib.import_module(script).main, arguments)


# ---------- Wrong input --------------------------------------------------------------------------
@pytest.mark.parametrize("line, words, lines", CASES, ids=[line for line, *_ in CASES])
def test_what_is_wrong_is_named_and_nothing_is_changed(
    call_main, small_world, wrong_files, line, words, lines
):
    before = contents(wrong_files)
    error = run(call_main, line)
    assert error.startswith("error: ") and len(error.splitlines()) == lines, error
    assert all(word in error for word in words), error
    assert "weights_only" not in error and "allow_pickle" not in error
    assert contents(wrong_files) == before


def test_a_study_needs_a_folder_for_its_records(call_main, small_world, tmp_path):
    (tmp_path / "results").rmdir()
    for script, study in (("clipood", "loss"), ("headpurify", "strategy")):
        error = run(call_main, f"{script} --study {study}")
        assert error.startswith("error: --summary results") and "no folder results" in error
    assert not contents(tmp_path)


def test_a_summary_that_cannot_be_written_is_said_at_the_start(call_main, tmp_path, monkeypatch):
    (tmp_path / "all.json").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for name in ("all.json", "new.json"):
        error = run(call_main, f"ldfs --summary {name}")
        assert error == f"error: --summary {name}: it cannot be written\n"
    assert (tmp_path / "all.json").read_text() == "kept"


def test_a_gpu_that_is_not_there(call_main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    error = run(call_main, "headpurify --device cuda:9")
    assert error == "error: --device cuda:9: GPUs are cuda:0 ... cuda:1 here\n"


@pytest.mark.slow
def test_a_wrong_flag_in_a_process_of_its_own(checkout):
    """The traceback that `call_main` could hide."""
    for script in SCRIPTS:
        options = {"cwd": checkout, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, f"{script}.py", "--lr", "nan"], **options)
        assert done.returncode == 2
        assert done.stderr == "error: --lr: must be a number, at least 0, got nan\n"
    assert not (checkout / "runs").exists()


# ---------- Files that would run code, or are none ------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["text", "code", "zipped", "nothing", "other"])
def test_a_checkpoint_that_is_none_is_not_continued(
    call_main, small_world, wrong_files, script, name
):
    runs = {"vit_diverse": "tiny-mnist-cifar-seed0", "ldfs": "tiny-pacs-from_photo-seed0"}
    folder = runs.get(script, "tiny-pacs-sketch-seed0")
    checkpoint = wrong_files / "runs" / script / f".{folder}.partial" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(wrong_files / name, checkpoint)
    before = contents(wrong_files)
    error = run(call_main, f"{script} --resume")
    assert error.startswith("error: --resume: cannot read runs"), error
    assert "no file of tensors alone" in error and len(error.splitlines()) == 1
    assert contents(wrong_files) == before


def test_a_result_that_is_none_is_not_taken_for_one(call_main, small_world, tmp_path):
    folder = tmp_path / "runs" / "headpurify" / "tiny-pacs-sketch-seed0"
    folder.mkdir(parents=True)
    for text in ("", "no JSON", "[1]", "{}"):
        (folder / "result.json").write_text(text)
        error = run(call_main, "headpurify --resume")
        assert error.startswith("error: --resume: cannot read runs"), error
        assert "result.json" in error and len(error.splitlines()) == 1
        assert (folder / "result.json").read_text() == text


@pytest.mark.parametrize("name", ["text", "code", "zipped", "nothing", "other"])
def test_torchvision_weights_that_are_none(wrong_files, monkeypatch, name):
    monkeypatch.chdir(wrong_files)
    monkeypatch.setattr("torchvision.models.vit_b_16", lambda weights: nn.Linear(2, 2))
    with pytest.raises(common.InputError) as error:
        torchvision_vit(name)
    message = str(error.value)
    assert f"vit_b_16's weights {name}: " in message and len(message.splitlines()) == 2
    assert "weights_only" not in message and not (wrong_files / "code-was-run").exists()


def test_cifar_files_that_would_run_code(call_main, small_world, wrong_files):
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
    error = run(call_main, "vit_diverse --dataset mnist-cifar")
    assert error.startswith("error: data set 'mnist-cifar'")
    assert contents(wrong_files) == before


# ---------- Weights without a network -------------------------------------------------------------
def test_the_hub_is_asked_only_for_weights_that_it_has(monkeypatch):
    """And where it answers, nothing is changed: a slow network is as good as another."""
    asked = []
    monkeypatch.setattr(weights, "answers", lambda url: asked.append(url) or True)
    with weights.hub_or_cache("ViT-B-16", "openai"):
        assert not weights.constants.HF_HUB_OFFLINE
    assert asked == [weights.constants.ENDPOINT]
    common.load_clip("tiny")
    assert len(asked) == 1
    monkeypatch.setattr(weights, "answers", lambda url: False)
    with weights.hub_or_cache("hf-hub:some/where"):
        assert weights.constants.HF_HUB_OFFLINE  # what is in the cache is still found
    assert not weights.constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), weights.hub_or_cache("ViT-B-16", __file__):
        raise KeyError  # no fault of the network


def test_a_host_that_says_nothing_is_not_waited_for(monkeypatch):
    seen = []

    def silence(address):
        seen.append(address)
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", silence)
    start = time.perf_counter()
    assert not weights.answers("https://nowhere.example/path", seconds=0.1)
    assert time.perf_counter() - start < 1
    assert seen == [("nowhere.example", 443)]
    monkeypatch.setattr(weights, "getproxies", lambda: {"https": "proxy.example:3128"})
    assert weights.answers("https://nowhere.example")  # only the proxy can tell


def test_a_host_that_answers(monkeypatch):
    monkeypatch.setattr(weights, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert weights.answers(f"http://127.0.0.1:{port}")
    assert not weights.answers(f"http://127.0.0.1:{port}")


# ---------- Numbers that break on the way ---------------------------------------------------------
BREAKING = [
    ("headpurify --modes lora --lr 1e30", "lora, step 1 of seed 0"),
    ("headpurify --modes full --full-lr 1e30", "full, step 1 of seed 0"),
    ("headpurify --modes ha-lora+dig --lr 1e9 --epochs 3", "ha-lora+dig, step 2 of seed 0"),
    ("headpurify --modes dig --alpha 1e30 --gate-lr 1e30", "dig, step "),
    ("clipood --modes mms mms+bma --lr 1e30", "mms/mms+bma, step 1 of seed 0"),
    ("clipood --modes linear --head-lr 1e30 --lr 1e-5", "linear, step 1 of seed 0"),
    ("clipood --modes coop --prompt-lr 1e30", "coop, step "),
    ("ldfs --lr 1e30", "probe's (--lr) epoch 1, batch 1 of seed 0"),
    ("ldfs --finetune coop --lr 1e30", "coop's (--lr) epoch 1, batch 1 of seed 0"),
    ("ldfs --mapper-lr 1e30", "the mapper's (--mapper-lr) epoch 1, batch 1 of seed 0"),
    ("vit_diverse --modes erm --lr 1e30", "epoch 1, batch 1 of seed 0, lambda 0"),
    ("vit_diverse --modes div --lambda 1e30 --epochs 1", "epoch 1, batch "),
]


@pytest.mark.parametrize("line, where", BREAKING, ids=[line for line, _ in BREAKING])
def test_numbers_that_break_stop_the_run(call_main, small_world, tmp_path, line, where):
    """At the step where they do, before a model is exported."""
    error = run(call_main, f"{line} --output runs")
    assert error.startswith(f"error: {where}") and len(error.splitlines()) == 1, error
    assert "learning rate " in error and ("inf" in error or "nan" in error)
    finished = [path for path in tmp_path.rglob("*") if path.name in ("model", "result.json")]
    assert not finished


def a_step(loss, gradient, lr=1.0):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), gradient)
    optimizer = torch.optim.SGD([weight], lr)
    try:
        common.Steps(optimizer).take(torch.tensor(loss), "step 7")
    except common.InputError as error:
        return weight, str(error)
    return weight, ""


def test_a_step_is_taken_only_along_finite_numbers():
    weight, error = a_step(0.5, 0.25)
    assert torch.equal(weight, torch.full((3,), 0.75)) and not error
    for loss, gradient in ((float("nan"), 0.25), (0.5, float("nan")), (float("inf"), 0.25)):
        weight, error = a_step(loss, gradient)
        assert torch.equal(weight, torch.ones(3))
        assert error.startswith("step 7, learning rate 1: the loss is ")
    weight, error = a_step(0.5, 1e15, lr=1e30)
    assert error.startswith("step 7, learning rate 1e+30: the norm of the weights is inf")


def test_fp16_leaves_out_a_step_whose_gradient_is_not_finite():
    """So a gradient that is too large for fp16 is no reason to stop."""
    steps = []
    scaler = SimpleNamespace(is_enabled=lambda: True, step=steps.append, update=lambda: None)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), torch.inf)
    optimizer = torch.optim.SGD([weight], 1.0)
    common.Steps(optimizer, scaler=scaler).take(torch.tensor(0.5), "step 7")
    assert steps == [optimizer]


def test_what_is_not_a_number_is_neither_tested_nor_exported(tmp_path):
    images = common.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), ("a",))
    with pytest.raises(common.InputError, match="outputs are nan"):
        common.outputs(lambda x: x * torch.nan, images)
    clip = common.load_clip("tiny")
    clip.visual.proj.data[0, 0] = torch.nan
    with pytest.raises(common.InputError, match="numbers of proj are not finite"):
        common.export_clip(clip, tmp_path / "model", torch.zeros(1, 64), ["a"])
    assert not (tmp_path / "model").exists()


def test_small_domains_are_cycled_through():
    """Published batch sizes go with few images, and as large a batch as the largest domain."""
    sets = {"small": range(5), "large": range(90)}
    for size in (12, 36, 64, 90):
        common.check_batch_sizes({"row": SimpleNamespace(batch_size=size)}, sets)
    few = {"small": range(5)}
    common.check_batch_sizes({"row": SimpleNamespace(batch_size=64)}, few)
    with pytest.raises(common.InputError, match="--batch-size 65.* only 5 .*at most 64"):
        common.check_batch_sizes({"row": SimpleNamespace(batch_size=65)}, few)
