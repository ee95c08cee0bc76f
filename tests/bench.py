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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def medians(ways: dict, repeats: int) -> dict[str, float]:
    """Median seconds of every way {name: function}: a call to warm up, then `repeats` in turn."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def saved_bytes(forward, weights) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, without the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _alive = forward()  # nothing is freed before it is counted
    return sum(kept.values())


def training_bytes(forward, tower, optimizer) -> int:
    """Activations, gradients and optimizer states of a training step."""
    states = [state for own in optimizer.state.values() for state in own.values()]
    tensors = [state for state in states if torch.is_tensor(state)]
    tensors += [p for p in tower.parameters() if p.requires_grad]  # as large as their gradients
    return saved_bytes(forward, tower.parameters()) + sum(tensor.nbytes for tensor in tensors)


def print_operations(*names: str) -> None:
    """Of a training step of each, with ViT-B/16's layers; see training_steps.py."""
    from training_steps import STEPS, operations

    logging.disable(logging.INFO)
    counts = {}
    for name in names:
        other = STEPS[name][1]
        for one in (name, other):
            counts[one] = counts.get(one) or operations(one)
        found, against = counts[name], counts[other].launched
        share = f"{found.launched / against:.2f} of {other}'s {against:,}"
        print(f"{name}: {found.launched:,} operations in a step, {share}; {found.waits} wait")


def headpurify(repeats: int) -> None:
    """A purification step with both gradients beside full fine-tuning, merged beside CLIP."""
    import common

    print_operations("headpurify")
    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    for name in ("tiny", "ViT-B-32"):
        torch.manual_seed(0)
        clip = common.load_clip("tiny").model if name == "tiny" else open_clip.create_model(name)
        bench_purification(name, clip.visual, repeats)
    print_activations(open_clip.create_model("ViT-B-16").visual)


def print_activations(tower, batch: int = 36) -> None:
    """What a pass under bf16 autocast, as on a GPU, keeps for its gradient."""
    from headpurify import purify

    images = torch.randn(batch, 3, *tower.image_size)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return tower(images)

    kept = {"full": saved_bytes(forward, tower.parameters())}
    purify(tower)
    kept["purified"] = saved_bytes(forward, tower.parameters())
    found = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in kept.items())
    print(f"ViT-B-16: activations of {batch} images in bf16: {found}")


def bench_purification(name: str, clip, repeats: int) -> None:
    from headpurify import merge, mmd_loss, purify, route_gradients

    labels = torch.arange(12) % 7
    full, purified = (copy.deepcopy(clip).requires_grad_(True) for _ in range(2))
    layers = purify(purified)
    lora = [parameter for layer in layers for parameter in layer.lora_parameters()]
    gates = [layer.gate_logits for layer in layers]
    side = clip.image_size[0] if isinstance(clip.image_size, tuple) else clip.image_size
    images = torch.randn(12, 3, side, side)
    text = F.normalize(torch.randn(7, clip.output_dim), dim=-1)
    full_optimizer = torch.optim.AdamW(full.parameters(), lr=1e-5)
    optimizer = torch.optim.AdamW(lora + gates, lr=1e-3)

    def loss(tower):
        features = tower(images)
        return F.cross_entropy(100 * F.normalize(features, dim=-1) @ text.T, labels), features

    def full_step():
        full_optimizer.zero_grad()
        loss(full)[0].backward()
        full_optimizer.step()

    def both_losses():
        loss_cls, features = loss(purified)
        return loss_cls, mmd_loss([features], 3)

    def purify_step():
        route_gradients(*both_losses(), lora + gates, gates, alpha=1)
        optimizer.step()

    found = medians({"full": full_step, "purify": purify_step}, repeats)
    ratio = found["purify"] / found["full"]
    print(f"{name}: a step of purification / of full fine-tuning: {ratio:.2f} (bound: 1.3)")
    memory = training_bytes(lambda: loss(full), full, full_optimizer)
    ratio = training_bytes(both_losses, purified, optimizer) / memory
    print(f"  activations, gradients, optimizer: {ratio:.2f} of {memory / 1e6:.0f} MB (bound: 1)")
    merge(purified)

    @torch.no_grad()
    def infer(tower):
        tower.eval()(images)

    ways = {"CLIP": lambda: infer(clip), "merged": lambda: infer(purified)}
    found = medians(ways, 4 * repeats)
    ratio = found["merged"] / found["CLIP"]
    print(f"  inference, merged / CLIP: {ratio:.2f} (bounds: 0.97, 1.03)")


