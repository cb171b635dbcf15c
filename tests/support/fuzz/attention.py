"""Attention of a case, by the kernel that it names, and spelled out, so that it leaves a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fuzz.case import WIDTH, Case


@dataclass
class Trace:
    """What a spelled-out pass leaves, in the order of the blocks.

    With ``teacher`` set, the readers of its ``point`` read the teacher's values, and what Q, K (and V) are made from is
    detached. ``quantise`` is what a ternary projection reads its input through, ``operand`` an attention product.
    """

    point: str = "none"
    teacher: Trace | None = None
    quantise: Callable[[Tensor], Tensor] = lambda value: value
    operand: Callable[[Tensor], Tensor] = lambda value: value
    stream: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    map: list[Tensor] = field(default_factory=list)
    context: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    block: list[Tensor] = field(default_factory=list)

    def read(self, name: str, value: Tensor) -> Tensor:
        """Record a value and return what its readers read."""
        found: list[Tensor] = getattr(self, name)
        found.append(value)
        if self.teacher is None or name != self.point:
            return value
        theirs: list[Tensor] = getattr(self.teacher, name)
        return theirs[len(found) - 1]


class Attention(nn.Module):
    """One attention block, without residual and norm."""

    def __init__(self, case: Case, cross: bool = False) -> None:
        super().__init__()
        self.case, self.cross = case, cross
        self.kind = "separate" if cross and case.projection != "kv" else case.projection
        self.fused: nn.Module
        conv1d: Any = Conv1D
        self.inner, self.keyed = case.heads * case.head_width, case.key_heads * case.head_width
        if case.kernel == "multihead":
            self.multihead = nn.MultiheadAttention(
                WIDTH, case.heads, dropout=case.dropout, bias=case.bias, batch_first=True
            )
            return
        if self.kind in ("qkv", "interleaved"):
            self.fused = nn.Linear(WIDTH, self.inner + 2 * self.keyed, bias=case.bias)
        elif self.kind == "conv1d":
            self.fused = conv1d(self.inner + 2 * self.keyed, WIDTH)
        else:
            self.query = nn.Linear(WIDTH, self.inner, bias=case.bias)
            if self.kind == "kv":
                self.both = nn.Linear(WIDTH, 2 * self.keyed, bias=case.bias)
            else:
                self.key = nn.Linear(WIDTH, self.keyed, bias=case.bias)
                self.value = nn.Linear(WIDTH, self.keyed, bias=case.bias)
        self.output = (
            conv1d(WIDTH, self.inner)
            if case.projection == "conv1d"
            else nn.Linear(self.inner, WIDTH, bias=case.bias)
        )
        self.dropout = nn.Dropout(case.dropout)
        if case.query_norm:
            self.query_norm = nn.RMSNorm(case.head_width, eps=1e-6)
            self.key_norm = nn.RMSNorm(case.head_width, eps=1e-6)

    def ternary(self) -> list[str]:
        """Return the names of the weights of projections, below this module."""
        if self.case.kernel == "multihead":
            # of cross-attention the weight is cut in two before it is read, and kept
            return ["multihead.in_proj_weight"] * (not self.cross) + ["multihead.out_proj.weight"]
        return [
            f"{name}.weight" for name, part in self.named_children() if isinstance(part, nn.Linear | Conv1D)
        ]

    def forward(
        self, hidden: Tensor, memory: Tensor, bias: Tensor | None, keep: Tensor | None, trace: Trace | None
    ) -> Tensor:
        case = self.case
        if case.kernel == "multihead":
            return self.by_multihead(hidden, memory, bias, keep, trace)
        query, key, value = self.projected(hidden, memory, trace)
        query, key, value = (
            part.unflatten(-1, (-1, case.head_width)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for part in (query, key, value)
        )
        if case.query_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if case.positions == "rotary" and not self.cross:
            query, key = rotated(query), rotated(key)
        if case.kernel != "sdpa" or trace is not None:
            groups = case.heads // case.key_heads
            if groups > 1:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if trace is not None:
            context = self.spelled(query, key, value, bias, keep, trace)
        elif case.kernel == "sdpa":
            context = self.by_sdpa(query, key, value, bias, keep)
        else:
            context = self.by_hand(query, key, value, bias, keep)
        merged = context.transpose(1, 2).flatten(2)
        if trace is None:
            return self.output(merged)  # type: ignore[no-any-return]
        return trace.read("output", self.output(trace.quantise(merged)))

    def projected(self, hidden: Tensor, memory: Tensor, trace: Trace | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V; as a trace wants them, on detached and quantised inputs."""
        keyed = valued = memory
        if trace is not None:
            hidden = trace.quantise(hidden)
            keyed = valued = trace.quantise(memory) if self.cross else hidden
            if trace.point != "none" and trace.teacher is not None:
                hidden, keyed = hidden.detach(), keyed.detach()
                valued = valued if trace.point == "map" else valued.detach()
        sizes = (self.inner, self.keyed, self.keyed)
        if self.kind in ("qkv", "conv1d"):
            query, key, value = self.fused(hidden).split(sizes, -1)
            return query, key, value if valued is hidden else self.fused(valued).split(sizes, -1)[2]
        if self.kind == "interleaved":
            width = self.case.head_width

            def parts(source: Tensor) -> tuple[Tensor, ...]:
                return self.fused(source).unflatten(-1, (self.case.heads, 3, width)).unbind(3)  # type: ignore[no-any-return]

            query, key, value = parts(hidden)
            value = value if valued is hidden else parts(valued)[2]
            return query.flatten(2), key.flatten(2), value.flatten(2)
        if self.kind == "kv":
            key, value = self.both(keyed).chunk(2, -1)
            return self.query(hidden), key, value if valued is keyed else self.both(valued).chunk(2, -1)[1]
        return self.query(hidden), self.key(keyed), self.value(valued)

    @property
    def factor(self) -> float:
        """What products of Q and K are scaled with."""
        return 1.0 if self.case.scale == "none" else 1 / math.sqrt(self.case.head_width)

    def by_hand(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        case = self.case
        if case.scale == "query":
            query = query * self.factor
        if case.kernel == "einsum":
            scores = torch.einsum("bhnd,bhmd->bhnm", query, key)
        elif case.kernel == "bmm":
            flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
            scores = flat.view(query.shape[0], case.heads, query.shape[2], key.shape[2])
        else:
            scores = query @ key.transpose(-1, -2)
        if case.scale == "scores":
            scores = scores / math.sqrt(case.head_width)
        if bias is not None:
            scores = scores + bias
        if keep is not None:
            scores = masked(scores, keep, case.masking)
        if case.kernel == "float32":
            probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        else:
            probabilities = scores.softmax(-1)
        probabilities = self.dropout(probabilities)
        if case.kernel == "einsum":
            return torch.einsum("bhnm,bhmd->bhnd", probabilities, value)
        context: Tensor = probabilities @ value
        return context

    def by_sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        case = self.case
        added = self.added(query, bias, keep)
        attention_mask = keep if added is None else added
        is_causal = case.causal == "flag" and attention_mask is None and not self.cross
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=case.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=None if case.scale != "none" else 1.0,
            enable_gqa=case.key_heads != case.heads,
        )

    def added(self, query: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor | None:
        """Return the mask of numbers that the fused kernel adds to scores, None if it takes ``keep`` itself."""
        if bias is None and (keep is None or self.case.masking == "fill"):
            return None
        found = torch.zeros((), dtype=query.dtype) if bias is None else bias
        return found if keep is None else masked(found, keep, self.case.masking)

    def by_multihead(
        self, hidden: Tensor, memory: Tensor, bias: Tensor | None, keep: Tensor | None, trace: Trace | None
    ) -> Tensor:
        inner, case = self.multihead, self.case
        if trace is None:
            padding = tokens = None
            if keep is not None and keep.dim() == 4 and keep.shape[1:3] == (1, 1):
                padding = ~keep[:, 0, 0]
            elif keep is not None:
                tokens = ~keep.expand(hidden.shape[0], case.heads, hidden.shape[1], memory.shape[1])
                tokens = tokens.flatten(0, 1)
            context, _ = inner(
                hidden, memory, memory, key_padding_mask=padding, attn_mask=tokens, need_weights=False
            )
            return context  # type: ignore[no-any-return]
        keyed = valued = memory if self.cross else trace.quantise(memory)
        hidden = hidden if self.cross else trace.quantise(hidden)
        if trace.point != "none" and trace.teacher is not None:
            hidden, keyed = hidden.detach(), keyed.detach()
            valued = valued if trace.point == "map" else valued.detach()
        parts = [
            F.linear(source, weight, offset).unflatten(-1, (case.heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for source, weight, offset in zip(
                (hidden, keyed, valued),
                inner.in_proj_weight.chunk(3),
                (None,) * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3),
                strict=True,
            )
        ]
        context = self.spelled(parts[0], parts[1], parts[2], bias, keep, trace).transpose(1, 2).flatten(2)
        out = inner.out_proj
        return trace.read("output", F.linear(trace.quantise(context), out.weight, out.bias))

    def spelled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        trace: Trace,
    ) -> Tensor:
        """Return the context of softmax(QKᵀ · scale + mask) V, whatever kernel the case names."""
        scale = 1 / math.sqrt(WIDTH / self.case.heads) if self.case.kernel == "multihead" else self.factor
        if self.case.scale == "query" and self.case.kernel not in ("sdpa", "multihead"):
            query, scale = query * scale, 1.0  # whole numbers times a scale may be ties for the quantiser
        scores = trace.operand(query) @ trace.operand(key).transpose(-1, -2) * scale
        added = self.added(query, bias, keep) if self.case.kernel == "sdpa" else None
        if (
            added is not None
        ):  # gradients go through a sum where nothing counts, and not through a replacement
            scores, bias, keep = scores + added, None, None
        if bias is not None:
            scores = scores + bias
        if keep is not None:
            scores = masked(scores, keep, "fill" if self.case.kernel == "multihead" else self.case.masking)
        trace.scores.append(scores)
        wide = torch.float32 if self.case.kernel == "float32" else None
        probabilities = scores.softmax(-1, dtype=wide).to(scores.dtype)
        if keep is not None and self.case.kernel == "sdpa":
            # torch: no key that counts, no context
            probabilities = torch.where(keep.any(-1, keepdim=True), probabilities, 0)
        probabilities = trace.read("map", probabilities)
        return trace.read("context", trace.operand(probabilities) @ trace.operand(value))


def masked(scores: Tensor, keep: Tensor, masking: str) -> Tensor:
    """Return scores that no longer count where ``keep`` is false."""
    lowest = torch.finfo(scores.dtype).min
    if masking == "add":
        return scores + (1.0 - keep.to(scores.dtype)) * lowest
    if masking == "add-10000":
        return scores + (1.0 - keep.to(scores.dtype)) * -10000.0
    if masking == "where":
        return torch.where(keep, scores, torch.full((), lowest, dtype=scores.dtype))
    return scores.masked_fill(~keep, lowest)


def rotated(value: Tensor) -> Tensor:
    """Return heads turned by their token's place, halves paired."""
    half = value.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(value.shape[2], dtype=torch.float32)[:, None] * frequency
    cosine, sine = angle.cos().to(value.dtype), angle.sin().to(value.dtype)
    left, right = value[..., :half], value[..., half:]
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)
