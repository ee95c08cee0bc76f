"""LDFS: features for domains known only by their name (Yan et al., 2024, arXiv 2405.02586).

All labelled images are photos, say, and the classifier should also work on sketches, known only by
the words "a sketch of a {}". What is learnt from photos alone makes CLIP worse on sketches.
Everything happens on CLIP's frozen, unit-norm output features, in two steps:

1. synthesise: a small network per target domain, trained with L_ld + L_pair, moves an image's
   feature as its caption moves: "a photo of a dog on grass" -> "a sketch of a dog on grass"
2. fine-tune: a probe, CLIP-Adapter, CoOp or Tip-Adapter-F learns from both features (L_con)

    python ldfs.py                        # tiny-pacs, from photos to the rest, on a CPU
    python ldfs.py --dataset domainnet-mini --source sketch --targets real painting --finetune coop

The paper has no public code: what it leaves open is called "our choice" in --help.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


# ---------- Step 1: what a synthesised feature should be -----------------------------------------
def local_direction_loss(features, mapped, text_source, text_target, reach: float = 0.0):
    """A feature should move the way its own caption moves when the words for the domain change.

        L_ld = mean_i ( 1 - cos(dI_i, dT_i) ),    dI_i = M(f_i) - f_i,    dT_i = T(t_i) - T(s_i)

    Near M(f) = f the cosine's gradient is huge, and at M(f) = f it has none. So |dI_i| counts as at
    least 0.01, or as `reach` |dT_i| if that is more (our choice): up to there the loss falls
    linearly along dT_i, from there on it is the cosine.

    Args: features, mapped, text_source, text_target: unit-norm (B, D).
    Returns: a scalar in [0, 2]: 0 where all moves are parallel to their captions' and long enough,
        2 where opposite.
    """
    move = mapped - features  # dI (B, D)
    text = text_target - text_source  # dT (B, D)
    length = text.norm(dim=-1).clamp(min=1e-6)
    at_least = torch.maximum(move.norm(dim=-1), (reach * length).clamp(min=0.01))
    return (1 - (move * text).sum(-1) / (at_least * length)).mean()


def global_direction_loss(features, mapped, text_source, text_target, labels, reach=0.0):
    """As `local_direction_loss`, but with ONE direction for all images of a class, the mean of
    their captions' (LADS)."""
    same = (labels[:, None] == labels).to(features.dtype)
    mean = same / same.sum(1, keepdim=True)  # (B, B)
    return local_direction_loss(features, mapped, mean @ text_source, mean @ text_target, reach)


def perturb_text(text_features, sigma, generator=None):
    """Stochastic text features: normalise(T + sigma * noise), Gaussian noise drawn anew in each
    call, which bridges the gap between texts and images; (B, D) -> unit-norm (B, D)."""
    noise = torch.empty_like(text_features).normal_(generator=generator)
    return F.normalize(text_features + sigma * noise, dim=-1)


def pairwise_loss(features, mapped):
    """Images should be as alike after the mapping as before, unit-norm (B, D) both.

    L_pair = mean over pairs i != j of ( cos(M(f_i), M(f_j)) - cos(f_i, f_j) )^2

    Returns: a scalar, 0 for a single image.
    """
    change = (mapped @ mapped.T - features @ features.T).square()  # (B, B)
    pairs = max(1, len(change) * (len(change) - 1))
    return (change.sum() - change.diagonal().sum()) / pairs


