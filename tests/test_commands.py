"""The README's commands as they stand, and what a user meets who gives something wrong."""

import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from conftest import call, readme_commands, readme_script
from PIL import Image

import common
import headpurify


def test_readme_names_the_test_command(root):
    assert "pip install -r requirements.txt && pytest" in readme_commands(root)


def committed(root, monkeypatch, name, *flags):
    """Settings, runs and seeds of results/headpurify-NAME.json, made on all targets with the settings of today."""
    file = json.loads((root / "results" / f"headpurify-{name}.json").read_text())
    settings, runs = file["settings"], file["runs"]
    monkeypatch.setattr("sys.argv", ["headpurify.py", *flags])
    monkeypatch.chdir(root)
    now = vars(headpurify.settings())
    for setting in (*headpurify.OWN_SETTINGS, "cue", "context", "drop"):
        key = setting.replace("-", "_")
        assert settings[key] == now[key], f"results were made with another {setting}"
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    assert [(run["seed"], run["target"]) for run in runs] == [(s, t) for s in seeds for t in common.TINY_DOMAINS]
    return settings, runs, " ".join(map(str, seeds))


@pytest.mark.parametrize("dataset", ["tiny-pacs", "tiny-office"])
def test_readme_tables_are_the_committed_runs(root, dataset, monkeypatch):
    settings, runs, seeds = committed(root, monkeypatch, dataset, "--dataset", dataset)
    readme = (root / "README.md").read_text()
    table = common.summary_table(f"{dataset}, target accuracy, %", settings["modes"], runs)
    assert f"```text\n{table}\n```" in readme
    means = common.measures_table(f"{dataset}, %", headpurify.accuracies(runs))
    assert f"```text\n{means}\n```" in readme
    for other in ("full", "lora"):  # what the text says of paired runs
        pairs = [[run["modes"][mode]["target"]["accuracy"] for mode in ("ha-lora+dig", other)] for run in runs]
        gain = 100 * np.subtract(*np.transpose(pairs))
        assert f"{abs(gain.mean()):.1f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.1f}" in readme
    command = f"--target all --seeds {seeds} --summary results/headpurify-{dataset}.json"
    assert any(command in line for line in readme_commands(root))


@pytest.mark.parametrize("study", headpurify.STUDIES)
def test_readme_studies_are_the_committed_runs(root, study, monkeypatch):
    settings, runs, seeds = committed(root, monkeypatch, f"{study}-tiny-pacs", "--study", study)
    assert settings["modes"] == [mode for mode in headpurify.STUDIES[study].split() if "file" not in mode]
    if study == "drop-heads":
        shape = len(seeds.split()), len(common.TINY_DOMAINS), -1
        curves = {order: np.reshape([run["drop"][order]["target"] for run in runs], shape) for order in runs[0]["drop"]}
        rows = {order: [common.percent(column) for column in curve.mean(1).T] for order, curve in curves.items()}
        table = common.format_table("target, %, dropped:", [*map(str, runs[0]["drop"]["random"]["dropped"])], rows)
    else:
        table = common.measures_table("tiny-pacs, %", headpurify.accuracies(runs))
    assert f"```text\n{table}\n```" in (root / "README.md").read_text()
    assert f"python headpurify.py --study {study} --target all --seeds {seeds}" in readme_commands(root)


def test_readme_choices_are_the_committed_runs(root):
    files = [root / "results" / f"headpurify-choices-{target}.json" for target in ("photo", "sketch")]
    photo, sketch = (json.loads(file.read_text())["runs"][0] for file in files)
    assert photo["seed"] == sketch["seed"] == 1000
    for mode, result in photo["modes"].items():
        pair = (100 * part["holdout"]["accuracy"] for part in (result, sketch["modes"][mode]))
        assert "{:.1f} / {:.1f}".format(*pair) in (root / "README.md").read_text(), mode


