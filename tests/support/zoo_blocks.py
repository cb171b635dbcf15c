"""What is not quite attention, and what blocks are made into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo_parts import CLASSES, SIZE, Attention, CrossBlock, PreNorm, feed_forward, split

# ---- what is not quite attention, and what blocks are made into


class LinearAttention(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        assert keep is not None
        query = functional.elu(query) + 1
        key = (functional.elu(key) + 1) * keep.transpose(-1, -2)
        states = key.transpose(-1, -2) @ value
        return (query @ states) / (query @ key.sum(2).unsqueeze(-1))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.feed = nn.Linear(6, 6), feed_forward()
        self.first, self.second = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        after: Tensor = x + self.feed(self.second(x))
        return after


class Windowed(PreNorm):
    """Attention within windows of four tokens, which are rolled by ``shift`` before and back after (Swin)."""

    def __init__(self, shift: int) -> None:
        super().__init__(Attention())
        self.shift = shift

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        normed = self.first(x).roll(-self.shift, dims=1)
        windows = torch.unflatten(normed, 1, (-1, 4))
        count = windows.shape[1]
        inside = torch.ones(count, 1, 4, 4, dtype=torch.bool, device=x.device)
        if self.shift:
            inside[-1, :, : -self.shift, -self.shift :] = False
            inside[-1, :, -self.shift :, : -self.shift] = False
        flat = windows.flatten(0, 1)
        attended = self.attention(flat, flat, inside.repeat(x.shape[0], 1, 1, 1)).unflatten(0, (-1, count))
        x = x + attended.flatten(1, 2).roll(self.shift, dims=1)
        after: Tensor = x + self.feed(self.second(x))
        return after


class LearnedQueries(nn.Module):
    """Learned queries pool a sequence into four vectors; without ``projected`` they are the queries themselves."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(4, SIZE))
        self.projected, self.attention = projected, Attention()
        if not projected:
            del self.attention.q
        self.norm, self.classify = nn.LayerNorm(SIZE), nn.Linear(SIZE, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.queries.expand(features.shape[0], -1, -1)
        attention = self.attention
        query = split(attention.q(queries) if self.projected else queries)
        key, value = split(attention.k(features)), split(attention.v(features))
        pooled = attention.finish(attention.attend(query, key, value, None))
        logits: Tensor = self.classify(self.norm(pooled).mean(1))
        return logits


class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(4, SIZE))
        self.read, self.again = CrossBlock(Attention()), CrossBlock(Attention())
        self.think = PreNorm(Attention())

    def forward(self, features: Tensor) -> Tensor:
        x = self.latents.expand(features.shape[0], -1, -1)
        result: Tensor = self.again(self.think(self.read(x, features), None), features)
        return result


class CrossStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(Attention()) for _ in range(2))

    def forward(self, features: Tensor, memory: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features, memory)
        return features


class ReturnsMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))

    def forward(self, features: Tensor) -> dict[str, Any]:
        maps: list[Tensor] = []
        for attention, norm in zip(self.blocks, self.norms, strict=True):
            assert isinstance(attention, Attention)
            normed = norm(features)
            query, key, value = attention.project(normed, normed)
            maps.append(attention.map(attention.scores(query, key)))
            features = features + attention.finish(attention.context(maps[-1], value))
        return {"hidden": features, "maps": tuple(maps)}


class SoftmaxPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PreNorm(Attention()) for _ in range(2))
        self.weigh, self.classify = nn.Linear(SIZE, 1), nn.Linear(SIZE, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features, None)
        weights = self.weigh(features).softmax(1)
        logits: Tensor = self.classify((weights * features).sum(1))
        return logits


class Experts(nn.Module):
    """The two likeliest of four dense experts, weighted by a softmax router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(SIZE, 4), nn.ModuleList(feed_forward() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        share = torch.zeros(*x.shape[:-1], 4, device=x.device).scatter(-1, chosen, weights)
        every = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (every * share.unsqueeze(-2)).sum(-1)


def with_experts(block: PreNorm) -> PreNorm:
    block.feed = Experts()
    return block


class HandwrittenRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def with_rms_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, HandwrittenRMSNorm())
    return model
