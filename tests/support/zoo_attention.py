"""The ways in which people write attention, each as the one step in which it differs from ``zoo_parts.Attention``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from zoo_parts import HEAD, HEADS, LONGEST, SIZE, Attention, merge, relative_positions, rotate, sdpa, split

# ---- torch.nn's own attention


class TorchSelf(nn.Module):
    """nn.MultiheadAttention as self-attention; ``weights`` asks for the map, which turns fused attention off."""

    def __init__(self, weights: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, dropout=0.1, batch_first=True, **options)
        self.weights = weights

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        padding = ~keep[:, 0, 0]
        output: Tensor = self.attention(
            x, memory, memory, key_padding_mask=padding, need_weights=self.weights
        )[0]
        return output


class TorchCross(nn.Module):
    """nn.MultiheadAttention whose keys and values have widths of their own, two in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(SIZE, HEADS, kdim=20, vdim=12, batch_first=True) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))

    def forward(self, features: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features = features + layer(norm(features), keys, values)[0]
        return features


class WholeTransformer(nn.Module):
    """nn.Transformer with a causal target mask."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(SIZE, HEADS, 2, 2, 48, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        result: Tensor = self.transformer(source, target, tgt_mask=causal)
        return result


# ---- scores


class BooleanMask(Attention):
    def mask(self, scores: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, scores, torch.finfo(scores.dtype).min)


class InfiniteMask(Attention):
    def mask(self, scores: Tensor, keep: Tensor) -> Tensor:
        return scores.masked_fill(~keep, float("-inf"))


class Alibi(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=query.device)
        distance = relative_positions(query.shape[2], key.shape[2], query.device).abs()
        return super().scores(query, key) - slopes[:, None, None] * distance


class Rotary(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(rotate(query), rotate(key))


class RelativeBias(Attention):
    """A learned bias for each distance and head (T5)."""

    def make(self) -> None:
        super().make()
        self.bias = nn.Embedding(2 * LONGEST, HEADS)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        distance = relative_positions(query.shape[2], key.shape[2], query.device)
        bias: Tensor = self.bias(distance + LONGEST).permute(2, 0, 1)[None]
        return super().scores(query, key) + bias


class QueryKeyNorm(Attention):
    def make(self) -> None:
        super().make()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(self.q_norm(query), self.k_norm(key))


class Cosine(Attention):
    def make(self) -> None:
        super().make()
        self.temperature = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        products = functional.normalize(query, dim=-1) @ functional.normalize(key, dim=-1).transpose(-2, -1)
        return products * self.temperature.clamp(max=4.6).exp() * 4


class Softcapped(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return 10.0 * torch.tanh(super().scores(query, key) / 10.0)


class Sinks(Attention):
    """A learned logit a head competes with the keys and is dropped after softmax."""

    def make(self) -> None:
        super().make()
        self.sink = nn.Parameter(torch.zeros(HEADS))

    def map(self, scores: Tensor) -> Tensor:
        sink = self.sink.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


class TalkingHeads(Attention):
    def make(self) -> None:
        super().make()
        self.before, self.after = nn.Linear(HEADS, HEADS, bias=False), nn.Linear(HEADS, HEADS, bias=False)

    def map(self, scores: Tensor) -> Tensor:
        mixed = self.before(scores.clamp(min=-1e4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        probabilities: Tensor = self.after(mixed.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return probabilities


class Disentangled(Attention):
    """Content to content, content to position, position to content: three score terms (DeBERTa)."""

    def make(self) -> None:
        super().make()
        self.table = nn.Embedding(LONGEST, SIZE)
        self.position_q, self.position_k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        places = self.table(torch.arange(key.shape[2], device=key.device))[None]
        to_position = query @ split(self.position_k(places)).transpose(-1, -2)
        to_content = split(self.position_q(places)) @ key.transpose(-1, -2)
        return (query @ key.transpose(-1, -2) + to_position + to_content) / math.sqrt(3 * HEAD)


class Differential(Attention):
    """The difference of two maps."""

    def make(self) -> None:
        super().make()
        self.q2, self.k2 = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.share = nn.Parameter(torch.full((HEADS, 1, 1), 0.4))

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None) -> Tensor:
        assert keep is not None
        query, key, value = self.project(x, memory)
        first = self.map(self.mask(self.scores(query, key), keep))
        second = self.map(self.mask(self.scores(split(self.q2(x)), split(self.k2(memory))), keep))
        return self.finish(self.context(first - self.share * second, value))


class Float32Softmax(Attention):
    def map(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


class KeysFirst(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return key @ query.transpose(-1, -2) / math.sqrt(HEAD)

    def mask(self, scores: Tensor, keep: Tensor) -> Tensor:
        return super().mask(scores, keep.transpose(-1, -2))

    def map(self, scores: Tensor) -> Tensor:
        return scores.softmax(-2)

    def context(self, probabilities: Tensor, value: Tensor) -> Tensor:
        return (value.transpose(-1, -2) @ probabilities).transpose(-1, -2)


class HandwrittenSoftmax(Attention):
    def map(self, scores: Tensor) -> Tensor:
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)


class SoftmaxOne(Attention):
    def map(self, scores: Tensor) -> Tensor:
        powers = torch.exp(scores.clamp(max=20))
        return powers / (1 + powers.sum(-1, keepdim=True))


# ---- products


class Einsum(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(HEAD)

    def context(self, probabilities: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("bhqk,bhkd->bhqd", probabilities, value)


class EinsumProjections(Einsum):
    def make(self) -> None:
        self.wq, self.wk, self.wv = (nn.Parameter(torch.empty(SIZE, HEADS, HEAD)) for _ in range(3))
        self.wo = nn.Parameter(torch.empty(HEADS, HEAD, SIZE))

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ((x, self.wq), (memory, self.wk), (memory, self.wv))
        query, key, value = (torch.einsum("bld,dhe->bhle", part, weight) for part, weight in pairs)
        return query, key, value

    def finish(self, context: Tensor) -> Tensor:
        return torch.einsum("bhqe,hed->bqd", context, self.wo)


class Bmm(Attention):
    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)) * HEAD**-0.5
        return torch.unflatten(flat, 0, (-1, HEADS))

    def context(self, probabilities: Tensor, value: Tensor) -> Tensor:
        return torch.unflatten(torch.bmm(probabilities.flatten(0, 1), value.flatten(0, 1)), 0, (-1, HEADS))


class Baddbmm(Bmm):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        assert keep is not None
        lowest = torch.finfo(query.dtype).min / 2
        bias = ((~keep).to(query.dtype) * lowest).expand(-1, HEADS, query.shape[2], -1).flatten(0, 1)
        scores = torch.baddbmm(
            bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), beta=1.0, alpha=HEAD**-0.5
        )
        return self.context(torch.unflatten(scores.softmax(-1), 0, (-1, HEADS)), value)


class Elementwise(Attention):
    def context(self, probabilities: Tensor, value: Tensor) -> Tensor:
        return (probabilities.unsqueeze(-1) * value.unsqueeze(2)).sum(3)


class Grouped(Attention):
    """Fewer heads of keys and values than of queries, repeated; ``fused``: by enable_gqa, causal."""

    def __init__(self, groups: int = 2, fused: bool = False) -> None:
        self.groups, self.fused = groups, fused
        super().__init__()

    def make(self) -> None:
        super().make()
        self.k, self.v = nn.Linear(SIZE, self.groups * HEAD), nn.Linear(SIZE, self.groups * HEAD)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        if self.fused:
            return sdpa(query, key, value, is_causal=True, enable_gqa=True)
        repeats = HEADS // self.groups
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        return super().attend(query, key, value, keep)


class GroupedByReshape(Grouped):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        assert keep is not None
        query = torch.unflatten(query, 1, (self.groups, -1))
        scores = query @ key.unsqueeze(2).transpose(-1, -2) / math.sqrt(HEAD)
        context = self.map(self.mask(scores, keep.unsqueeze(1))) @ value.unsqueeze(2)
        return context.flatten(1, 2)


class Fused(Attention):
    """scaled_dot_product_attention with its options; dropout in training only."""

    def __init__(self, dropout_p: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.dropout_p, self.options = dropout_p, options

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        dropout = self.dropout_p if self.training else 0.0
        return sdpa(query, key, value, attn_mask=keep, dropout_p=dropout, **self.options)


# ---- projections


class FusedProjection(Attention):
    """One linear for Q, K and V, taken apart in one of six ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def make(self) -> None:
        self.qkv, self.o = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.qkv(x)
        batch, length = x.shape[:2]
        if self.way == "chunk":
            query, key, value = map(split, made.chunk(3, dim=-1))
        elif self.way == "split":
            query, key, value = map(split, made.split(SIZE, dim=-1))
        elif self.way == "unbind":
            query, key, value = map(split, made.view(batch, length, 3, SIZE).unbind(2))
        elif self.way == "permute":
            stacked = made.reshape(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
            query, key, value = stacked[0], stacked[1], stacked[2]
        elif self.way == "slices":
            query, key, value = (split(made[..., i * SIZE : (i + 1) * SIZE]) for i in range(3))
        else:
            heads = made.view(batch, length, HEADS, 3 * HEAD).transpose(1, 2)
            query, key, value = heads.chunk(3, dim=-1)
        return query, key, value


class FusedKeyValue(Attention):
    def make(self) -> None:
        self.q, self.kv, self.o = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.kv(memory).chunk(2, dim=-1)
        return split(self.q(x)), split(key), split(value)


class TransposedLinear(nn.Module):
    """``x @ weight + bias`` over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(SIZE, SIZE)), nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, SIZE), self.weight).view(*x.shape[:-1], SIZE)


class TransposedLinears(Attention):
    def make(self) -> None:
        self.q, self.k, self.v, self.o = (TransposedLinear() for _ in range(4))  # type: ignore[assignment]


class Convolution(nn.Conv1d):
    """A convolution of width 1 over ``(batch, length, size)``."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Convolved(Attention):
    def make(self) -> None:
        self.q, self.k, self.v, self.o = (Convolution() for _ in range(4))  # type: ignore[assignment]


class WithoutOutput(Attention):
    def make(self) -> None:
        self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def finish(self, context: Tensor) -> Tensor:
        return merge(context)


class Latent(Attention):
    def make(self) -> None:
        super().make()
        self.down, self.down_norm = nn.Linear(SIZE, SIZE // 2), nn.RMSNorm(SIZE // 2)
        self.k, self.v = nn.Linear(SIZE // 2, SIZE), nn.Linear(SIZE // 2, SIZE)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = self.down_norm(self.down(memory))
        return split(self.q(x)), split(self.k(low)), split(self.v(low))


class WeightNormed(Attention):
    def make(self) -> None:
        self.q, self.k, self.v, self.o = (
            parametrizations.weight_norm(nn.Linear(SIZE, SIZE)) for _ in range(4)
        )


class LoraLinear(nn.Module):
    """A frozen linear plus a trained product of two thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.down, self.up = nn.Linear(SIZE, 4, bias=False), nn.Linear(4, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x)) * 0.5
        return result


class Lora(Attention):
    def make(self) -> None:
        self.q, self.k, self.v, self.o = (LoraLinear() for _ in range(4))  # type: ignore[assignment]