@pytest.mark.slow
def test_main_job(checkout, root):
    """The table, the files, and a model that open_clip loads with the accuracy that was reported."""
    done = call(readme_script(root, "pip install -r requirements.txt && python headpurify.py"), checkout)
    assert done.returncode == 0, done.stderr
    for row in ("zero-shot", "lora", "ha-lora+dig"):
        assert re.search(rf"^{re.escape(row)} +\d\d\.\d", done.stdout, re.M), done.stdout
    assert "it/s" not in done.stderr  # no progress bars where nobody watches
    folder = checkout / "runs" / "headpurify" / "tiny-pacs-sketch-seed0"
    assert {entry.name for entry in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "model",
        "gates.png",
    }
    result = json.loads((folder / "result.json").read_text())
    numbers = result["modes"]["ha-lora+dig"]
    assert set(numbers["checkpoints"]) == {"last", "source_validated", "oracle"}
    assert numbers["target"]["accuracy"] == pytest.approx(
        numbers["checkpoints"]["source_validated"], abs=0.004
    )  # merged: two images
    for gates in numbers["gates"]:
        assert sum(gates) == pytest.approx(6, abs=1e-4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["mode"] for row in rows} == {"lora", "ha-lora+dig"} and all(0 <= row["target"] <= 1 for row in rows)

    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    model, preprocess, tokenizer = common.load_clip("tiny")
    target = common.tiny_domain("tiny-pacs", "sketch", 0, 0.4).balanced
    target.transform = preprocess
    features = common.class_features(model, tokenizer, target.classes)
    accuracy = common.evaluate(common.clip_classifier(plain.visual, features), {"sketch": target})["accuracy"]
    assert accuracy == numbers["target"]["accuracy"]


