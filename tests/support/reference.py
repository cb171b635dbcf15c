"""An independent statement of Teacher Intervention on BERT, in eager PyTorch, written from the formulas.

It shares no code with ti_fx: its own ternary weights, fake-quantisers, losses and detaches, on a BERT for sequence
classification spelled out op by op, that reads the tensors of a transformers ``BertForSequenceClassification``.

Formulas: TernaryBERT (Zhang et al., EMNLP 2020), section 3, for weights and losses; Teacher Intervention (Kim et al.,
EACL 2023), section 3, for what the student reads and what is detached; ONNX DynamicQuantizeLinear-11 for int8-tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 2.5


@dataclass(frozen=True)
class Settings:
    """What is quantised, where the teacher intervenes, what is compared.

    Attributes:
        layers, heads, eps: BERT's shape.
        padding: the token whose embedding gets no gradient.
        encoding: ``int8-tensor``, ``int8-token``, ``reference`` or ``float``.
        attention: whether Q, K, map and V are quantised as well.
        point: ``none``, ``output``, ``context``, ``map``, ``ffn`` or ``layer``.
        share: how much of the teacher's value is read there, and of the gradient detached; 1 is all.
        variant: ``reference`` (attention block after the norm) or ``paper`` (the output projection's result).
        mask_padding: whether padding tokens are left out of the means.
        dropout: probability of every dropout of the student; 0 draws nothing.
    """

    layers: int
    heads: int
    eps: float = 1e-12
    padding: int = 0
    encoding: str = "int8-tensor"
    attention: bool = False
    point: str = "none"
    share: float = 1.0
    variant: str = "reference"
    mask_padding: bool = False
    dropout: float = 0.0


@dataclass
class Trace:
    """What one forward pass leaves for the losses, and the values at the three points, per layer."""

    layer_outputs: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    map: list[Tensor] = field(default_factory=list)
    context: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    ffn: list[Tensor] = field(default_factory=list)
    block: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """Return exactly ``value``; the gradient goes to ``source`` (the difference added is exactly zero)."""
    return value.detach() + (source - source.detach())


def ternary(weight: Tensor, rows: bool = False) -> Tensor:
    """Return alpha · sign(w) where |w| > 0.7 · mean|w|, else 0, for a matrix w; the gradient passes within ±2.5."""
    clipped = torch.minimum(torch.maximum(weight.detach(), torch.tensor(-CLIP)), torch.tensor(CLIP))
    clipped = clipped.to(torch.promote_types(weight.dtype, torch.float32))
    groups = clipped if rows else clipped.reshape(1, -1)
    threshold = 0.7 * groups.abs().mean(dim=1, keepdim=True)
    kept = groups.abs() > threshold
    alpha = torch.where(kept, groups.abs(), 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    value = torch.where(kept, torch.sign(groups) * alpha, 0).reshape(weight.shape).to(weight.dtype)
    return straight_through(value, torch.where(weight.abs() < CLIP, weight, 0))


def fake_quant(value: Tensor, encoding: str) -> Tensor:
    """Return ``value`` as the encoding's integers represent it; the gradient passes unchanged."""
    if encoding == "float":
        return value
    x = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if encoding == "int8-tensor":
        smallest = torch.minimum(x.min(), torch.zeros((), dtype=x.dtype))
        largest = torch.maximum(x.max(), torch.zeros((), dtype=x.dtype))
        scale = (largest - smallest) / 255
        scale = torch.where(scale == 0, 1, scale)
        zero_point = torch.round(torch.clip(-smallest / scale, 0, 255))
        codes = torch.clip(torch.round(x / scale) + zero_point, 0, 255)
        return straight_through(((codes - zero_point) * scale).to(value.dtype), value)
    largest = x.abs().max() if encoding == "reference" else x.abs().max(dim=-1, keepdim=True).values
    scale = torch.where(largest == 0, 1, largest / 127)
    codes = torch.clip(torch.round(x / scale), -127, 127)
    return straight_through((codes * scale).to(value.dtype), value)


class Network:
    """BERT for sequence classification over a dict of tensors: the student if quantised, else the teacher."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Settings, quantised: bool) -> None:
        self.tensors = tensors
        self.settings = settings
        self.quantised = quantised

    def projection(self, value: Tensor, name: str, detached: bool = False) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        if self.quantised:
            value, weight = fake_quant(value, self.settings.encoding), ternary(weight)
        share = self.settings.share if detached else 0.0
        if share == 1:
            value = value.detach()
        elif share:
            value = value + share * (value.detach() - value)  # the same numbers; of the gradient 1 - share
        return F.linear(value, weight, bias)

    def read(self, point: str, mine: Tensor, teacher: Trace | None, index: int) -> Tensor:
        """Return what is read at a point: the student's own value, the teacher's, or a mean of both by the share."""
        if teacher is None or point != self.settings.point:
            return mine
        theirs: Tensor = getattr(teacher, "layer_outputs" if point == "layer" else point)[index]
        share = self.settings.share
        return theirs if share == 1 else share * theirs + (1 - share) * mine

    def norm(self, value: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(value, weight.shape, weight, bias, self.settings.eps)

    def dropout(self, value: Tensor) -> Tensor:
        return F.dropout(value, self.settings.dropout, training=self.quantised)

    def attention_operand(self, value: Tensor) -> Tensor:
        quantised = self.quantised and self.settings.attention
        return fake_quant(value, self.settings.encoding) if quantised else value

    def split(self, value: Tensor) -> Tensor:
        batch, tokens, width = value.shape
        return value.view(batch, tokens, self.settings.heads, width // self.settings.heads).transpose(1, 2)

    def embeddings(self, input_ids: Tensor) -> Tensor:
        words = self.tensors["bert.embeddings.word_embeddings.weight"]
        if self.quantised:
            words = ternary(words, rows=True)
        kinds = self.tensors["bert.embeddings.token_type_embeddings.weight"]
        places = self.tensors["bert.embeddings.position_embeddings.weight"][: input_ids.shape[1]]
        total = F.embedding(input_ids, words, self.settings.padding) + F.embedding(
            torch.zeros_like(input_ids), kinds
        )
        return self.norm(total + places, "bert.embeddings.LayerNorm")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, teacher: Trace | None = None) -> Trace:
        """Run; with a teacher's trace, the student reads the teacher's value at the settings' point."""
        point = self.settings.point if teacher is not None else "none"
        trace = Trace()
        hidden = self.embeddings(input_ids)
        trace.layer_outputs.append(hidden)  # before the embeddings' dropout, as the teacher's is
        hidden = self.dropout(self.read("layer", hidden, teacher, 0))
        lowest = torch.finfo(hidden.dtype).min
        bias = torch.zeros(attention_mask.shape, dtype=hidden.dtype).masked_fill(attention_mask == 0, lowest)
        for layer in range(self.settings.layers):
            hidden = self.layer(f"bert.encoder.layer.{layer}", layer, hidden, bias, trace, teacher, point)
            trace.layer_outputs.append(hidden)
            if layer + 1 < self.settings.layers:
                hidden = self.read("layer", hidden, teacher, layer + 1)
        pooled = torch.tanh(self.projection(hidden[:, 0], "bert.pooler.dense"))
        weight, offset = self.tensors["classifier.weight"], self.tensors["classifier.bias"]
        trace.logits = F.linear(self.dropout(pooled), weight, offset)
        return trace

    def layer(
        self,
        name: str,
        index: int,
        hidden: Tensor,
        bias: Tensor,
        trace: Trace,
        teacher: Trace | None,
        point: str,
    ) -> Tensor:
        attention = f"{name}.attention"
        above_map = point in ("context", "output")
        in_attention = above_map or point == "map"
        query = self.split(self.projection(hidden, f"{attention}.self.query", in_attention))
        key = self.split(self.projection(hidden, f"{attention}.self.key", in_attention))
        value = self.split(self.projection(hidden, f"{attention}.self.value", above_map))
        products = torch.matmul(self.attention_operand(query), self.attention_operand(key).transpose(2, 3))
        scores = products * (1 / math.sqrt(query.shape[-1])) + bias[:, None, None, :]
        trace.scores.append(scores)
        probabilities = scores.softmax(-1)
        trace.map.append(probabilities)
        probabilities = self.read("map", probabilities, teacher, index)
        probabilities = self.attention_operand(self.dropout(probabilities))
        context = torch.matmul(probabilities, self.attention_operand(value))
        trace.context.append(context)
        context = self.read("context", context, teacher, index)
        merged = context.transpose(1, 2).reshape(hidden.shape)
        output = self.projection(merged, f"{attention}.output.dense")
        trace.output.append(output)
        output = self.read("output", output, teacher, index)
        block = self.norm(self.dropout(output) + hidden, f"{attention}.output.LayerNorm")
        trace.block.append(block)
        wide = F.gelu(self.projection(block, f"{name}.intermediate.dense"))
        narrow = self.projection(wide, f"{name}.output.dense")
        trace.ffn.append(narrow)
        narrow = self.dropout(self.read("ffn", narrow, teacher, index))
        return self.norm(narrow + block, f"{name}.output.LayerNorm")


def masked_mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over tokens, those with mask 0 left out."""
    return per_token.mean() if mask is None else per_token[mask.bool()].mean()


def squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared error of ``(batch, tokens, features)``."""
    return masked_mean(((student - teacher) ** 2).mean(-1), mask)


def scores_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared error of ``(batch, heads, queries, keys)``, values at or below -100 as zero."""
    student = torch.where(student > -100, student, 0)
    teacher = torch.where(teacher > -100, teacher, 0)
    return masked_mean(((student - teacher) ** 2).mean(-1).mean(1), mask)


def losses(student: Trace, teacher: Trace, settings: Settings, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return the four distillation losses; the training loss is their sum."""
    mask = attention_mask if settings.mask_padding else None
    log_probability = student.logits - student.logits.logsumexp(-1, keepdim=True)
    target = torch.exp(teacher.logits - teacher.logits.logsumexp(-1, keepdim=True))
    compared = "block" if settings.variant == "reference" else "output"
    pairs = zip(getattr(student, compared), getattr(teacher, compared), strict=True)
    return {
        "logits": -(target * log_probability).sum(-1).mean(),
        "layer_outputs": torch.stack(
            [
                squared_error(mine, theirs, mask)
                for mine, theirs in zip(student.layer_outputs, teacher.layer_outputs, strict=True)
            ]
        ).sum(),
        "scores": torch.stack(
            [
                scores_error(mine, theirs, mask)
                for mine, theirs in zip(student.scores, teacher.scores, strict=True)
            ]
        ).sum(),
        "attention_outputs": torch.stack([squared_error(mine, theirs, mask) for mine, theirs in pairs]).sum(),
    }


def gradients(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    settings: Settings,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return the losses by name, and each parameter's gradient of their sum (None where nothing reaches it)."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in student.items()}
    with torch.no_grad():
        target = Network(teacher, settings, quantised=False)(input_ids, attention_mask)
    trace = Network(leaves, settings, quantised=True)(input_ids, attention_mask, target)
    values = losses(trace, target, settings, attention_mask)
    total = torch.stack(list(values.values())).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: value.detach() for name, value in values.items()}, dict(zip(leaves, found, strict=True))
