"""Prompts: any number of texts, and learned ones, CoOp and CoCoOp: what the papers compare with, or
go together with.

`clip` is a `Clip` of common.py.
"""

from __future__ import annotations

import copy

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

SHORT = 32  # a tower of so few places reads all of them, as the tiny CLIPs did for results/


# ---------- Texts --------------------------------------------------------------------------------
def text_tower(model: nn.Module) -> nn.Module:
    return getattr(model, "text", model)


def stops_at_the_end(model: nn.Module) -> bool:
    """Whether nothing behind a text's end token can change its feature: attention looks back only,
    and the feature is read at that token. So it is in CLIP, but not in SigLIP or CoCa."""
    if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP):
        return False
    tower = text_tower(model)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    appended = getattr(tower, "cls_emb", None) is not None  # a token behind all others
    return causal and pool == "argmax" and not appended


def places_read(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """How many of its places each text needs: tokens (n, L) -> (n,)."""
    n, L = tokens.shape
    if L <= SHORT or not stops_at_the_end(model):
        return torch.full((n,), L)
    return tokens.argmax(1).cpu() + 1  # the end token has the highest number


def without_padding(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (n, L) up to the end of the longest text, (n, l): CLIP's 77 places hold some 12 words,
    and the features stay the same."""
    return tokens[:, : places_read(model, tokens).max()]


def encode_tokens(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Text features, unit-norm (n, D), of tokens (n, L), or (n, l) `without_padding`."""
    places = tokens.shape[1]
    tower = text_tower(model)
    if not stops_at_the_end(model) or places == len(tower.positional_embedding):
        return model.encode_text(tokens, normalize=True)
    prefix = "" if tower is model else "text."
    first = {
        f"{prefix}positional_embedding": tower.positional_embedding[:places],
        f"{prefix}attn_mask": tower.attn_mask[:places, :places],
    }
    _, features, *_ = torch.func.functional_call(model, first, (None, tokens))  # without an image
    return features


@torch.no_grad()
def encode_all(model: nn.Module, tokens: torch.Tensor, together: int = 256) -> torch.Tensor:
    """`encode_tokens` of any number of texts, in batches of 256 that are about as long. A `SHORT`
    tower gets as many as go together: the last bits of a text depend on its batch."""
    order = places_read(model, tokens).argsort(stable=True)
    features = []
    for some in order.split(together if tokens.shape[1] <= SHORT else 256):
        batch = without_padding(model, tokens[some])
        features.append(encode_tokens(model, batch))
    return torch.cat(features)[order.argsort()]


# ---------- Texts with learned words -------------------------------------------------------------
def first_word(tokenizer) -> int:
    """Where the first word of a tokenised text stands: after a start token, if there is one."""
    return int(tokenizer("")[0, 0] == tokenizer("a")[0, 0])


def encode_prompts(model, tokens: torch.Tensor, start: int, vectors: torch.Tensor) -> torch.Tensor:
    """Text features, unit-norm (n, D), of prompts in which learned vectors stand in for words.

    Args:
        tokens: (n, L), or (n, l) `without_padding`.
        vectors: (m, W), or (n, m, W) if every prompt has its own: the word embeddings at places
            start ... start + m - 1. Gradients flow to them.
    """

    def replace_words(module, arguments, embedded):  # (n, L, W)
        own = vectors.to(embedded.dtype).expand(len(embedded), -1, -1)  # (n, m, W)
        end = start + own.shape[1]
        return torch.cat([embedded[:, :start], own, embedded[:, end:]], 1)

    handle = text_tower(model).token_embedding.register_forward_hook(replace_words)
    try:
        return encode_tokens(model, tokens)
    finally:
        handle.remove()


def first_context(clip, context: str | int) -> nn.Parameter:
    """Vectors (m, W) that stand in front of class names: the word embeddings of a text, so that
    learning starts at the zero-shot prompt, or m at random (standard deviation 0.02)."""
    embedding = text_tower(clip.model).token_embedding
    if isinstance(context, int):
        vectors = 0.02 * torch.randn(context, embedding.embedding_dim).to(clip.device)
        return nn.Parameter(vectors)
    words = clip.tokenizer(context)[0]  # (L,)
    end = int(words.argmax())  # the end token has the highest number
    words = words[first_word(clip.tokenizer) : end]
    return nn.Parameter(embedding(words.to(clip.device)).detach().float())


def prompt_tokens(clip, class_names, m: int) -> torch.Tensor:
    """Tokens (C, l) of m words, for which vectors stand in, and a class name."""
    texts = []
    for name in class_names:
        texts.append("a " * m + name.replace("_", " ") + ".")
    return without_padding(clip.model, clip.tokenizer(texts)).to(clip.device)


class CoOp(nn.Module):
    """Learned context in front of the class names, the same for all (Zhou et al., 2022, Eq. 2).

        prompt of class c = v_1 ... v_m [name of c].        v (m, W): the only parameters

    Args: context: the start of v, a text or m, as in the paper; see `first_context`.
    """

    def __init__(self, clip, class_names, context: str | int = "a photo of a"):
        super().__init__()
        self.clip = clip  # no module, so that CLIP's weights are none of ours
        self.context = first_context(clip, context)  # (m, W)
        self.start = first_word(clip.tokenizer)
        self.tokens = prompt_tokens(clip, class_names, len(self.context))  # (C, l)

    def of_classes(self, class_names) -> CoOp:
        """The same learned context in front of other names."""
        other = copy.copy(self)
        other.tokens = prompt_tokens(self.clip, class_names, len(self.context))
        return other

    def forward(self) -> torch.Tensor:
        """Class features, unit-norm (C, D)."""
        return encode_prompts(self.clip.model, self.tokens, self.start, self.context)

    def logits(self, image_features) -> torch.Tensor:
        """Unit-norm image features (B, D) -> (B, C)."""
        return self.clip.logit_scale * image_features @ self().T

    def fit(self, x, y, batch_size: int = 36, steps: int = 200, lr: float = 2e-3) -> torch.Tensor:
        """Learn the context from unit-norm image features x (N, D) and labels y (N,) by
        cross-entropy. Returns class features (C, D).

        Batches come from torch's generator. Adam and steps are our choice (published: SGD).
        """
        optimizer = torch.optim.Adam(self.parameters(), lr)
        device = self.context.device
        for _ in range(steps):
            some = torch.randint(len(x), (batch_size,))
            logits = self.logits(x[some].to(device))  # (B, C)
            loss = F.cross_entropy(logits, y[some].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self().detach()


class CoCoOp(nn.Module):
    """CoOp, whose context every image moves (Zhou et al., CVPR 2022, "Conditional prompt learning
    for vision-language models", Sec. 3.2): what is learnt shall hold for classes not shown.

        prompt of class c for image x = v_1 + pi ... v_m + pi [name of c].        pi = h(x)

    h has two layers, from image features (D) by D / 16 to a word embedding (W). Every image needs
    its own C text features, so batches are small (published: one image). Args: as `CoOp`.
    """

    def __init__(self, clip, class_names, context: str | int = "a photo of a"):
        super().__init__()
        self.clip = clip
        self.context = first_context(clip, context)  # (m, W)
        self.start = first_word(clip.tokenizer)
        self.tokens = prompt_tokens(clip, class_names, len(self.context))  # (C, l)
        D = clip.encode_text(["a"]).shape[1]
        W = self.context.shape[1]
        layers = nn.Linear(D, D // 16), nn.ReLU(), nn.Linear(D // 16, W)
        self.h = nn.Sequential(*layers).to(clip.device)

    def of_classes(self, class_names) -> CoCoOp:
        """The same learned context in front of other names."""
        other = copy.copy(self)
        other.tokens = prompt_tokens(self.clip, class_names, len(self.context))
        return other

    def logits(self, image_features) -> torch.Tensor:
        """Unit-norm image features (B, D) -> (B, C)."""
        model, scale = self.clip.model, self.clip.logit_scale
        logits = []
        for feature, pi in zip(image_features, self.h(image_features)):  # (D,), (W,)
            context = self.context + pi  # (m, W)
            class_features = encode_prompts(model, self.tokens, self.start, context)  # (C, D)
            logits.append(scale * class_features @ feature)
        return torch.stack(logits)


class PromptClassifier(nn.Module):
    """CLIP's own image tower before learned prompts: images (B, 3, h, w) -> logits (B, C)."""

    def __init__(self, prompts: CoOp | CoCoOp):
        super().__init__()
        self.prompts = prompts  # the only parameters

    def forward(self, images):
        with torch.no_grad():
            features = self.prompts.clip.visual(images)  # (B, D)
        return self.prompts.logits(F.normalize(features.float(), dim=-1))
