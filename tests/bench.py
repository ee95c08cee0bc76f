"""What the methods' extras cost, as ratios of two ways that take turns in one run.

Taking turns slows both ways alike on a busy machine. Operations, and those for which a GPU would be
waited for, are counted on a CPU, under bf16 autocast as on a GPU.

    python tests/bench.py headpurify | clipood | vit_diverse | ldfs | reading
    python tests/bench.py --gpu         # training steps with ViT-B/16: results/speed-<GPU>.json
"""

import argparse
import copy
import functools
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training_steps import STEPS, make_batch, operations

import common
import headpurify
import ldfs
import vit_diverse
from clipood import BetaMovingAverage, margin_metric_softmax
from support import InputError, runs, slug


def median_seconds(ways: dict, repeats: int, wait=lambda: None) -> dict[str, float]:
    """Of every way {name: function}: after a call to warm up, `repeats` calls in turn. wait: for
    what a GPU was told to do."""
    seconds = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            way()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured[1:]) for name, measured in seconds.items()}


def print_operations(name: str) -> None:
    """Of a training step, with ViT-B/16's layers, beside the one it is compared with."""
    _, other = STEPS[name]
    counted, reference = operations(name), operations(other)
    ratio = counted.launched / reference.launched
    print(f"{name}: {counted.launched:,} operations in a step, {counted.waits} of them wait")
    print(f"  {ratio:.2f} of {other}'s {reference.launched:,}")


# ---------- headpurify ---------------------------------------------------------------------------
def bench_headpurify(repeats: int) -> None:
    """A purification step with both gradients beside full fine-tuning, merged beside CLIP."""
    print_operations("headpurify")
    for name in ("tiny", "ViT-B-32"):
        torch.manual_seed(0)
        clip = common.load_clip("tiny").model if name == "tiny" else open_clip.create_model(name)
        bench_purification(name, clip.visual, repeats)


def bench_purification(name: str, tower, repeats: int) -> None:
    batch = make_batch(tower, 12, classes=7)
    options = "--device cpu --precision fp32"
    ways = {step: STEPS[step][0](tower, batch, options) for step in ("full", "headpurify")}
    seconds = median_seconds(ways, repeats)
    ratio = seconds["headpurify"] / seconds["full"]
    print(f"{name}: a step of purification / of full fine-tuning: {ratio:.2f} (bound: 1.3)")

    merged = copy.deepcopy(tower)
    headpurify.purify(merged)
    headpurify.merge(merged)
    models = {"CLIP": tower.eval(), "merged": merged.eval()}
    ways = {kind: functools.partial(model, batch.images) for kind, model in models.items()}
    with torch.no_grad():
        seconds = median_seconds(ways, 4 * repeats)
    ratio = seconds["merged"] / seconds["CLIP"]
    print(f"  inference, merged / CLIP: {ratio:.2f} (bounds: 0.97, 1.03)")