def clipood(repeats: int) -> None:
    """The running average beside a training step: ViT-B-32, random weights, batch 36."""
    from clipood import BetaMovingAverage, margin_metric_softmax

    print_operations("clipood", "clipood, published loop")
    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=5e-6, weight_decay=0.1)
    images, labels = torch.randn(36, 3, 224, 224), torch.randint(65, (36,))
    text = F.normalize(torch.randn(65, 512), dim=-1)
    size = sum(parameter.nbytes for parameter in tower.parameters())

    def step():
        features = F.normalize(tower(images), dim=-1)
        loss = margin_metric_softmax(features, text, labels, 100, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = resident()  # nothing was freed yet, so what is added is seen
    fused = BetaMovingAverage(tower, steps=5000, beta=0.5)
    fused.update(tower)
    added = (resident() - before) / size
    print(f"memory it adds: {added:.2f} copies of the weights ({size / 1e6:.0f} MB)")
    average = list(fused.model.parameters())

    @torch.no_grad()
    def loop():
        for mean, parameter in zip(average, tower.parameters()):
            mean.mul_(0.9).add_(parameter, alpha=0.1)

    ways = {"step": step, "update": lambda: fused.update(tower), "loop": loop}
    found = medians(ways, repeats)
    update, loop = (100 * found[name] / found["step"] for name in ("update", "loop"))
    print(f"training step: {found['step']:.2f} s")
    print(f"BetaMovingAverage.update: {update:.2f} % of it (bound: 1.5 %)")
    print(f"a loop of mul_ and add_ over the tensors: {loop:.2f} % of it")


def vit_diverse(repeats: int) -> None:
    """The regulariser in one call against one for every head; all subsets of 4 and 12 heads."""
    from vit_diverse import DiverseViT, select_heads

    print_operations("vit_diverse")
    for heads in (4, 12):
        torch.manual_seed(0)
        model = DiverseViT((64, 32), 4, 2, dim=64, depth=6, heads=heads, mlp_dim=128)
        bench_regulariser(model, heads, repeats)
    outputs, labels = torch.randn(1200, heads, 64), torch.randint(2, (1200,))
    found = medians({"search": lambda: select_heads(model, outputs, labels)}, 1)
    subsets = f"{2**heads - 1} subsets of {heads} heads over 1,200 images"
    print(f"{subsets}: {found['search']:.1f} s")


def one_call(model, tokens):
    """Our way: the last layer reads a copy for each head, one call of autograd for all."""
    from vit_diverse import input_gradient_loss

    inputs = model.last.head_inputs(tokens)
    logits = model.logits(model.last.head_outputs(inputs))
    return logits, input_gradient_loss(logits, inputs)


def call_per_head(model, tokens):
    """The published way: full attention, and a pass of its own for the gradient of every head."""
    from vit_diverse import gradient_products

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
    cosines = gradient_products(F.normalize(torch.stack(gradients), dim=-1))
    return logits, cosines.square().sum((-1, -2)).mean() / last.heads**2


def bench_regulariser(model, heads: int, repeats: int) -> None:
    images, labels = torch.rand(80, 3, 64, 32), torch.randint(2, (80,))
    last = model.last
    tokens = model.trunk(images).detach().requires_grad_()
    ends = [tokens, *last.parameters()]
    differ = one_call(model, tokens)[1] / call_per_head(model, tokens)[1] - 1

    def regulariser(way):
        return lambda: torch.autograd.grad(way(model, tokens)[1], ends, allow_unused=True)

    def step(way=None):
        def run():
            tokens = model.trunk(images)
            if way is None:
                logits, loss = model.logits(last.head_outputs(last.head_inputs(tokens))), 0
            else:
                logits, loss = way(model, tokens)
            model.zero_grad()
            (F.cross_entropy(logits, labels) + 100 * loss).backward()

        return run

    ways = {"one": regulariser(one_call), "each": regulariser(call_per_head)}
    ways |= {"ERM": step(), "DIV": step(one_call), "DIV, each": step(call_per_head)}
    found = medians(ways, repeats)
    print(f"{heads} heads, L_IG of the two ways differs by a share of {abs(differ.item()):.0e}")
    print(f"  one call for every head / one call: {found['each'] / found['one']:.1f}")
    print(f"  training step, DIV / ERM: {found['DIV'] / found['ERM']:.2f}", end="")
    print(f" (one call for every head: {found['DIV, each'] / found['ERM']:.2f})")


def ldfs(repeats: int) -> None:
    """Directions of a batch at once against a loop over its samples, as in LADS' code."""
    from ldfs import local_direction_loss

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
        return local_direction_loss(features, mapped, source, target)

    assert torch.allclose(loop(), batch(), atol=1e-6)
    ways = {"loop": lambda: loop().backward(), "batch": lambda: batch().backward()}
    found = medians(ways, repeats)
    ratio = found["loop"] / found["batch"]
    print(f"direction loss of 256 samples, a loop over them / all at once: {ratio:.0f}")


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


def reading(repeats: int) -> None:
    """Epochs of 512 images as batches for ViT-B-16, two processes that read: files, and a cache."""
    import common

    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    augment = common.image_transform(open_clip.create_model("ViT-B-16"), train=True)
    with tempfile.TemporaryDirectory() as folder:
        files, labels = np.array(draw_photos(Path(folder), 512)), torch.zeros(512).long()
        images = common.ImageSet(files, labels, ("any",), transform=augment)
        sets = {"JPEGs": images, "cache": images.cached(Path(folder), "photos")}
        ways = {}
        for name, own in sets.items():
            batches = common.SourceBatches({"photos": own}, 32, seed=0, workers=2)
            batches.numbers = torch.Tensor.detach  # as it is: the rest is a GPU's work
            ways[name] = functools.partial(epoch, batches)
        found = medians(ways, repeats)
    for name, seconds in found.items():
        print(f"{name}: {512 / seconds:.0f} images/s")
    print(f"an epoch from JPEGs / from the cache: {found['JPEGs'] / found['cache']:.1f} (bound: 5)")


def epoch(batches) -> None:
    batches.restart(seed=0, steps=16)
    for _ in range(16):
        next(batches)


# ---------- On a GPU -----------------------------------------------------------------------------
# dense products in half precision, 1e12 operations a second, as the vendor states
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312}
PEAKS |= {"L40S": 362, "L4": 121, "A10": 125, "V100": 125, "T4": 65}
PEAKS |= {"RTX 4090": 165, "RTX 3090": 71, "A6000": 155}


