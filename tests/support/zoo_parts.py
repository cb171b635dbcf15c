"""The pieces of the plain-PyTorch zoo: one attention that its variants change in one place, and towers around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32
HEADS = 4
HEAD = SIZE // HEADS
VOCABULARY = 1100  # above Ternarize's min_rows, so that the word embedding is ternary
CLASSES = 5
LONGEST = 32  # of position tables


class Attention(nn.Module):
    """Multi-head attention over ``(batch, length, size)``; each method is one step that a variant may replace.

    ``keep`` is a boolean mask that broadcasts to ``(batch, heads, queries, keys)``, True where a key may be read.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.make()

    def make(self) -> None:
        """Create the projections."""
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K, V of shape ``(batch, heads, length, head)``."""
        return split(self.q(x)), split(self.k(memory)), split(self.v(memory))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the scaled products ``(batch, heads, queries, keys)``."""
        return query @ key.transpose(-1, -2) / math.sqrt(HEAD)

    def mask(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Return the scores with the keys that may not be read at the lowest number."""
        return scores + (~keep).to(scores.dtype) * torch.finfo(scores.dtype).min

    def map(self, scores: Tensor) -> Tensor:
        """Return the attention map."""
        return scores.softmax(-1)

    def context(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """Return the context ``(batch, heads, queries, head)``."""
        return probabilities @ value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        """Return the context ``(batch, heads, queries, head)``."""
        scores = self.scores(query, key)
        if self.causal:
            below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            keep = below if keep is None else keep & below
        if keep is not None:
            scores = self.mask(scores, keep)
        return self.context(self.map(scores), value)

    def finish(self, context: Tensor) -> Tensor:
        """Return the merged and projected context."""
        output: Tensor = self.o(merge(context))
        return output

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None) -> Tensor:
        return self.finish(self.attend(*self.project(x, memory), keep))


def split(x: Tensor) -> Tensor:
    """Return ``(batch, heads, length, head)`` of ``(batch, length, heads * head)``."""
    return torch.unflatten(x, -1, (-1, HEAD)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """Undo :func:`split`."""
    return x.transpose(1, 2).flatten(2)


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.GELU(), nn.Linear(2 * SIZE, SIZE))


class PreNorm(nn.Module):
    """x + f(norm(x)), twice."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed = attention, feed_forward()
        self.first, self.second = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        normed = self.first(x)
        x = x + self.attention(normed, normed, keep)
        after: Tensor = x + self.feed(self.second(x))
        return after


class PostNorm(PreNorm):
    """norm(x + f(x)), twice."""

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = self.first(x + self.attention(x, x, keep))
        after: Tensor = self.second(x + self.feed(x))
        return after


class Parallel(PreNorm):
    """Attention and feed-forward read one norm and are added together (GPT-J, PaLM)."""

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        normed = self.first(x)
        after: Tensor = x + self.attention(normed, normed, keep) + self.feed(normed)
        return after


class Sandwich(PreNorm):
    """A norm before and after each half (CogView, Gemma 2)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.third, self.fourth = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        normed = self.first(x)
        x = x + self.third(self.attention(normed, normed, keep))
        after: Tensor = x + self.fourth(self.feed(self.second(x)))
        return after


class CrossBlock(PreNorm):
    """Cross-attention alone, and a feed-forward."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.first(x), memory, None)
        after: Tensor = x + self.feed(self.second(x))
        return after


class Classifier(nn.Module):
    """Token ids and a padding mask to class logits, through blocks that take ``(x, keep)``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, SIZE), nn.Embedding(LONGEST, SIZE)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.classify = nn.LayerNorm(SIZE), nn.Linear(SIZE, CLASSES)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, keep.bool()[:, None, None, :])
        logits: Tensor = self.classify(self.norm(x)[:, 0])
        return logits


class LanguageModel(Classifier):
    """Token ids to a token's logits at each position, no padding; the head may be tied to the word embedding."""

    def __init__(self, *blocks: nn.Module, tied: bool = False) -> None:
        super().__init__(*blocks)
        self.classify = nn.Linear(SIZE, VOCABULARY, bias=False)
        if tied:
            self.classify.weight = self.words.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.classify(self.norm(x))}


class Features(nn.Module):
    """Feature vectors ``(batch, length, size)`` to the same, through blocks that take ``(x, keep)``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features, None)
        return features


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model in eval mode with weights drawn so that attention matters.

    Matrices keep a unit variance, times 1.3: scores then have a standard deviation near 1.7, and no map is uniform.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for module in model.modules():
                for parameter in module.parameters(recurse=False):
                    if parameter.dim() < 2:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                    else:
                        fan_in = 1.69 if isinstance(module, nn.Embedding) else parameter[0].numel()
                        parameter.normal_(0, 1.3 / math.sqrt(fan_in))
    return model


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids, and a mask that pads the last row's last two tokens."""
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    keep = torch.ones(batch, length, dtype=torch.int64)
    keep[-1, -2:] = 0
    return {"tokens": ids, "keep": keep}


def features(batch: int, length: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(batch))


class Torch(nn.Module):
    """torch.nn's own encoder or decoder between an embedding and a head."""

    def __init__(self, tower: nn.Module, **options: Any) -> None:
        super().__init__()
        self.words, self.tower, self.classify = (
            nn.Embedding(VOCABULARY, SIZE),
            tower,
            nn.Linear(SIZE, CLASSES),
        )
        self.batch_first = options.get("batch_first", True)
        self.causal = options.get("causal")

    def arrange(self, x: Tensor) -> Tensor:
        """Put the sequence first where the tower wants it, and back."""
        return x if self.batch_first else x.transpose(0, 1)


class TorchEncoder(Torch):
    """nn.TransformerEncoder."""

    def forward(self, tokens: Tensor, keep: Tensor) -> dict[str, Tensor]:
        padding = ~keep.bool()
        x = self.arrange(self.tower(self.arrange(self.words(tokens)), src_key_padding_mask=padding))
        return {"logits": self.classify(x[:, 0]), "features": x}


class TorchDecoder(Torch):
    """nn.TransformerDecoder with a causal mask over its own tokens, reading the encoder's features."""

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        length = tokens.shape[1]
        blocked = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        x = self.tower(
            self.arrange(self.words(tokens)),
            self.arrange(memory),
            tgt_mask=blocked,
            tgt_is_causal=self.causal,
        )
        logits: Tensor = self.classify(self.arrange(x))
        return logits


def relative_positions(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return key position minus query position, ``(queries, keys)``."""
    return torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to ``(batch, heads, length, head)``."""
    frequencies = 100.0 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, **options)
