"""Prompts of other papers, which the four methods are compared with or combined with.

CoOp (Zhou et al., IJCV 2022, "Learning to prompt for vision-language models") and CoCoOp (Zhou et
al., CVPR 2022, "Conditional prompt learning for vision-language models") learn words from images.
PromptStyler (Cho et al., ICCV 2023) learns class features without any image. Class features of any
other method can be read from a file.

`clip` is a `Clip` of common.py.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from support import InputError


# ---------- Texts with learned words -------------------------------------------------------------
def first_word(tokenizer) -> int:
    """Index of a text's first word among its tokens: 1 if there is a start token, else 0."""
    return int(tokenizer("")[0, 0] == tokenizer("a")[0, 0])


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The layer of an open_clip model that turns tokens (n, L) into word embeddings (n, L, W)."""
    text_tower = getattr(model, "text", model)
    return text_tower.token_embedding


def encode_prompts(model, tokens: torch.Tensor, start: int, vectors: torch.Tensor) -> torch.Tensor:
    """Text features, unit-norm (n, D), of prompts in which vectors replace the embeddings of words.

    Args:
        tokens: (n, L).
        start: index of the first token whose embedding is replaced.
        vectors: (m, W), or (n, m, W) if every prompt has its own. Gradients flow to them.
    """

    def replace_words(module, inputs, embedded):  # (n, L, W)
        words = vectors.to(embedded.dtype).expand(len(embedded), -1, -1)  # (n, m, W)
        end = start + words.shape[1]
        return torch.cat([embedded[:, :start], words, embedded[:, end:]], 1)

    handle = token_embedding(model).register_forward_hook(replace_words)
    try:
        return model.encode_text(tokens, normalize=True)
    finally:
        handle.remove()


# ---------- CoOp and CoCoOp ----------------------------------------------------------------------
def first_context(clip, context: str | int) -> nn.Parameter:
    """The vectors v (m, W) before they are trained.

    context: a text, whose word embeddings they are, so that training starts at the zero-shot
        prompt; or m, for random vectors of standard deviation 0.02.
    """
    embedding = token_embedding(clip.model)
    if isinstance(context, int):
        vectors = 0.02 * torch.randn(context, embedding.embedding_dim)
        return nn.Parameter(vectors.to(clip.device))
    tokens = clip.tokenizer(context)[0]  # (L,)
    end = int(tokens.argmax())  # the end token has the highest number
    words = tokens[first_word(clip.tokenizer) : end].to(clip.device)
    return nn.Parameter(embedding(words).detach().float())


def prompt_tokens(clip, class_names, m: int) -> torch.Tensor:
    """Tokens (C, L) of "a a ... a [name]." The m words "a" are replaced by vectors later."""
    texts = []
    for name in class_names:
        texts.append("a " * m + name.replace("_", " ") + ".")
    return clip.tokenizer(texts).to(clip.device)


class CoOp(nn.Module):
    """Learned context in front of the class names, the same for all classes (CoOp, Eq. 2).

        prompt of class c = v_1 ... v_m [name of c].        v (m, W): the only parameters

    context: a text that v starts from, or m for random vectors, as in the paper.
    """

    def __init__(self, clip, class_names, context: str | int = "a photo of a"):
        super().__init__()
        self.clip = clip  # no nn.Module: CLIP's weights are not among our parameters
        self.context = first_context(clip, context)  # (m, W)
        self.start = first_word(clip.tokenizer)
        self.tokens = prompt_tokens(clip, class_names, len(self.context))  # (C, L)

    def of_classes(self, class_names) -> CoOp:
        """The same learned context in front of other class names."""
        other = copy.copy(self)  # with the same parameters
        other.tokens = prompt_tokens(self.clip, class_names, len(self.context))
        return other

    def forward(self) -> torch.Tensor:
        """Class features, unit-norm (C, D)."""
        return encode_prompts(self.clip.model, self.tokens, self.start, self.context)

    def logits(self, image_features) -> torch.Tensor:
        """Unit-norm image features (B, D) -> (B, C)."""
        return self.clip.logit_scale * image_features @ self().T

    def fit(self, x, y, batch_size: int = 36, steps: int = 200, lr: float = 2e-3) -> torch.Tensor:
        """Train the context by cross-entropy on unit-norm image features x (N, D), labels y (N,).

        Batches are drawn with torch's global generator. Adam and the number of steps are our choice
        (published: SGD).

        Returns: class features, unit-norm (C, D).
        """
        optimizer = torch.optim.Adam(self.parameters(), lr)
        device = self.context.device
        for _ in range(steps):
            indices = torch.randint(len(x), (batch_size,))
            logits = self.logits(x[indices].to(device))  # (B, C)
            loss = F.cross_entropy(logits, y[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self().detach()


class CoCoOp(nn.Module):
    """CoOp whose context depends on the image, to generalise to new classes (CoCoOp, Sec. 3.2).

        prompt of class c for image x = v_1 + pi ... v_m + pi [name of c].        pi = h(x)

    h has two layers, from image features (D) through D / 16 units to a word embedding (W). Every
    image needs C text features of its own, so batches are small (published: one image).

    context: as for `CoOp`.
    """

    def __init__(self, clip, class_names, context: str | int = "a photo of a"):
        super().__init__()
        self.clip = clip
        self.context = first_context(clip, context)  # (m, W)
        self.start = first_word(clip.tokenizer)
        self.tokens = prompt_tokens(clip, class_names, len(self.context))  # (C, L)
        D = clip.encode_text(["a"]).shape[1]
        W = self.context.shape[1]
        down = nn.Linear(D, D // 16)
        up = nn.Linear(D // 16, W)
        self.h = nn.Sequential(down, nn.ReLU(), up).to(clip.device)

    def of_classes(self, class_names) -> CoCoOp:
        """The same learned context in front of other class names."""
        other = copy.copy(self)  # with the same parameters
        other.tokens = prompt_tokens(self.clip, class_names, len(self.context))
        return other

    def logits(self, image_features) -> torch.Tensor:
        """Unit-norm image features (B, D) -> (B, C)."""
        model = self.clip.model
        logits = []
        for feature, pi in zip(image_features, self.h(image_features)):  # (D,), (W,)
            context = self.context + pi  # (m, W)
            class_features = encode_prompts(model, self.tokens, self.start, context)  # (C, D)
            logits.append(self.clip.logit_scale * class_features @ feature)
        return torch.stack(logits)


class PromptClassifier(nn.Module):
    """CLIP's frozen image tower with learned prompts: images (B, 3, h, w) -> logits (B, C)."""

    def __init__(self, prompts: CoOp | CoCoOp):
        super().__init__()
        self.prompts = prompts  # the only parameters

    def forward(self, images):
        with torch.no_grad():
            features = self.prompts.clip.visual(images)  # (B, D)
        return self.prompts.logits(F.normalize(features.float(), dim=-1))


