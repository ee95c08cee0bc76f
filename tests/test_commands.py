"""The README's commands as they stand, and what a user meets who gives something wrong."""

import json
import re
import shutil
import sys

import open_clip
import pytest
import torch
from conftest import call, readme_script
from PIL import Image
from support.command import command_lines, several, until_settled
from support.report import Elsewhere, average_records

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


def test_real_benchmark_missing(checkout, root):
    command = "python headpurify.py --dataset pacs --target sketch"
    done = call(readme_script(root, command), checkout)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and not (checkout / "runs").exists()
    layout = "data/PACS", "<domain>/<class>/<image>", "DomainBed", "--data-root", "tiny-pacs"
    assert all(words in done.stderr for words in layout), done.stderr


def test_real_layout_all_targets_and_seeds(call_main, pacs_tree, tmp_path):
    output = call_main(
        headpurify.main,
        f"--dataset pacs --target all --seeds 0 1 --data-root {pacs_tree} --model tiny --epochs 1 "
        "--batch-size 4 --workers 0 --modes zero-shot dig --summary all.json",
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
    task = task.transformed(clip.preprocess, clip.preprocess)
    classify = common.clip_classifier(clip.visual, clip.class_features(task.classes))
    found = common.evaluate(classify, {"target": task.tests["target"]})
    assert found["target"] == result["rows"]["ha-lora+dig"]["target"]


def test_pictures_are_pictures(root):
    with Image.open(root / "assets" / "tiny_world.png") as image:
        assert image.width >= 16 * 32 * 2 and image.height >= 4 * 32 * 2


# ---------- Several data sets --------------------------------------------------------------------
def test_a_command_line_for_each_data_set():
    line = "--target all --dataset pacs vlcs --seeds 0 1".split()
    lines = command_lines(line)
    assert list(lines) == ["pacs", "vlcs"]
    assert lines["vlcs"] == "--target all --dataset vlcs --seeds 0 1".split()
    assert command_lines(["--seeds", "0"]) == {"": ["--seeds", "0"]}


def made_up(rows):
    """Records of two seeds and two targets, of {row: {measure: [number of each record]}}."""
    places = [(seed, target) for seed in (3, 4) for target in ("x", "y")]
    records = []
    for place, (seed, target) in enumerate(places):
        own = {}
        for row, numbers in rows.items():
            own[row] = {measure: values[place] for measure, values in numbers.items()}
        records.append({"target": target, "seed": seed, "rows": own})
    return records


def test_shared_runs_are_looked_at_again_as_long_as_fewer_are_left():
    """One data set after another: the first has two runs in other hands, then one, then one."""
    left = iter([["a", "b"], ["b"], ["b"], []])
    seen = []

    def main():
        dataset = sys.argv[-1]
        seen.append(dataset)
        if dataset == "first":
            raise Elsewhere(next(left))
        return [], "target"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Elsewhere, match="processes: b."):
        patch.setattr(sys, "argv", ["script", "--dataset", "first", "second"])
        lines = command_lines(sys.argv[1:])
        until_settled(lambda: several(main, lines))
    assert seen == ["first", "second"] * 3


def test_average_over_data_sets_by_hand():
    """Targets within a data set first, then data sets, a seed at a time; H of the averages."""
    a = made_up(
        {
            "ms": {"base": [0.2, 0.4, 0.6, 0.8], "new": [0.1, 0.1, 0.2, 0.2], "H": [0.0] * 4},
            "linear": {"base": [0.5] * 4},
        }
    )
    b = made_up({"ms": {"base": [0.9] * 4, "new": [0.3, 0.5, 0.8, 0.8], "H": [0.0] * 4}})
    averaged = average_records({"a": a, "b": b})
    assert [record["seed"] for record in averaged] == [3, 4]
    for record, base, new in zip(averaged, ((0.3 + 0.9) / 2, 0.8), ((0.1 + 0.4) / 2, 0.5)):
        assert list(record["rows"]) == ["ms"]  # the other set has no linear
        numbers = record["rows"]["ms"]
        assert numbers["base"] == pytest.approx(base) and numbers["new"] == pytest.approx(new)
        assert numbers["H"] == pytest.approx(2 / (1 / base + 1 / new))


def test_several_data_sets_end_in_their_average_and_name_what_is_missing(
    call_main, small_world, pacs_tree, tmp_path
):
    line = f"--data-root {pacs_tree} --model tiny --modes zero-shot --target photo --workers 0"
    error = call_main(clipood.main, f"--dataset pacs vlcs tiny-pacs {line}")
    assert error == "error: not in the average: vlcs; it is said above why\n"
    assert {run.name for run in (tmp_path / "runs" / "clipood").iterdir()} == {
        "pacs-photo-seed0",
        "tiny-pacs-photo-seed0",
    }
    output = call_main(clipood.main, f"--dataset pacs tiny-pacs {line}")
    assert re.search(r"target, % +pacs +tiny-pacs +average", output)
    first, second, mean = re.findall(r"^zero-shot +(.*)$", output, re.M)[-2].split()
    assert float(mean) == pytest.approx((float(first) + float(second)) / 2, abs=0.06)
    error = call_main(clipood.main, f"--dataset pacs tiny-pacs {line} --summary all.json")
    assert "--summary" in error and not (tmp_path / "all.json").exists()
