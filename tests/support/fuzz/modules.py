"""The module of a case, in plain PyTorch, and the same module with attention spelled out, which leaves a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from fuzz.attention import Attention, Trace
from fuzz.case import MASKED, TABLE, VOCABULARY, WIDTH, Case

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh-gelu": lambda value: F.gelu(value, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "square": lambda value: F.relu(value) ** 2,
    "quick": lambda value: value * torch.sigmoid(1.702 * value),
}


@dataclass
class Result(ModelOutput):
    """What a Hugging Face model returns."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class FeedForward(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        gated = case.feed_forward == "gated"
        linear: Any = (
            (lambda wide, narrow: Conv1D(narrow, wide))  # type: ignore[no-untyped-call]
            if case.projection == "conv1d"
            else (lambda wide, narrow: nn.Linear(wide, narrow, bias=case.bias))
        )
        self.up = linear(WIDTH, 24)
        if gated:
            self.gate = linear(WIDTH, 24)
        self.down = linear(24, WIDTH)
        self.dropout = nn.Dropout(case.dropout)

    def forward(self, hidden: Tensor, trace: Trace | None) -> Tensor:
        quantise = (lambda value: value) if trace is None else trace.quantise
        activation = ACTIVATIONS[self.case.activation]
        hidden = quantise(hidden)
        if self.case.feed_forward == "gated":
            wide = activation(self.gate(hidden)) * self.up(hidden)
        else:
            wide = activation(self.up(hidden))
        return self.dropout(self.down(quantise(wide)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.parts = nn.ModuleList([Attention(case)])
        if case.memory:
            self.parts.append(Attention(case, cross=True))
        if case.feed_forward != "none":
            self.parts.append(FeedForward(case))
        kind: Any = nn.RMSNorm if case.rms else nn.LayerNorm
        self.norms = nn.ModuleList(kind(WIDTH, eps=1e-6) for _ in self.parts if case.norm != "none")
        self.after = nn.ModuleList(kind(WIDTH, eps=1e-6) for _ in self.parts if case.norm == "sandwich")
        self.dropout = nn.Dropout(case.dropout)

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor | None,
        bias: Tensor | None,
        keep: Tensor | None,
        trace: Trace | None,
    ) -> Tensor:
        norm = self.case.norm
        if trace is not None:
            trace.stream.append(hidden)
        for index, part in enumerate(self.parts):
            source = self.norms[index](hidden) if norm in ("pre", "sandwich") else hidden
            if isinstance(part, FeedForward):
                result = part(source, trace)
            elif part.cross:
                assert memory is not None
                result = self.dropout(part(source, memory, None, None, trace))
            else:
                result = self.dropout(part(source, source, bias, keep, trace))
            if norm == "sandwich":
                result = self.after[index](result)
            hidden = hidden + result
            if norm == "post":
                hidden = self.norms[index](hidden)
            if trace is not None and isinstance(part, Attention):
                trace.block.append(hidden)
        return hidden


class Transformer(nn.Module):
    """The module of a case. ``run`` with a trace is the same function with attention spelled out."""

    counter: Tensor
    centre: Tensor
    causal_mask: Tensor
    waves: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        if case.ids != "none":
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        else:
            self.enter = nn.Linear(WIDTH, WIDTH)
        if case.positions == "learned":
            self.places = nn.Embedding(TABLE, WIDTH)
        elif case.positions == "parameter":
            self.place = nn.Parameter(torch.randn(1, TABLE, WIDTH) * 0.5)
        elif case.positions == "relative":
            self.relative = nn.Embedding(9, case.heads)
        elif case.positions == "sinusoidal":
            angle = torch.arange(TABLE)[:, None] / 50.0 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
            self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], -1), persistent=False)
        if case.causal == "buffer":
            lower = torch.ones(TABLE, TABLE, dtype=torch.bool).tril()
            self.register_buffer("causal_mask", lower[None, None])
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.layers))
        if case.norm == "pre":
            self.final = (nn.RMSNorm if case.rms else nn.LayerNorm)(WIDTH, eps=1e-6)
        if case.extra in ("batch-norm", "batch-norm-mean"):
            momentum: Any = 0.1 if case.extra == "batch-norm" else None
            self.batch_norm = nn.BatchNorm1d(WIDTH, momentum=momentum)
        if case.extra == "counter":
            self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        if case.extra == "centre":
            self.register_buffer("centre", torch.zeros(WIDTH))
        if case.pooling == "dense":
            self.pooler = nn.Linear(WIDTH, WIDTH)
        sizes = {"classes": 3, "number": 1, "vector": 6, "tokens": VOCABULARY}
        self.head = nn.Linear(WIDTH, sizes[case.head], bias=not case.tied)
        if case.tied:
            self.head.weight = self.tokens.weight

    def forward(
        self,
        ids: Tensor | None = None,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> Any:
        return self.run(ids, features, mask, memory, prompts)

    def run(
        self,
        ids: Tensor | None = None,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        prompts: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Any:
        case = self.case
        hidden = self.embedded(ids, features, trace)
        tokens = hidden.shape[1]
        if case.extra == "pad-4" and tokens % 4:
            more = 4 - tokens % 4
            hidden = F.pad(hidden, (0, 0, 0, more), value=0.5)
            if mask is not None:
                mask = F.pad(mask, (0, more), value={"ignore": 1, "additive4": -1e4}.get(case.mask, 0))
        hidden = self.placed(hidden)
        bias, keep = self.scores_masks(hidden, mask)
        for block in self.blocks:
            hidden = block(hidden, memory, bias, keep, trace)
        if trace is not None:
            trace.stream.append(hidden)
        if case.norm == "pre":
            hidden = self.final(hidden)
        if case.extra in ("batch-norm", "batch-norm-mean"):
            hidden = self.batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
        if case.extra == "centre":
            if self.training:
                with torch.no_grad():
                    self.centre.mul_(0.9).add_(0.1 * hidden.mean((0, 1)))
            hidden = hidden - self.centre
        if case.extra == "counter" and self.training:
            self.counter += 1
        if case.extra == "pad-4":
            hidden = hidden[:, :tokens]
            mask = None if mask is None else mask[..., :tokens]
        pooled = self.pooled(hidden, mask, trace)
        if trace is not None and case.tied and case.tables:  # the table is ternary, and so is the head
            pooled = trace.quantise(pooled)
        logits = self.head(pooled)
        if prompts is not None:
            logits = F.normalize(logits, dim=-1) @ F.normalize(prompts, dim=-1).T
        return self.returned(logits, hidden)

    def embedded(self, ids: Tensor | None, features: Tensor | None, trace: Trace | None) -> Tensor:
        """Return the embeddings of ids or features, after what the case decides by their values and sizes."""
        extra = self.case.extra
        if ids is not None:
            if extra == "check" and not bool((ids >= 2).all()):
                raise ValueError("ids below 2 are reserved")
            hidden = self.tokens(ids)
            if extra == "by-value" and bool((ids == 3).any()):
                hidden = hidden * 2
            if extra == "no-grad":
                with torch.no_grad():
                    hidden = hidden + 0.5 * self.tokens(ids).flip(-1)
        else:
            assert features is not None
            hidden = self.enter(features if trace is None else trace.quantise(features))
            if extra == "by-value" and bool((features > 2.5).any()):
                hidden = hidden * 2
        if extra == "detach":
            hidden = hidden + 0.5 * hidden.detach().flip(-1)
        if extra == "long-10" and hidden.shape[1] > 10:
            hidden = hidden * 0.5
        if extra == "even" and hidden.shape[1] % 2 == 0:
            hidden = hidden.flip(-1)
        if extra == "batch-3" and hidden.shape[0] >= 3:
            hidden = hidden * 0.5
        if extra == "mean-of-batch":
            hidden = hidden - hidden.mean(0, keepdim=True)
        if extra == "layer-drop-0" and self.training and float(torch.rand(())) < 0.0:
            hidden = hidden * 0
        embedded: Tensor = hidden
        return embedded

    def placed(self, hidden: Tensor) -> Tensor:
        """Add what the tokens' places give."""
        tokens, positions = hidden.shape[1], self.case.positions
        if positions == "learned":
            learned: Tensor = self.places(torch.arange(tokens))
            return hidden + learned
        if positions == "parameter":
            return hidden + self.place[:, :tokens]
        if positions == "sinusoidal":
            return hidden + self.waves[:tokens]
        return hidden

    def scores_masks(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what is added to scores, and which scores count."""
        case, tokens = self.case, hidden.shape[1]
        bias: Tensor | None = None
        keep: Tensor | None = None
        place = torch.arange(tokens)
        distance = place[None, :] - place[:, None]
        if case.positions == "alibi":
            slopes = 2.0 ** -torch.arange(1, case.heads + 1)
            bias = (slopes[:, None, None] * -distance.abs()).to(hidden.dtype)[None]
        if case.positions == "relative":
            bias = self.relative(distance.clamp(-4, 4) + 4).permute(2, 0, 1)[None]
        if mask is not None and case.mask in MASKED:
            if case.mask == "additive4":
                bias = mask if bias is None else bias + mask
            elif case.mask == "bool4":
                keep = mask
            else:
                keep = (~mask if case.mask == "ignore" else mask > 0)[:, None, None, :]
        if case.causal == "places":
            keep = both(keep, (distance <= 0)[None, None])
        elif case.causal == "tril":
            keep = both(keep, torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None])
        elif case.causal == "buffer":
            keep = both(keep, self.causal_mask[:, :, :tokens, :tokens])
        elif case.causal == "flag" and (keep is not None or bias is not None or case.window):
            keep = both(keep, (distance <= 0)[None, None])
        elif case.causal == "flag":
            # the kernel's own flag; spelled out where it has none
            keep = None if case.kernel == "sdpa" and not self.is_spelled else (distance <= 0)[None, None]
        if case.window:
            keep = both(keep, (distance.abs() <= case.window)[None, None])
        return bias, keep

    is_spelled = False

    def pooled(self, hidden: Tensor, mask: Tensor | None, trace: Trace | None) -> Tensor:
        """Return what the head reads."""
        pooling = self.case.pooling
        if pooling in ("first", "dense"):
            hidden = hidden[:, 0]
        elif pooling == "mean":
            hidden = hidden.mean(1)
        elif pooling == "last":
            hidden = hidden[:, -1]
        elif pooling in ("masked", "last-kept"):
            assert mask is not None
            kept = ~mask if self.case.mask == "ignore" else mask
            if pooling == "masked":
                weight = kept.to(hidden.dtype)[..., None]
                hidden = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
            else:
                last = (kept.to(torch.int64).sum(1) - 1).clamp(min=0)
                hidden = hidden[torch.arange(hidden.shape[0]), last]
        if pooling == "dense":
            hidden = torch.tanh(self.pooler(hidden if trace is None else trace.quantise(hidden)))
        return hidden

    def returned(self, logits: Tensor, hidden: Tensor) -> Any:
        """Return the outputs in the case's structure."""
        outputs = self.case.outputs
        if outputs == "tensor":
            return logits
        if outputs == "tuple":
            return logits, hidden
        if outputs == "model-output":
            return Result(logits=logits, hidden=hidden)
        if outputs == "nested":
            return {"logits": logits, "states": (hidden,)}
        return {"logits": logits, "hidden": hidden}

    def ternary(self, min_rows: int) -> dict[str, bool]:
        """Return the names of the weights that become ternary, with True where each row has a scale of its own."""
        case = self.case
        found = {
            f"{path}.{name}": case.weights == "row"
            for path, part in self.named_modules()
            if isinstance(part, Attention)
            for name in part.ternary()
        }
        found |= {
            f"{path}.{name}.weight": case.weights == "row"
            for path, part in self.named_modules()
            if isinstance(part, FeedForward)
            for name, _ in part.named_children()
            if name != "dropout"
        }
        if case.ids == "none":
            found["enter.weight"] = case.weights == "row"
        elif min_rows <= VOCABULARY:
            found["tokens.weight"] = True
        if case.pooling == "dense":
            found["pooler.weight"] = case.weights == "row"
        return found


def both(first: Tensor | None, second: Tensor) -> Tensor:
    """Return where both count."""
    return second if first is None else first & second


def build(case: Case, spelled: bool = False) -> Transformer:
    """Return the module of a case; of the same weights in each call.

    Args:
        case: what it is made from.
        spelled: whether it is to be run with a trace.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = Transformer(case)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.dim() > 1 and "norm" not in name and "tokens" not in name:
                    value.copy_(torch.randn_like(value) / math.sqrt(value.shape[-1]))
                elif value.dim() == 1:
                    value.add_(0.1 * torch.randn_like(value))
    model.is_spelled = spelled
    return model.to(case.torch_dtype).eval()
