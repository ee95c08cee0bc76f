"""What the methods' extras cost, as ratios of two ways that take turns in one run, so that a busy machine slows both.

python tests/bench.py headpurify
python tests/bench.py clipood
python tests/bench.py vit_diverse
python tests/bench.py ldfs
"""

import argparse
import copy
import logging
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def medians(ways: dict, repeats: int) -> dict[str, float]:
    """Median seconds of every way {name: function}, each called once to warm up and then `repeats` times in turn."""
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
    """Bytes that autograd keeps from a forward pass for the backward pass, but for the weights themselves."""
    own, kept = {weight.untyped_storage().data_ptr() for weight in weights}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _alive = forward()  # nothing is freed before it is counted
    return sum(kept.values())


def headpurify(repeats: int) -> None:
    """A purification step with both gradients beside full fine-tuning's, merged inference beside CLIP's; batch 12."""
    import common
    from headpurify import merge, mmd_loss, purify, route_gradients

    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    labels, domain = torch.arange(12) % 7, torch.arange(3).repeat_interleave(4)
    for name in ("tiny", "ViT-B-32"):
        torch.manual_seed(0)
        clip = (common.load_clip("tiny")[0] if name == "tiny" else open_clip.create_model(name)).visual
        full, purified = (copy.deepcopy(clip).requires_grad_(True) for _ in range(2))
        layers = purify(purified)
        lora = [parameter for layer in layers for parameter in layer.lora_parameters()]
        gates = [layer.gate_logits for layer in layers]
        side = clip.image_size[0] if isinstance(clip.image_size, tuple) else clip.image_size
        images, text = torch.randn(12, 3, side, side), F.normalize(torch.randn(7, clip.output_dim), dim=-1)
        optimizers = {
            "full": torch.optim.AdamW(full.parameters(), lr=1e-5),
            "purify": torch.optim.AdamW(lora + gates, lr=1e-3),
        }

        def loss(tower, text=text, images=images):
            features = tower(images)
            return F.cross_entropy(100 * F.normalize(features, dim=-1) @ text.T, labels), features

        def full_step(full=full, optimizers=optimizers, loss=loss):
            optimizers["full"].zero_grad()
            loss(full)[0].backward()
            optimizers["full"].step()

        def purify_step(purified=purified, optimizers=optimizers, loss=loss, lora=lora, gates=gates):
            loss_cls, features = loss(purified)
            route_gradients(loss_cls, mmd_loss([features], domain), lora + gates, gates, alpha=1)
            optimizers["purify"].step()

        found = medians({"full": full_step, "purify": purify_step}, repeats)
        print(
            f"{name}: a step of purification / of full fine-tuning: {found['purify'] / found['full']:.2f} (bound: 1.3)"
        )
        with_mmd = lambda: (out := loss(purified), mmd_loss([out[1]], domain))  # noqa: B023, E731
        forward = {"full": lambda: loss(full), "purify": with_mmd}  # noqa: B023
        memory = {}
        for way, tower in (("full", full), ("purify", purified)):
            state = [s for own in optimizers[way].state.values() for s in own.values() if torch.is_tensor(s)]
            trained = [p for p in tower.parameters() if p.requires_grad]  # as large: their gradients
            bytes_of = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
            memory[way] = saved_bytes(forward[way], tower.parameters()) + bytes_of(state) + bytes_of(trained)
        share = memory["purify"] / memory["full"]
        print(f"  activations, gradients and optimizer: {share:.2f} of {memory['full'] / 1e6:.0f} MB (bound: 1)")
        merge(purified)

        @torch.no_grad()
        def infer(tower, images=images):
            tower.eval()(images)

        found = medians({"CLIP": lambda: infer(clip), "merged": lambda: infer(purified)}, 4 * repeats)  # noqa: B023
        print(f"  inference, merged / CLIP: {found['merged'] / found['CLIP']:.2f} (bounds: 0.97, 1.03)")