def test_same_command_twice_gives_the_same_numbers(checkout, pacs_tree):
    results = []
    for folder in ("one", "two"):
        done = call(
            f"headpurify.py --dataset pacs --data-root {pacs_tree} --model tiny --epochs 2 --batch-size 4 "
            f"--target photo --seed 3 --modes ha-lora+dig --output {folder}",
            checkout,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((checkout / folder / "headpurify" / "pacs-photo-seed3" / "result.json").read_text())
        results.append([{**numbers, "seconds": None} for numbers in result["modes"].values()])
    assert results[0] == results[1]


def test_real_benchmark_missing(checkout, root):
    done = call(readme_script(root, "python headpurify.py --dataset pacs --target sketch"), checkout)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and not (checkout / "runs").exists()
    for words in ("data/PACS", "<domain>/<class>/<image>", "DomainBed", "--data-root", "tiny-pacs"):
        assert words in done.stderr


def test_real_layout_all_targets_and_seeds(checkout, pacs_tree):
    done = call(
        f"headpurify.py --dataset pacs --target all --seeds 0 1 --data-root {pacs_tree} --model tiny --epochs 1 "
        "--batch-size 2 --workers 1 --modes zero-shot dig --summary all.json",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("pacs, target accuracy") :]
    assert all(name in table for name in (*common.BENCHMARKS["pacs"].domains, "average")) and "±" in table
    assert len(json.loads((checkout / "all.json").read_text())["runs"]) == 8
    assert len(list((checkout / "runs" / "headpurify").iterdir())) == 8


def damage(tree, how):
    pacs = tree / "PACS"
    if how == "class missing":
        shutil.rmtree(pacs / "cartoon" / "guitar")
    elif how == "class empty":
        for file in (pacs / "photo" / "horse").iterdir():
            file.unlink()
    elif how == "truncated":
        for file in (pacs / "photo" / "dog").iterdir():
            file.write_bytes(file.read_bytes()[:300])
    elif how == "no classes":
        shutil.rmtree(pacs / "art_painting")
        (pacs / "art_painting").mkdir()
    elif how == "domain missing":
        shutil.rmtree(pacs / "sketch")


@pytest.mark.parametrize(
    "how, workers, words",
    [
        ("class missing", 0, ("cartoon", "guitar")),
        ("class empty", 0, ("photo", "horse", "no image")),
        ("truncated", 0, ("cannot read image", "photo/dog/pic_00")),
        ("truncated", 1, ("cannot read image", "photo/dog/pic_00")),  # the error arises in another process
        ("no classes", 0, ("art_painting", "no class folders")),
        ("domain missing", 0, ("no domain folder 'sketch'",)),
    ],
)
def test_damaged_folder_is_one_clear_error(checkout, pacs_tree, how, workers, words):
    damage(pacs_tree, how)
    done = call(
        f"headpurify.py --dataset pacs --data-root {pacs_tree} --model tiny --epochs 1 --batch-size 8 "
        f"--workers {workers}",
        checkout,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert not list(checkout.glob("runs/**/*"))[1:]  # at most the empty folder runs/headpurify


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--target skech", ("skech", "did you mean 'sketch'")),
        ("--rank 0", ("--rank must be at least 1", "got 0", "--modes dig")),
        ("--dataset tiny-pac", ("unknown data set 'tiny-pac'", "tiny-pacs")),
        ("--dataset folder:nowhere", ("nowhere", "<domain>/<class>/<image>")),
        ("--cue 2", ("--cue", "2.0")),
        ("--epochs 0", ("--epochs must be at least 1",)),
        ("--model RN50 --pretrained nothing", ("nothing", "neither a file nor a tag")),
        ("--templates photo", ("{}", "'photo'")),
        ("--templates zebra{}", ("zebra",)),
        ("--device cuda", ("--device cuda", "no GPU")),
        ("--device gpu", ("--device", "gpu")),
        ("--seed -3", ("--seeds must be 0 or more", "-3")),
        ("--summary nowhere/all.json", ("--summary", "nowhere")),
    ],
)
def test_wrong_flag_is_one_clear_error(checkout, arguments, words):
    done = call(f"headpurify.py {arguments}", checkout, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert not list(checkout.glob("runs/**/*"))[1:]


def test_weights_that_cannot_be_downloaded(checkout, pacs_tree, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = call(f"headpurify.py --dataset pacs --data-root {pacs_tree}", checkout, **offline)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot load the weights of ViT-B-16 (openai)")
    assert "--pretrained FILE" in done.stderr and len(done.stderr.splitlines()) == 2


def test_empty_folder(checkout, tmp_path):
    (tmp_path / "empty").mkdir()
    done = call(f"headpurify.py --dataset folder:{tmp_path / 'empty'}", checkout)
    assert done.returncode == 2 and "no domain folder" in done.stderr and "Traceback" not in done.stderr


def test_unwritable_output(checkout):
    (checkout / "taken").write_text("a file where the folder should be")
    done = call("headpurify.py --output taken", checkout)
    assert done.returncode == 2 and "cannot write results to taken" in done.stderr and "--output" in done.stderr


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32, random weights from a file: trained, merged, exported, loaded by open_clip with its activation."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), tmp_path / "vit.pt")
    done = call(
        f"headpurify.py --dataset pacs --target sketch --data-root {pacs_tree} --model ViT-B-32-quickgelu "
        f"--pretrained {tmp_path / 'vit.pt'} --epochs 1 --batch-size 4 --modes ha-lora+dig",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / "headpurify" / "pacs-sketch-seed0"
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}")
    assert type(plain.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    numbers = json.loads((folder / "result.json").read_text())["modes"]["ha-lora+dig"]
    assert numbers["trainable_parameters"] == 36 * 2 * (12 * 768 + 12 * 64) + 144
    model, preprocess, tokenizer = common.load_clip(f"local-dir:{folder / 'model'}")
    domains = common.load_domains("pacs", pacs_tree)
    split = common.leave_one_out(domains, "sketch", preprocess, preprocess)
    features = common.class_features(model, tokenizer, domains[0].images.classes)
    assert (
        common.evaluate(common.clip_classifier(model.visual, features), split.target)["accuracy"]
        == numbers["target"]["accuracy"]
    )


def test_pictures_are_pictures(root):
    with Image.open(root / "assets" / "tiny_world.png") as image:
        assert image.width >= 16 * 32 * 2 and image.height >= 4 * 32 * 2