# ---------- Step 1: the mapper -------------------------------------------------------------------
class Mapper(nn.Module):
    """M(f) = normalise( f + W_2 relu(W_1 f + b_1) + b_2 ), unit-norm (B, D) -> (B, D).

    W_2 = b_2 = 0 at first: M(f) = f, so that the first step goes along the text.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features):
        return F.normalize(features + self.layers(features), dim=-1)


def mapper_loss(row, mapper, batch, class_features, scale, sigma):
    """L = L_ld + pairwise L_pair, and for LADS + consistency times the cross-entropy of mapped
    features against the class names.

    Args: batch: features (B, D), labels (B,), text_source, text_target (B, D); class_features:
    (C, D); scale: 1 / tau.
    """
    features, labels, *texts = batch
    mapped = mapper(features)
    if sigma:
        texts = [perturb_text(text, sigma) for text in texts]
    if row.direction == "global":
        direction = global_direction_loss(features, mapped, *texts, labels, row.reach)
    else:
        direction = local_direction_loss(features, mapped, *texts, row.reach)
    consistency = F.cross_entropy(scale * mapped @ class_features.T, labels)
    loss = direction + row.pairwise * pairwise_loss(features, mapped)
    return loss + row.consistency * consistency


def train_mapper(row, train, holdout, class_features, scale, seed):
    """The `Mapper` of the epoch with the lowest noise-free loss on the hold-out, frozen.

    train, holdout: features, labels, text_source, text_target of all images, see `mapper_loss`.
    Raises: InputError if no loss on the hold-out is a number.
    """
    torch.manual_seed(seed)
    mapper = Mapper(train[0].shape[1], row.hidden).to(train[0].device)
    options = {"lr": row.mapper_lr, "weight_decay": row.weight_decay}
    optimizer = torch.optim.AdamW(mapper.parameters(), **options)
    lowest, best = float("inf"), None
    for _ in range(row.mapper_epochs):
        for some in torch.randperm(len(train[0])).split(row.batch_size):
            batch = [values[some] for values in train]
            loss = mapper_loss(row, mapper, batch, class_features, scale, row.sigma)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = mapper_loss(row, mapper, holdout, class_features, scale, sigma=0).item()
        if loss < lowest:
            lowest, best = loss, copy.deepcopy(mapper.state_dict())
    if best is None:
        hint = f"try a lower --mapper-lr, now {row.mapper_lr:g}"
        raise common.InputError(f"the mapper's loss is {loss}; {hint}")
    mapper.load_state_dict(best)
    return mapper.requires_grad_(False)


def synthesise(row, clip, targets, train, holdout, class_features, seed):
    """Step 1, {target: its features}, made from those of the training images of some classes, in
    their order and with their labels. train, holdout: `Features`; targets: see `load_tasks`."""
    made = {}
    for name, (source_words, target_words, classes) in targets.items():
        batches = []
        for own in (train, holdout):
            captions = subjects(row, clip, own, source_words)  # "red dog on grass"
            text_source = text_features(clip, source_words, captions)  # T(s_i)  (N, D)
            text_target = text_features(clip, target_words, captions)  # T(t_i)  (N, D)
            chosen = of_classes(own.labels, classes)
            values = own.features, own.labels, text_source, text_target
            batches.append([value[chosen] for value in values])
        features, labels, text_source, text_target = batches[0]
        if row.direction == "additive":
            moved = F.normalize(features + text_target - text_source, dim=-1)
        else:
            mapper = train_mapper(row, *batches, class_features, clip.logit_scale, seed)
            moved = mapper(features)
        images = train.images.subset(of_classes(train.labels, classes))
        made[name] = Features(images, moved, labels, features)
    return made


# ---------- Step 2: what learns from the features ------------------------------------------------
def make_classifier(row, clip, class_names, class_features, features, labels):
    """The start of a fine-tuning method: its parameters, and a function from features f (B, D) to
    logits (B, C).

        probe         s (f W^T + b), W from the class features; "-random": from random directions
        adapter       s normalise(0.8 f + 0.2 A(f)) T^T, A with a bottleneck of D / 4
                      (CLIP-Adapter, Gao et al. 2024)
        coop          s f T(v)^T, class features T of learned words v (Zhou et al. 2022)
        tip-adapter   s f T^T + exp(-5.5 (1 - f K^T)) Y, keys K that start as all features, their
                      labels Y, weighed as 16 per class (Tip-Adapter-F, Zhang et al. 2022)

    Args: class_features T (C, D); features, labels: all that are learnt from. s = 1 / tau.
    """
    s, T = clip.logit_scale, class_features
    C, D = T.shape
    if row.finetune == "adapter":
        bottleneck = nn.Linear(D, D // 4, bias=False), nn.Linear(D // 4, D, bias=False)
        A = nn.Sequential(bottleneck[0], nn.ReLU(), bottleneck[1], nn.ReLU()).to(T.device)
        return A.parameters(), lambda f: s * F.normalize(0.8 * f + 0.2 * A(f), dim=-1) @ T.T
    if row.finetune == "coop":
        prompts = common.CoOp(clip, class_names)
        return prompts.parameters(), lambda f: s * f @ prompts().T
    if row.finetune == "tip-adapter":
        K = nn.Parameter(features)
        Y = 16 * C / len(labels) * F.one_hot(labels, C).to(T)
        return [K], lambda f: s * f @ T.T + torch.exp(-5.5 * (1 - f @ K.T)) @ Y
    if row.finetune == "probe-random":
        W = nn.Parameter(F.normalize(torch.randn_like(T), dim=-1))
    else:  # "zero-shot" is the probe before it learns
        W = nn.Parameter(T.clone())
    b = nn.Parameter(torch.zeros(C, device=T.device))
    return [W, b], lambda f: s * (f @ W.T + b)


def fine_tune(row, clip, class_names, class_features, sets, seed):
    """Step 2: cross-entropy on original and synthesised features, L_con.

    A step sees --batch-size source features and the same share of the others: all rows of a table
    take equally many steps (our choice; more steps alone change a probe's accuracy).

    Args: sets: (features (n, D), labels (n,)) of the source, then of every synthesised domain.
    Returns: a function, features (B, D) -> logits (B, C).
    """
    torch.manual_seed(seed)
    features, labels = (torch.cat(values) for values in zip(*sets))
    start = class_names, class_features, features, labels
    parameters, classify = make_classifier(row, clip, *start)
    if row.finetune == "zero-shot":
        return classify
    with_tiny_clip, with_others = LEARNING_RATES[row.finetune]
    lr = row.lr or (with_tiny_clip if row.model == "tiny" else with_others)
    steps = -(-len(sets[0][0]) // row.batch_size)  # an epoch; the last batch may be smaller
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=row.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, row.epochs * steps)
    for _ in range(row.epochs):
        for some in torch.randperm(len(labels)).tensor_split(steps):
            loss = F.cross_entropy(classify(features[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not loss.isfinite():
        hint = f"try a lower --lr, now {lr:g}"
        raise common.InputError(f"the loss of {row.finetune} is {loss.item()}; {hint}")
    return classify


# ---------- Captions: what is to be seen in an image ---------------------------------------------
WORDS = Path(__file__).with_name("assets") / "words.json"  # descriptions of domains, phrases
# how a caption begins before it says what is in the image: "A black and white photo of a"
OPENING = (
    r"^((there (is|are) )?((an?|the) )?([\w-]+ ){0,3}?(photo|photograph|picture|image|painting|"
    r"sketch|drawing|cartoon|illustration|clipart) (of|with) )?((an?|the) )?"
)


@functools.cache  # the rows of a table share captions
def encode_texts(encode, texts):
    return torch.cat([encode(texts[i : i + 256]) for i in range(0, len(texts), 256)])


def text_features(clip, description, captions):
    """Unit-norm (n, D) of captions put into a description; every different text is encoded once."""
    texts = [description.replace("{}", caption) for caption in captions]
    unique = tuple(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    return encode_texts(clip.encode_text, unique)[[place[text] for text in texts]]


def subjects(row, clip, own, description):
    """What is in each image of a described domain, "red dog on grass". own: its `Features`."""
    classes = [name.replace("_", " ") for name in own.images.classes]
    names = [classes[label] for label in own.labels]
    if row.captioner == "template":
        return names
    if row.captioner == "retrieval":
        captions = retrieve_captions(row, clip, own, classes, description)
    else:
        captions = read_captions(row, own.images)
    found = []
    for name, caption in zip(names, captions):
        subject = re.sub(OPENING, "", caption.strip(" .\n") + " ", flags=re.IGNORECASE)
        found.append(subject.strip() or name)
    return found


def retrieve_captions(row, clip, own, classes, description):
    """The name of the class with, of every group of phrases, the one nearest to the image."""
    captions = [classes[label] for label in own.labels]
    words = json.loads(WORDS.read_text())
    groups = words["phrases of the tiny CLIP" if row.model == "tiny" else "phrases"]
    for group, phrases in groups.items():
        if group == "place" and row.dataset in WATERBIRDS:  # there the place is the domain
            continue
        texts = [phrase.format(name) for name in classes for phrase in phrases]
        texts = text_features(clip, description, texts)
        texts = texts.view(len(classes), len(phrases), -1)  # (C, P, D)
        for label in own.labels.unique():
            images = (own.labels == label).nonzero()[:, 0]
            chosen = (own.features[images] @ texts[label].T).argmax(1)  # all images of a class
            for i, phrase in zip(images.tolist(), chosen.tolist()):
                captions[i] = phrases[phrase].format(captions[i])
    return captions


def read_captions(row, images):
    """The captions of --caption-file, in the order of the images."""
    kind, _, folder = row.dataset.rpartition(":")
    root = folder if kind == "folder" else row.data_root
    try:
        captions = json.loads(row.caption_file.read_text())
        return [captions[Path(image).relative_to(root).as_posix()] for image in images.images]
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"--caption-file {row.caption_file}: no JSON {{path below {root}: caption}}"
        raise common.InputError(f"{what} of all images ({error!r})") from None


# ---------- What is measured ---------------------------------------------------------------------
@dataclass
class Features:
    """What CLIP makes of images, or a mapper of what CLIP made of them."""

    images: common.ImageSet
    features: torch.Tensor  # (N, D) unit-norm
    labels: torch.Tensor  # (N,)
    start: torch.Tensor | None = None  # of synthesised features: those that were moved


def encode(clip, images, workers, cache):
    """The one place where images are read. Runs share what is the same for all sources and seeds:
    cache, {pixels or names of files: features}."""
    key = np.asarray(images.images).tobytes()
    if key not in cache:
        cache[key] = clip.encode(images, workers).to(clip.device)
    return Features(images, cache[key], images.labels.to(clip.device))


def of_classes(labels, classes):
    """Places (n,) of the images of these classes."""
    return torch.isin(labels.cpu(), torch.tensor(classes)).nonzero()[:, 0]


@torch.no_grad()
def accuracy(classify, own):
    return (classify(own.features).argmax(1) == own.labels).double().mean().item()


def accuracies(classify, holdout, source, targets):
    """On the hold-out, the source, the targets (mean), both (mean), and each target; in [0, 1]."""
    each = {f"target/{name}": accuracy(classify, own) for name, own in targets.items()}
    found = {"hold-out": accuracy(classify, holdout), "source": accuracy(classify, source)}
    found["target"] = float(np.mean(list(each.values())))
    found["average"] = (found["source"] + found["target"]) / 2
    return {**found, **each}


def nearest(features, among) -> torch.Tensor:
    """For each feature (n, D) the place (n,) of the most similar one among (N, D)."""
    return torch.cat([(some @ among.T).argmax(1) for some in features.split(1024)])


def class_means(features, labels, classes):
    return torch.stack([features[labels == c].mean(0) for c in classes])  # (C, D)


def spread(own):
    """Mean distance of two features of the same class, at most 999 of each; mean over classes."""
    distances = []
    for c in own.labels.unique():
        same = own.features[own.labels == c][:999]
        if len(same) > 1:
            distances.append(torch.pdist(same).mean().cpu())
    return np.mean(distances)


def synthesis_quality(made, source, targets):
    """What synthesised features are like, averaged over the targets.

    move           mean length |M(f) - f|
    to real shift  cosine of a class's mean move with the difference of its real target and source
    spread         mean distance of two of the same class; `real spread` that of real ones
    distinct       different images among the nearest real target images, as a share of the most
    right class, right domain, both: of the nearest among all real images, source and targets
    """
    pool = torch.cat([own.features for own in (source, *targets.values())])
    pool_labels = torch.cat([own.labels for own in (source, *targets.values())])
    found, end = {}, len(source.labels)
    for name, real in targets.items():
        start, end = end, end + len(real.labels)  # of this domain in the pool
        own, labels = made[name], made[name].labels
        classes = [c for c in labels.unique() if c in real.labels and c in source.labels]
        move = own.features - own.start
        shift = class_means(real.features, real.labels, classes)
        shift = shift - class_means(source.features, source.labels, classes)
        cosines = F.cosine_similarity(class_means(move, labels, classes), shift)
        different = nearest(own.features, real.features).unique()
        image = nearest(own.features, pool)
        right_class = pool_labels[image] == labels
        right_domain = (image >= start) & (image < end)
        measures = {
            "move": move.norm(dim=1).mean(),
            "to real shift": cosines.mean(),
            "spread": spread(own),
            "real spread": spread(real),
            "distinct": len(different) / min(len(labels), len(real.labels)),
            "right class": right_class.double().mean(),
            "right domain": right_domain.double().mean(),
            "both": (right_class & right_domain).double().mean(),
        }
        for measure, value in measures.items():
            found.setdefault(measure, []).append(float(value))
    return {measure: float(np.mean(values)) for measure, values in found.items()}


def plot_neighbours(made, real, path, columns=12):
    """Figure 4: source images, and below them the real target images nearest to what each row made
    of them. Frames: red, wrong class; blue, the same image as in a column before."""
    pictures, frames = {}, {}
    for row, own in made.items():
        chosen = torch.linspace(0, len(own.labels) - 1, columns).long().tolist()
        images = nearest(own.features[chosen], real.features).tolist()
        pictures["source"] = [own.images.picture(i) for i in chosen]
        pictures[row] = [real.images.picture(i) for i in images]
        frames[row] = []
        for column, image in enumerate(images):
            wrong = real.labels[image] != own.labels[chosen[column]]
            repeated = "tab:blue" if image in images[:column] else None
            frames[row].append("tab:red" if wrong else repeated)
    common.plot_images(pictures, path, frames=frames)


def write_pictures(args, folder, made, train, targets):
    """Figure 4 for each target, and with --figures all features, for pictures of your own."""
    arrays = {"source": train.features.cpu()}
    for target, real in targets.items():
        rows = {row: own[target] for row, own in made.items() if own}
        if rows and not args.study:
            plot_neighbours(rows, real, folder / f"neighbours-{common.slug(target)}.png")
        arrays[target] = real.features.cpu()
        for row, own in rows.items():
            arrays[f"{target}, {row}"] = own.features.cpu()
    if args.figures:
        np.savez(folder / "analysis.npz", **arrays)


# ---------- Who may see what, and when -----------------------------------------------------------
WATERBIRDS = ("tiny-waterbirds", "waterbirds")
# there the place is the domain: which place a target is made from, and which birds
OTHER_PLACE = {"water": ("land", [0]), "land": ("water", [1])}


def read_domains(args, seed):
    """All domains. Images in files are not read here."""
    if args.dataset not in WATERBIRDS:
        return common.load_domains(args.dataset, args.data_root, seed, args.cue, WATERBIRDS)
    parts = common.load_parts(args.dataset, args.data_root, seed, args.cue)

    def birds(part, *groups):  # 2 * bird + place
        return parts[part].subset(np.flatnonzero(np.isin(parts[part].groups, groups)))

    usual = common.Domain("usual places", birds("train", 0, 3), birds("test", 0, 3))
    landbirds, waterbirds = birds("test", 1), birds("test", 2)  # in the other place
    return [usual, common.Domain("water", landbirds), common.Domain("land", waterbirds)]


def words_for(args, domain):
    """The description of a domain, "a sketch of a {}"."""
    if common.slug(domain) not in args.descriptions:
        hint = f'add --descriptions "{domain}=a ... of a {{}}"'
        raise common.InputError(f"no words describe domain {domain!r}; {hint}")
    return args.descriptions[common.slug(domain)]


def make_task(args, domains, source, others):
    """A task and its targets; see `load_tasks`."""
    split = common.leave_one_out(domains, others[0].name)  # of all but this one
    classes, hold_out = split.classes, split.tests["hold-out"]
    balanced = split.tests.get("source", hold_out)
    tests = {"hold-out": {source: hold_out[source]}, "source": {source: balanced[source]}}
    targets, tests["target"] = {}, {}
    for domain in others:
        origin, chosen = source, range(len(classes))
        if args.dataset in WATERBIRDS:
            origin, chosen = OTHER_PLACE[domain.name]
        targets[domain.name] = words_for(args, origin), words_for(args, domain.name), chosen
        tests["target"][domain.name] = domain.balanced or domain.images
    return common.Task(classes, {source: split.train[source]}, tests), targets


def load_tasks(args, seed):
    """{source: (its task, its targets)}; targets: {name: (words of the images that its features
    are made from, its own words, the classes of these images)}."""
    domains = read_domains(args, seed)
    names = [domain.name for domain in domains]
    chosen = []
    for text in args.targets or ["all"]:
        chosen += common.choose_targets(text, names)
    tasks = {}
    for source in common.choose_targets(args.source, names, "source"):
        if args.targets and args.source != "all" and source in chosen:
            raise common.InputError(f"--targets names {source!r}, the source: its images are known")
        others = [domain for domain in domains if domain.name in chosen and domain.name != source]
        if others:  # none if --source all meets the only one of --targets
            tasks[source] = make_task(args, domains, source, others)
    return tasks


# ---------- Training and tests -------------------------------------------------------------------
def train_and_test(args, clip, task, targets, run, seed, cache):
    """All rows for one source and seed."""
    read = functools.partial(encode, clip, workers=args.workers, cache=cache)
    train, holdout = read(*task.train.values()), read(*task.tests["hold-out"].values())
    class_features = clip.class_features(task.classes, args.templates)  # (C, D)
    shared, made, classify = {}, {}, {}
    for name, row in args.rows.items():
        step_1 = tuple(getattr(row, setting) for setting in STEP_1)
        if row.direction == "none":
            shared[step_1] = {}
        elif step_1 not in shared:  # by rows that differ in step 2 only
            data = train, holdout, class_features
            shared[step_1] = synthesise(row, clip, targets, *data, seed)
        made[name] = shared[step_1]
        sets = [(own.features, own.labels) for own in (train, *made[name].values())]
        classify[name] = fine_tune(row, clip, task.classes, class_features, sets, seed)

    # Everything is learnt. Only now images of the targets are read.
    source = read(*task.tests["source"].values())
    real = {name: read(images) for name, images in task.tests["target"].items()}
    write_pictures(args, run.folder, made, train, real)
    run.extra["synthesised"] = {}
    for name in args.rows:
        if made[name]:
            quality = synthesis_quality(made[name], source, real)
            run.extra["synthesised"][name] = quality
        run.add(name, accuracies(classify[name], holdout, source, real))


# ---------- What the paper compares --------------------------------------------------------------
# A name stands for settings; a row may lay its own over them: "ldfs/sigma=0.1".
NOT_LDFS = {"captioner": "template", "sigma": 0.0, "pairwise": 0.0, "reach": 0.0}
ROWS = {
    "zero-shot": {"direction": "none", "finetune": "zero-shot"},
    "plain": {"direction": "none"},  # what --finetune learns from the source alone
    "text": {**NOT_LDFS, "direction": "additive"},
    "lads": {**NOT_LDFS, "direction": "global", "consistency": 1.0},
    "ldfs": {},
}
MODES = list(ROWS)
# --finetune: learning rate with the tiny CLIP (chosen on source hold-outs), with others (untested)
LEARNING_RATES = {"probe": (3e-3, 1e-3), "probe-random": (1e-2, 1e-3), "adapter": (1e-2, 1e-3)}
LEARNING_RATES |= {"coop": (3e-3, 2e-3), "tip-adapter": (1e-3, 1e-3)}
LOSSES = ["plain", "ldfs/direction=global/sigma=0/pairwise=0", "ldfs/sigma=0/pairwise=0"]
LOSSES += ["ldfs/pairwise=0", "ldfs/sigma=0", "ldfs", "ldfs/reach=0", "ldfs/consistency=1"]
STUDIES = {
    "losses": LOSSES,
    "captions": ["plain", "ldfs/captioner=template", "ldfs"],
    "finetune": [],
    "sigma": ["plain", *(f"ldfs/sigma={sigma}" for sigma in (0, 0.02, 0.05, 0.1, 0.2, 0.4))],
}
for method in LEARNING_RATES:
    STUDIES["finetune"] += [f"{row}/finetune={method}" for row in ("plain", "lads", "ldfs")]

# ---------- Settings: name, kind, default, default with the tiny CLIP, help ----------------------
CAPTIONERS = ("retrieval", "template", "file")
DIRECTIONS = ("local", "global", "additive", "none")
number, count = common.at_least(0, float), common.at_least(1)
SETTINGS = [
    ("captioner", CAPTIONERS, "retrieval", "retrieval", "CLIP's nearest phrases, class name, file"),
    ("caption-file", Path, None, None, 'JSON {"path below the data root": "caption"}'),
    ("direction", DIRECTIONS, "local", "local", "of captions (published), class (LADS), unlearnt"),
    ("sigma", number, 0.03, 0.1, "noise on each coordinate of a text feature (our choice)"),
    ("pairwise", number, 1.0, 1.0, "weight of the pairwise regularizer (our choice)"),
    ("consistency", number, 0.0, 0.0, "weight of LADS' class consistency (published)"),
    ("reach", number, 1.0, 1.0, "least move, in lengths of its caption's (our choice)"),
    ("hidden", count, 384, 384, "width of the mapper (published for LADS)"),
    ("mapper-epochs", count, 50, 50, "the best on the hold-out counts (as LADS)"),
    ("mapper-lr", common.positive, 1e-3, 1e-3, "of AdamW (in LADS' range)"),
    ("weight-decay", number, 0.005, 0.005, "of AdamW in both steps (as LADS)"),
    ("batch-size", count, 256, 256, "source images in a step, in both steps (as LADS)"),
    ("finetune", tuple(LEARNING_RATES), "probe", "probe", "what learns from the features"),
    ("epochs", count, 60, 60, "passes over the source images (our choice)"),
    ("lr", common.positive, None, None, "of AdamW, then a cosine (by --finetune: LEARNING_RATES)"),
]
STEP_1 = [name.replace("-", "_") for name, *_ in SETTINGS[:12]]
SOURCE = "labelled domain, or all in turn (officehome: Real World; domainnet, -mini: sketch)"
SEEN = [
    ("source", str, "photo", "photo", SOURCE),
    ("targets", [str], None, None, "domains known by name; only tests see them (all others)"),
    ("descriptions", [str], [], [], "NAME=TEXT: a domain's words (assets/words.json)"),
    common.TEMPLATES,
]
SOURCES = {"officehome": "Real World", "domainnet": "sketch", "domainnet-mini": "sketch"}
METHOD = common.Method("ldfs", SETTINGS, ROWS, STUDIES)


def settings(argv=None):
    """The command line, checked; `descriptions` becomes {slug of a domain: its words}."""
    datasets = [*common.dataset_names("domains"), *WATERBIRDS]
    args = common.flags(METHOD, __doc__, MODES, datasets, SEEN, argv)
    preset = {"source": SOURCES.get(args.dataset, "photo")}
    if args.dataset in WATERBIRDS:
        preset = {"source": "usual places"}
        if args.source:
            raise common.InputError(f"--source {args.source} has no effect on {args.dataset}")
    args = common.settle(args, preset)
    words = json.loads(WORDS.read_text())
    descriptions = {**words["descriptions"], **words.get(f"descriptions of {args.dataset}", {})}
    for given in args.descriptions:
        name, _, text = given.partition("=")
        if "{}" not in text:
            what = "has no {} where the name of the thing goes"
            raise common.InputError(f"--descriptions: {name}={text!r} {what}")
        descriptions[common.slug(name)] = text
    args.descriptions = descriptions
    captioned = [row for row in args.rows.values() if row.captioner == "file"]
    if args.caption_file and not captioned:
        raise common.InputError("--caption-file has no effect without --captioner file")
    if not all(row.caption_file for row in captioned):
        raise common.InputError("--captioner file needs --caption-file, JSON {path: caption}")
    return args


# ---------- main ---------------------------------------------------------------------------------
def main():
    args = settings()
    if args.model == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share
    records, clip, cache = [], None, {}
    for seed in args.seeds:
        tasks = load_tasks(args, seed)
        if not clip:  # after the data: a missing data set is said before weights are fetched
            clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
        for source, (task, targets) in tasks.items():
            print(f"{args.dataset}, from {source}, seed {seed}", flush=True)
            with common.open_run(args, f"from {source}", seed) as run:
                if not run.complete:
                    train_and_test(args, clip, task, targets, run, seed, cache)
            records.append(run.record)
    quality = [{**record, "rows": record["extra"]["synthesised"]} for record in records]
    if quality[0]["rows"]:
        print("\n" + common.table("synthesised features, %", quality))
    common.report(args, records)


if __name__ == "__main__":
    common.command(main)