def peak_of(gpu: str) -> float | None:
    """Operations a second that a GPU can do, by its name."""
    for name, peak in PEAKS.items():
        if name in gpu:
            return peak * 1e12
    print(f"no peak is known of {gpu!r}: add it to PEAKS, else there is no utilisation")
    return None


class OnGPU:
    """Seconds and bytes of a step."""

    def __init__(self, device: torch.device):
        self.device, self.is_gpu = device, device.type == "cuda"

    def seconds(self, step, repeats: int) -> float:
        """The median, after three to warm up."""
        taken = []
        for _ in range(3 + repeats):
            self.wait()
            start = time.perf_counter()
            step()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[3:])

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else None


def measure(tower, size: int, device, options: str, repeats: int, peak, half=torch.float16) -> list:
    """A row for each step of training_steps.py, eager and compiled, on batches of a size."""
    from training_steps import STEPS, make_batch, published_loop

    on_gpu, batch, rows = OnGPU(device), make_batch(tower, size, device=device), []
    for name, (make, compared_with) in STEPS.items():
        step = operations = None
        for compiled in (False, True):
            if compiled and make is published_loop or name.startswith("ldfs") and compiled:
                continue
            own = options + " --compile" * compiled
            extra = {"half": half} if make is published_loop else {}
            step = None  # its memory is free
            on_gpu.forget_peak()
            try:
                step = make(tower, batch, own, **extra)
                seconds = on_gpu.seconds(step, repeats)
            except torch.OutOfMemoryError:
                print(f"{name}, batch {size}: out of memory")
                continue
            row = {"step": name, "batch": size, "compiled": compiled, "seconds": seconds}
            row |= {"images/s": size / seconds, "peak bytes": on_gpu.peak_bytes()}
            if not compiled:
                with FlopCounterMode(display=False) as counter:
                    step()
                operations = counter.get_total_flops()  # a graph would hide them
            known = peak and operations
            row["utilisation"] = operations / seconds / peak if known else None
            rows.append(row | {"compared with": compared_with})
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Of each step's seconds to those of the step it is compared with, eager or compiled alike."""
    seconds = {(row["step"], row["compiled"]): row["seconds"] for row in rows}
    for row in rows:
        other = seconds.get((row["compared with"], row["compiled"]))
        row["ratio"] = other and row["seconds"] / other