def clipood(repeats: int) -> None:
    """The running average beside a training step: ViT-B-32, random weights, batch 36, this machine's CPU."""
    from clipood import BetaMovingAverage, margin_metric_softmax

    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=5e-6, weight_decay=0.1)
    images, labels = torch.randn(36, 3, 224, 224), torch.randint(65, (36,))
    text = F.normalize(torch.randn(65, 512), dim=-1)
    size = sum(parameter.nbytes for parameter in tower.parameters())

    def step():
        loss = margin_metric_softmax(F.normalize(tower(images), dim=-1), text, labels, 100, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = resident()  # nothing was freed yet, so what is added is seen
    fused = BetaMovingAverage(tower, steps=5000, beta=0.5)
    fused.update(tower)
    print(f"memory it adds: {(resident() - before) / size:.2f} copies of the weights ({size / 1e6:.0f} MB)")
    average = list(fused.model.parameters())

    @torch.no_grad()
    def loop():
        for mean, parameter in zip(average, tower.parameters()):
            mean.mul_(0.9).add_(parameter, alpha=0.1)

    found = medians({"step": step, "update": lambda: fused.update(tower), "loop": loop}, repeats)
    print(f"training step: {found['step']:.2f} s")
    print(f"BetaMovingAverage.update: {100 * found['update'] / found['step']:.2f} % of it (bound: 1.5 %)")
    print(f"a loop of mul_ and add_ over the tensors: {100 * found['loop'] / found['step']:.2f} % of it")


def vit_diverse(repeats: int) -> None:
    """The regulariser in one call against one call for every head, on the published network at batch 80; subset search.

    The published way: full attention in the last layer, and a pass of its own for the gradient through every head.
    """
    from vit_diverse import DiverseViT, gradient_products, input_gradient_loss, select_heads

    images, labels = torch.rand(80, 3, 64, 32), torch.randint(2, (80,))
    for heads in (4, 12):
        torch.manual_seed(0)
        model = DiverseViT((64, 32), 4, 2, dim=64, depth=6, heads=heads, mlp_dim=128)
        last = model.last

        def one_call(tokens, model=model, last=last):
            inputs = last.head_inputs(tokens)
            logits = model.logits(last.head_outputs(inputs))
            return logits, input_gradient_loss(logits, inputs)

        def call_per_head(tokens, model=model, last=last, heads=heads):
            copies = [last.norm(tokens) for _ in range(heads)]
            weights = last.qkv.weight.view(3, heads, -1, tokens.shape[-1]).transpose(0, 1)
            outputs = []
            for x, (w_q, w_k, w_v) in zip(copies, weights):
                scores = (x @ w_q.T) @ (x @ w_k.T).mT / len(w_q) ** 0.5  # (B, N, N)
                outputs.append(scores.softmax(-1) @ (x @ w_v.T))
            x = last.out(torch.cat(outputs, -1))
            logits = model.classifier((x + last.mlp(last.mlp_norm(x)))[:, 0])
            score = logits.max(1).values.sum()
            gradients = torch.stack([torch.autograd.grad(score, x, create_graph=True)[0] for x in copies])
            cosines = gradient_products(F.normalize(gradients, dim=-1))
            return logits, cosines.square().sum((-1, -2)).mean() / heads**2

        tokens = model.trunk(images).detach().requires_grad_()
        ends = [tokens, *last.parameters()]
        differ = one_call(tokens)[1] / call_per_head(tokens)[1] - 1

        def regulariser(way, tokens=tokens, ends=ends):
            return lambda: torch.autograd.grad(way(tokens)[1], ends, allow_unused=True)

        def step(way=None, model=model, last=last):
            def run():
                tokens = model.trunk(images)
                if way is None:
                    logits, loss = model.logits(last.head_outputs(last.head_inputs(tokens))), 0
                else:
                    logits, loss = way(tokens)
                model.zero_grad()
                (F.cross_entropy(logits, labels) + 100 * loss).backward()

            return run

        ways = {"one": regulariser(one_call), "each": regulariser(call_per_head)}
        ways |= {"ERM": step(), "DIV": step(one_call), "DIV, each": step(call_per_head)}
        found = medians(ways, repeats)
        print(f"{heads} heads, L_IG of the two ways differs by a share of {abs(differ.item()):.0e}")
        print(f"  regulariser, one call for every head / one call: {found['each'] / found['one']:.1f}")
        print(f"  training step, DIV / ERM: {found['DIV'] / found['ERM']:.2f}", end="")
        print(f" (one call for every head: {found['DIV, each'] / found['ERM']:.2f})")
    outputs, labels = torch.randn(1200, heads, 64), torch.randint(2, (1200,))
    found = medians({"search": lambda: select_heads(model, outputs, labels)}, 1)
    print(f"{2**heads - 1} subsets of {heads} heads over 1,200 images: {found['search']:.1f} s")


def ldfs(repeats: int) -> None:
    """Directions of a batch at once against a loop over its samples, as in LADS' code; training on 10,000 features."""
    from ldfs import fine_tune, local_direction_loss, train_mapper

    torch.manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(n, 512), dim=-1)  # noqa: E731
    features, source, target = unit(256), unit(256), unit(256)
    mapped = unit(256).requires_grad_()

    def loop():
        losses = []
        for f, m, s, t in zip(features, mapped, source, target):
            losses.append(1 - F.cosine_similarity(m - f, t - s, dim=0))
        return torch.stack(losses).mean()

    batch = lambda: local_direction_loss(features, mapped, source, target)  # noqa: E731
    assert torch.allclose(loop(), batch(), atol=1e-6)
    found = medians(
        {name: lambda way=way: way().backward() for name, way in (("loop", loop), ("batch", batch))}, repeats
    )
    print(f"direction loss of 256 samples, a loop over them / all at once: {found['loop'] / found['batch']:.0f}")

    row = {"direction": "local", "sigma": 0.03, "pairwise": 1.0, "consistency": 0.0, "reach": 1.0, "hidden": 384}
    row |= {"mapper_epochs": 50, "mapper_lr": 1e-3, "weight_decay": 0.005, "batch_size": 256}
    row = argparse.Namespace(**row, finetune="probe", epochs=60, lr=None, model="ViT-B-16")
    names, clip = unit(7), argparse.Namespace(scale=100.0)
    train, holdout = ([unit(n), torch.arange(n) % 7, unit(n), unit(n)] for n in (10_000, 2500))
    clock, sets = [time.process_time()], [(train[0], train[1])]
    for seed in range(3):
        sets.append((train_mapper(row, train, holdout, names, clip.scale, seed)(train[0]), train[1]))
    clock.append(time.process_time())
    fine_tune(row, clip, "abcdefg", names, sets, seed=0)
    clock.append(time.process_time())
    seconds = clock[1] - clock[0], clock[2] - clock[1]  # of processors, so that a busy machine does not count
    print(f"10,000 features: three mappers {seconds[0]:.0f} s, probe {seconds[1]:.0f} s (bound: 120 s on two cores)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["headpurify", "clipood", "vit_diverse", "ldfs"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    globals()[args.method](args.repeats)
