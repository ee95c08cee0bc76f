"""The README's commands as they stand, and commands on folders in the layout of PACS."""

import json
import re
import shutil

import open_clip
import pytest
import torch
from conftest import call, readme_script, write_image

import clipood
import common
import headpurify


@pytest.mark.slow
def test_main_job(checkout, root):
    """The table, the files, and a model that open_clip loads with the reported accuracy."""
    command = "pip install -r requirements.txt && python headpurify.py"
    done = call(readme_script(root, command), checkout)
    assert done.returncode == 0, done.stderr
    for row in ("zero-shot", "lora", "ha-lora+dig"):
        assert re.search(rf"^{re.escape(row)} +\d\d\.\d", done.stdout, re.M), done.stdout
    assert "Best target accuracy: " in done.stdout and "runs/headpurify" in done.stdout
    assert "it/s" not in done.stderr  # no progress bars where nobody watches
    folder = checkout / "runs" / "headpurify" / "tiny-pacs-sketch-seed0"
    assert {entry.name for entry in folder.iterdir()} == {"result.json", "model", "gates.png"}
    result = json.loads((folder / "result.json").read_text())
    numbers, extra = (result[part]["ha-lora+dig"] for part in ("rows", "extra"))
    for gates in extra["gates"]:
        assert sum(gates) == pytest.approx(6, abs=1e-4)
    best = max(extra["history"], key=lambda row: row["hold-out"])
    assert numbers["target"] == pytest.approx(best["target"], abs=0.004)  # merged: two images

    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    clip = common.load_clip("tiny")
    *_, sketch = common.load_domains("tiny-pacs")
    tests = {"target": {"sketch": sketch.balanced.transformed(clip.preprocess)}}
    class_features = clip.class_features(sketch.balanced.classes)
    found = common.evaluate(common.clip_classifier(plain.visual, class_features), tests)
    assert found["target"] == numbers["target"]


def test_same_command_twice_gives_the_same_bytes(call_main, checkout, pacs_tree, tmp_path):
    """Once in a process of its own, once in this one, which has drawn numbers before."""
    line = (
        f"--dataset pacs --data-root {pacs_tree} --model tiny --epochs 1 --batch-size 4 "
        "--target photo --seed 3 --modes ha-lora+dig"
    )
    done = call("headpurify.py " + line, checkout)
    assert done.returncode == 0, done.stderr
    call_main(headpurify.main, line)
    results = []
    for folder in (checkout, tmp_path):
        run = folder / "runs" / "headpurify" / "pacs-photo-seed3"
        files = [path for path in sorted(run.rglob("*")) if path.is_file()]
        results.append([(path.relative_to(run), path.read_bytes()) for path in files])
    assert results[0] and results[0] == results[1]


def test_real_benchmark_missing(call_main, root, tmp_path):
    command = readme_script(root, "python headpurify.py --dataset pacs --target sketch")
    error = call_main(headpurify.main, command.removeprefix("headpurify.py "))
    layout = "data/PACS", "<domain>/<class>/<image>", "DomainBed", "--data-root", "tiny-pacs"
    assert all(words in error for words in layout), error
    assert not (tmp_path / "runs").exists()


def test_too_few_images_are_named(call_main, tmp_path):
    for domain in ("art", "photo", "sketch"):
        for name in ("dog", "horse"):
            write_image(tmp_path / "own" / domain / name / "0.png", shade=5)
    error = call_main(clipood.main, "--dataset folder:own --model tiny --task in-the-wild")
    few = "there are too few to split them"
    assert error == f"error: no image of 'art' is left for the test 'hold-out': {few}\n"


def test_real_layout_all_targets_and_seeds(call_main, pacs_tree, tmp_path):
    output = call_main(
        headpurify.main,
        f"--dataset pacs --target all --seeds 0 1 --data-root {pacs_tree} --model tiny --epochs 1 "
        "--batch-size 12 --workers 0 --modes zero-shot dig --summary all.json",
    )
    table = output[output.index("pacs, target accuracy") :]
    names = ("art_painting", "cartoon", "photo", "sketch", "average")
    assert all(name in table for name in names) and "±" in table
    assert len(json.loads((tmp_path / "all.json").read_text())["records"]) == 8
    assert len(list((tmp_path / "runs" / "headpurify").iterdir())) == 8


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


LORA = "--dataset pacs --data-root {} --model tiny --epochs 1 --batch-size 8 --modes lora"


@pytest.mark.parametrize(
    "how, words",
    [
        ("class missing", ("cartoon", "guitar")),
        ("class empty", ("photo", "horse", "no image")),
        ("truncated", ("cannot read image", "photo/dog/pic_00")),
        ("no classes", ("art_painting", "no class folders")),
        ("domain missing", ("no domain folder 'sketch'",)),
    ],
)
def test_damaged_folder_is_one_clear_error(call_main, pacs_tree, tmp_path, how, words):
    damage(pacs_tree, how)
    error = call_main(headpurify.main, LORA.format(pacs_tree) + " --workers 0")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


def test_what_another_process_cannot_read_is_one_clear_error(checkout, pacs_tree):
    damage(pacs_tree, "truncated")
    done = call(f"headpurify.py {LORA.format(pacs_tree)} --workers 1", checkout)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "cannot read image" in done.stderr and "photo/dog/pic_00" in done.stderr
    assert not (checkout / "runs").exists()


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32, random weights from a file: trained, merged, exported, loaded as it was."""
    torch.manual_seed(0)
    weights = tmp_path / "vit.pt"
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), weights)
    done = call(
        f"headpurify.py --dataset pacs --target sketch --data-root {pacs_tree} --epochs 1 "
        f"--model ViT-B-32-quickgelu --pretrained {weights} --batch-size 4 --modes ha-lora+dig",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / "headpurify" / "pacs-sketch-seed0"
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}")
    assert type(plain.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    result = json.loads((folder / "result.json").read_text())
    parameters = 36 * 2 * (12 * 768 + 12 * 64) + 144
    assert result["extra"]["ha-lora+dig"]["parameters"] == parameters
    clip = common.load_clip(f"local-dir:{folder / 'model'}")
    domains = common.load_domains("pacs", pacs_tree)
    task = common.leave_one_out(domains, "sketch")
    task = task.transformed(clip)
    classify = common.clip_classifier(clip.visual, clip.class_features(task.classes))
    found = common.evaluate(classify, {"target": task.tests["target"]})
    assert found["target"] == result["rows"]["ha-lora+dig"]["target"]