def print_speeds(rows: list[dict]) -> None:
    head = "step", "batch", "images/s", "of its other", "utilisation", "GB"
    print("{:32}{:>7}{:>10}{:>14}{:>13}{:>7}".format(*head))
    for row in rows:
        name = row["step"] + ", compiled" * row["compiled"]
        numbers = row["ratio"], row["utilisation"], row["peak bytes"] and row["peak bytes"] / 1e9
        ratio, used, memory = ("-" if n is None else f"{n:.2f}" for n in numbers)
        print(f"{name:32}{row['batch']:7}{row['images/s']:10.0f}{ratio:>14}{used:>13}{memory:>7}")


def gpu(repeats: int) -> None:
    """Training steps of all methods with ViT-B/16, random weights, images made on the GPU."""
    import common

    if not torch.cuda.is_available():
        raise common.InputError("--gpu: PyTorch sees no GPU here")
    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    tower = open_clip.create_model("ViT-B-16").visual.to("cuda")
    precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    name = torch.cuda.get_device_name()
    compare_speeds(tower, (36, 256), torch.device("cuda"), name, precision, repeats)


def compare_speeds(tower, sizes, device, name: str, precision: str, repeats: int, **more) -> None:
    """Steps on batches of some sizes, printed and written."""
    from common import slug, write_json

    peak, rows = peak_of(name), []
    for size in sizes:
        options = f"--device {device} --precision {precision}"
        rows += measure(tower, size, device, options, repeats, peak, **more)
    print_speeds(rows)
    found = {"device": name, "torch": torch.__version__, "precision": precision, "rows": rows}
    file = Path("results", f"speed-{slug(name)}.json")
    write_json(file, found)
    print(f"written to {file}")


if __name__ == "__main__":
    ways = {"headpurify": headpurify, "clipood": clipood, "vit_diverse": vit_diverse, "ldfs": ldfs}
    ways["reading"] = reading
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("method", choices=ways, nargs="?")
    parser.add_argument("--gpu", action="store_true", help="training steps on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.gpu == bool(args.method):
        parser.error(f"give a method, {', '.join(ways)}, or --gpu")
    if args.gpu:
        from common import command

        command(functools.partial(gpu, args.repeats))
    else:
        ways[args.method](args.repeats)