# ---------- PromptStyler -------------------------------------------------------------------------
def style_loss(style, styled, content, earlier) -> torch.Tensor:
    """L_style + L_content (PromptStyler, Eqs. 1 and 3) of unit-norm features.

    Args:
        style: (D,), of "a S_i style of a".
        styled: (C, D), of "a S_i style of a [class]".
        content: (C, D), of "[class]".
        earlier: (i - 1, D), of the styles learned before, to which this one should be orthogonal.
    """
    diversity = (earlier @ style).abs().mean() if len(earlier) else 0
    labels = torch.arange(len(content), device=content.device)
    return diversity + F.cross_entropy(styled @ content.T, labels)


def learn_styles(clip, names, steps: int) -> torch.Tensor:
    """Learn style words S_1, S_2, ... one after another (PromptStyler, Sec. 3.1 and 3.2).

    Returns: features of "a S_i style of a [class]", unit-norm (styles, C, D).
    """
    noun, count = "style", 80
    if hasattr(clip.tokenizer, "words"):  # the tiny CLIP knows few words, and "style" is not one
        noun, count = "picture", 16
    texts = [f"a a {noun} of a."]
    texts += [f"a a {noun} of a {name}." for name in names]
    tokens = clip.tokenizer(texts).to(clip.device)  # (1 + C, L)
    start = 1 + first_word(clip.tokenizer)  # index of the second "a", which S_i replaces
    content = clip.encode_text([f"{name}." for name in names], 1)  # (C, D), one text at a time
    content = F.normalize(content, dim=-1)  # again: without it results/ differs in the last bits
    embedding = token_embedding(clip.model).weight
    styles, styled = content[:0], []
    for _ in tqdm(range(count), "styles", leave=False, disable=None):
        word = nn.Parameter(0.02 * torch.randn_like(embedding[:1]))  # (1, W)
        optimizer = torch.optim.SGD([word], lr=0.002, momentum=0.9)
        for _ in range(steps):
            features = encode_prompts(clip.model, tokens, start, word)  # (1 + C, D)
            loss = style_loss(features[0], features[1:], content, styles)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        features = features.detach()
        styles = torch.cat([styles, features[:1]])
        styled.append(features[1:])
    return torch.stack(styled)


def promptstyler(
    clip, class_names, seed: int, steps: int = 100, margin: float = 0.5, scale: float = 5.0
) -> torch.Tensor:
    """Class features that no image has taught, unit-norm (C, D) (PromptStyler, Sec. 3.3).

    Every style word is made different from those before it, while "a S_i style of a [class]" keeps
    the meaning of "[class]". A linear classifier is then trained with the ArcFace loss on these
    texts of all styles and classes. Its rows are the class features.

    Steps per style, margin and scale are the published ones.
    """
    names = [name.replace("_", " ") for name in class_names]
    torch.manual_seed(seed)
    styled = learn_styles(clip, names, steps)  # (styles, C, D)
    x = styled.flatten(0, 1)  # (styles * C, D)
    y = torch.arange(len(names), device=x.device).repeat(len(styled))
    classifier = nn.Parameter(sum(styled))  # (C, D)
    optimizer = torch.optim.SGD([classifier], lr=0.005, momentum=0.9)
    for _ in range(4 * steps):
        cosine = x @ F.normalize(classifier, dim=-1).T
        angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        logits = scale * (angle + margin * F.one_hot(y)).cos()  # ArcFace
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(classifier.detach(), dim=-1)


# ---------- Class features from a file -----------------------------------------------------------
def read_class_features(path, clip, class_names) -> torch.Tensor:
    """Class features (C, D) that any other program wrote to a .npy file, made unit-norm.

    Raises: InputError if the file does not hold one such array, or a row of it is 0.
    """
    shape = tuple(clip.class_features(class_names).shape)
    needed = f"needed is a {shape} array in .npy, a row for each of {', '.join(class_names)}"
    wrong = None
    try:
        features = torch.from_numpy(np.load(path)).float()
        if features.shape != shape:
            wrong = f"its shape is {tuple(features.shape)}"
        elif not features.isfinite().all():
            wrong = "not all of its numbers are finite"
        elif not features.norm(dim=1).all():
            wrong = "a row of it is 0"
    except OSError as error:
        wrong = error.strerror or str(error)
    except Exception:  # NumPy's own messages advise to load a pickle
        wrong = "no array of numbers"
    if wrong:
        raise InputError(f"--class-features {path}: {wrong}; {needed}")
    return F.normalize(features, dim=-1).to(clip.device)
