"""Commands from start to export, and on folders in the layout of PACS."""

import json
import re
import shutil

import open_clip
import pytest
import torch
from conftest import call, write_image

import clipood
import common
import headpurify


def test_main_job(call_main, small_world, tmp_path):
    """The table, the files, and a model that open_clip loads with the reported accuracy."""
    output = call_main(headpurify.main, "--epochs 2 --batch-size 12")
    for row in ("zero-shot", "lora", "ha-lora+dig"):
        assert re.search(rf"^{re.escape(row)} +\d\d\.\d", output, re.M), output
    assert "Best target accuracy: " in output and "runs/headpurify" in output
    folder = tmp_path / "runs" / "headpurify" / "tiny-pacs-sketch-seed0"
    assert {entry.name for entry in folder.iterdir()} == {"result.json", "model", "gates.png"}
    result = json.loads((folder / "result.json").read_text())
    numbers, extra = (result[part]["ha-lora+dig"] for part in ("rows", "extra"))
    for gates in extra["gates"]:
        assert sum(gates) == pytest.approx(6, abs=1e-4)
    best = max(extra["history"], key=lambda row: row["hold-out"])
    assert numbers["target"] == pytest.approx(best["target"], abs=1e-9)

    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    clip = common.load_clip("tiny")
    *_, sketch = common.load_domains("tiny-pacs")
    tests = {"target": {"sketch": sketch.balanced.transformed(clip.preprocess)}}
    class_features = clip.class_features(sketch.balanced.classes)
    found = common.evaluate(common.clip_classifier(plain.visual, class_features), tests)
    assert found["target"] == numbers["target"]


TINY = "--dataset pacs --data-root {} --model tiny --epochs 1 --batch-size 8"


def test_same_command_twice_gives_the_same_bytes(call_main, checkout, pacs_tree, tmp_path):
    """In a new process with a worker that reads images, and in this one without."""
    line = TINY.format(pacs_tree) + " --target photo --seed 3 --modes ha-lora+dig"
    done = call(f"headpurify.py {line} --workers 1", checkout)
    assert done.returncode == 0, done.stderr
    call_main(headpurify.main, f"{line} --workers 0")
    results = []
    for folder in (checkout, tmp_path):
        run = folder / "runs" / "headpurify" / "pacs-photo-seed3"
        files = [path for path in sorted(run.rglob("*")) if path.is_file()]
        results.append([(path.relative_to(run), path.read_bytes()) for path in files])
    assert results[0] and results[0] == results[1]


def test_real_benchmark_missing(call_main, tmp_path):
    error = call_main(headpurify.main, "--dataset pacs --target sketch")
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
    line = TINY.format(pacs_tree) + " --target all --seeds 0 1 --workers 0 --modes zero-shot"
    output = call_main(headpurify.main, f"{line} --summary all.json")
    table = output[output.index("pacs, target accuracy") :]
    names = ("art_painting", "cartoon", "photo", "sketch", "average")
    assert all(name in table for name in names) and "±" in table
    assert len(json.loads((tmp_path / "all.json").read_text())["records"]) == 8
    assert len(list((tmp_path / "runs" / "headpurify").iterdir())) == 8


def damage(tree, how):
    pacs = tree / "PACS"
    if how == "class missing":
        shutil.rmtree(pacs / "cartoon" / "guitar")
    elif how == "truncated":
        for file in (pacs / "photo" / "dog").iterdir():
            file.write_bytes(file.read_bytes()[:300])
    elif how == "domain missing":
        shutil.rmtree(pacs / "sketch")


@pytest.mark.parametrize(
    "how, words, workers",
    [
        ("class missing", ("cartoon", "guitar"), 0),
        ("truncated", ("cannot read image", "photo/dog/pic_00"), 0),
        ("truncated", ("cannot read image", "photo/dog/pic_00"), 1),
        ("domain missing", ("no domain folder 'sketch'",), 0),
    ],
)
def test_damaged_folder_is_one_clear_error(call_main, pacs_tree, tmp_path, how, words, workers):
    damage(pacs_tree, how)
    line = f"{TINY.format(pacs_tree)} --modes lora --workers {workers}"
    error = call_main(headpurify.main, line)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


def test_open_clip_model_on_a_real_layout(call_main, small_vit, pacs_tree, tmp_path):
    """QuickGELU, random weights from a file: trained, merged, exported, loaded as it was."""
    torch.manual_seed(0)
    weights = tmp_path / "vit.pt"
    torch.save(open_clip.create_model(small_vit).state_dict(), weights)
    line = TINY.format(pacs_tree).replace("--model tiny", f"--model {small_vit}")
    line += f" --target sketch --pretrained {weights} --modes ha-lora+dig --workers 0"
    call_main(headpurify.main, line)
    folder = tmp_path / "runs" / "headpurify" / "pacs-sketch-seed0"
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}")
    assert type(plain.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    result = json.loads((folder / "result.json").read_text())
    ranks = 2 + 8 + 8  # of the three layers; of queries and of values, by 4 heads
    parameters = 2 * ranks * (4 * 48 + 4 * 12) + 3 * 4
    assert result["extra"]["ha-lora+dig"]["parameters"] == parameters
    clip = common.load_clip(f"local-dir:{folder / 'model'}")
    task = common.leave_one_out(common.load_domains("pacs", pacs_tree), "sketch").transformed(clip)
    classify = common.clip_classifier(clip.visual, clip.class_features(task.classes))
    found = common.evaluate(classify, {"target": task.tests["target"]})
    assert found["target"] == result["rows"]["ha-lora+dig"]["target"]