# ---------- clipood ------------------------------------------------------------------------------
def bench_clipood(repeats: int) -> None:
    """The running average beside a training step: ViT-B-32, random weights, batch 36."""
    print_operations("clipood")
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=5e-6, weight_decay=0.1)
    batch = make_batch(tower, 36)
    average = BetaMovingAverage(tower, steps=5000, beta=0.5)

    def step():
        features = F.normalize(tower(batch.images), dim=-1)
        loss = margin_metric_softmax(features, batch.class_features, batch.labels, 100, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ways = {"step": step, "update": lambda: average.update(tower)}
    seconds = median_seconds(ways, repeats)
    share = 100 * seconds["update"] / seconds["step"]
    print(f"training step: {seconds['step']:.2f} s")
    print(f"BetaMovingAverage.update: {share:.2f} % of it (bound: 1.5 %)")


# ---------- vit_diverse --------------------------------------------------------------------------
def bench_vit_diverse(repeats: int) -> None:
    """The regulariser in one call against one for every head; all subsets of 12 heads."""
    print_operations("vit_diverse")
    for heads in (4, 12):
        torch.manual_seed(0)
        model = vit_diverse.DiverseViT((64, 32), 4, 2, dim=64, depth=6, heads=heads, mlp_dim=128)
        bench_regulariser(model, repeats)
    outputs, labels = torch.randn(1200, 12, 64), torch.randint(2, (1200,))
    ways = {"search": lambda: vit_diverse.select_heads(model, outputs, labels)}
    seconds = median_seconds(ways, 1)["search"]
    print(f"4,095 subsets of 12 heads over 1,200 images: {seconds:.1f} s")


def one_call(model, tokens):
    """Our way: the last layer reads a copy for each head, one call of autograd for all."""
    inputs = model.last.head_inputs(tokens)
    logits = model.logits(model.last.head_outputs(inputs))
    return logits, vit_diverse.input_gradient_loss(logits, inputs)


def call_per_head(model, tokens):
    """The published way: full attention, and a pass of its own for the gradient of every head."""
    last = model.last
    copies = [last.norm(tokens) for _ in range(last.heads)]
    weights = last.qkv.weight.view(3, last.heads, -1, tokens.shape[-1]).transpose(0, 1)
    outputs = []
    for x, (w_q, w_k, w_v) in zip(copies, weights):
        scores = (x @ w_q.T) @ (x @ w_k.T).mT / len(w_q) ** 0.5  # (B, N, N)
        outputs.append(scores.softmax(-1) @ (x @ w_v.T))
    x = last.out(torch.cat(outputs, -1))
    logits = model.classifier((x + last.mlp(last.mlp_norm(x)))[:, 0])
    score = logits.max(1).values.sum()
    gradients = [torch.autograd.grad(score, x, create_graph=True)[0] for x in copies]
    cosines = vit_diverse.gradient_products(F.normalize(torch.stack(gradients), dim=-1))
    return logits, cosines.square().sum((-1, -2)).mean() / last.heads**2


def without(model, tokens):
    """ERM: no regulariser."""
    return model.logits(model.last.head_outputs(model.last.head_inputs(tokens))), 0


def bench_regulariser(model, repeats: int) -> None:
    images, labels = torch.rand(80, 3, 64, 32), torch.randint(2, (80,))
    tokens = model.trunk(images).detach().requires_grad_()
    expected = call_per_head(model, tokens)[1]
    torch.testing.assert_close(one_call(model, tokens)[1], expected, rtol=1e-3, atol=0)

    def step(way):
        logits, loss = way(model, model.trunk(images))
        model.zero_grad()
        (F.cross_entropy(logits, labels) + 100 * loss).backward()

    ways = {"ERM": without, "DIV": one_call, "DIV, a call per head": call_per_head}
    steps = {name: functools.partial(step, way) for name, way in ways.items()}
    seconds = median_seconds(steps, repeats)
    for name in [*ways][1:]:
        ratio = seconds[name] / seconds["ERM"]
        print(f"{model.last.heads} heads, training step, {name} / ERM: {ratio:.2f}")


# ---------- ldfs ---------------------------------------------------------------------------------
def bench_ldfs(repeats: int) -> None:
    """Directions of a batch at once against a loop over its samples, as in LADS' code."""
    print_operations("ldfs, features")
    torch.manual_seed(0)
    features, source, target, mapped = F.normalize(torch.randn(4, 256, 512), dim=-1)
    mapped = mapped.clone().requires_grad_()

    def loop():
        losses = []
        for f, m, s, t in zip(features, mapped, source, target):
            losses.append(1 - F.cosine_similarity(m - f, t - s, dim=0))
        return torch.stack(losses).mean()

    def batch():
        return ldfs.local_direction_loss(features, mapped, source, target)

    torch.testing.assert_close(loop(), batch(), atol=1e-6, rtol=0)
    ways = {"loop": lambda: loop().backward(), "batch": lambda: batch().backward()}
    seconds = median_seconds(ways, repeats)
    ratio = seconds["loop"] / seconds["batch"]
    print(f"direction loss of 256 samples, a loop over them / all at once: {ratio:.0f}")


# ---------- Reading ------------------------------------------------------------------------------
def draw_photos(folder: Path, count: int) -> list[str]:
    """JPEGs of 500 x 400 with colours and detail at all scales, as photographs have."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        picture = np.zeros((400, 500, 3))
        for side in (3, 12, 50, 200):
            coarse = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            picture += np.asarray(Image.fromarray(coarse).resize((500, 400))) / 4
        files.append(f"{folder}/{number}.jpg")
        Image.fromarray(picture.astype(np.uint8)).save(files[-1], quality=90)
    return files


def bench_reading(repeats: int) -> None:
    """Training batches for ViT-B-16 from 512 JPEGs, read by one process."""
    augment = common.image_transform(open_clip.create_model("ViT-B-16"), train=True)
    augment.normalize = torch.Tensor.detach  # as it is: the rest is a GPU's work
    with tempfile.TemporaryDirectory() as folder:
        files, labels = np.array(draw_photos(Path(folder), 512)), torch.zeros(512).long()
        images = common.ImageSet(files, labels, ("any",), transform=augment)

        def epoch():
            for _ in common.source_batches({"photos": images}, 32, seed=0, stop=16, workers=1):
                pass

        seconds = median_seconds({"epoch": epoch}, repeats)["epoch"]
    print(f"{512 / seconds:.0f} JPEGs a second and core")


# ---------- On a GPU -----------------------------------------------------------------------------
def bench_gpu(repeats: int) -> None:
    """Training steps of all methods with ViT-B/16, random weights, images made on the GPU."""
    if not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no GPU here")
    tower = open_clip.create_model("ViT-B-16").visual.to("cuda")
    precision = runs.pick_precision("auto", torch.device("cuda"))
    compare_speeds(tower, (36, 256), "cuda", torch.cuda.get_device_name(), precision, repeats)


def compare_speeds(tower, sizes, device: str, name: str, precision: str, repeats: int) -> None:
    """Steps on batches of some sizes, eager and compiled, printed and written to results/."""
    rows = []
    for size in sizes:
        options = f"--device {device} --precision {precision}"
        try:
            rows += measure(tower, size, device, options, repeats)
        except torch.OutOfMemoryError:
            print(f"batches of {size} do not fit into this GPU's memory")
    print(f"{'step':28}{'batch':>7}{'images/s':>10}{'of its other':>14}{'GB':>7}")
    for row in rows:
        step = row["step"] + ", compiled" * row["compiled"]
        print(f"{step:28}{row['batch']:7}{row['images/s']:10.0f}{row['ratio']:14.2f}", end="")
        print(f"{row['peak bytes'] / 1e9:7.1f}")
    file = Path("results", f"speed-{slug(name)}.json")
    measured = {"device": name, "torch": torch.__version__, "precision": precision, "rows": rows}
    runs.write_json(file, measured)
    print(f"written to {file}")


def measure(tower, size: int, device: str, options: str, repeats: int) -> list[dict]:
    """A row for each step of training_steps.py, eager and compiled, on batches of a size. ratio: of
    its seconds to those of the step that it is compared with."""
    on_gpu = device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    batch, seconds, rows = make_batch(tower, size, device=device), {}, []
    for name, (make, other) in STEPS.items():
        for compiled in (False, True):
            if compiled and name.startswith("ldfs"):  # which trains no tower
                continue
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step = make(tower, batch, options + " --compile" * compiled)
            step()  # the first fills the optimizer and compiles
            step()
            seconds[name, compiled] = median_seconds({"step": step}, repeats, wait)["step"]
            row = {"step": name, "batch": size, "compiled": compiled, "compared with": other}
            row["seconds"] = seconds[name, compiled]
            row["images/s"] = size / row["seconds"]
            row["ratio"] = row["seconds"] / seconds[other, compiled]
            row["peak bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
            rows.append(row)
            del step  # its memory is free for the next
    return rows


BENCHES = {
    "headpurify": bench_headpurify,
    "clipood": bench_clipood,
    "vit_diverse": bench_vit_diverse,
    "ldfs": bench_ldfs,
    "reading": bench_reading,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("method", choices=BENCHES, nargs="?")
    parser.add_argument("--gpu", action="store_true", help="training steps on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.gpu == bool(args.method):
        parser.error(f"give a method, {', '.join(BENCHES)}, or --gpu")
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns: "No pretrained weights"
    bench = bench_gpu if args.gpu else BENCHES[args.method]
    bench(args.repeats)


if __name__ == "__main__":
    runs.command(main)
