"""What a prepared graph must compute, stated in eager PyTorch: ternary weights, losses, detaches and gradients.

It shares no code with ti_fx: the numbers are those of ``reference``, the network is the case's own module with its
attention spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fuzz.attention import Trace
from fuzz.case import Case
from fuzz.modules import Transformer, build

MIN_ROWS = 32
NOISE = 1e-6  # some last bits of float32


class _Traced(nn.Module):
    """A transformer whose forward leaves a trace: ``functional_call`` calls forward alone."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, trace: Trace, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.run(**inputs, trace=trace)


def ternary_weights(model: Transformer, case: Case, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name, ternary where the case's options say so, with straight-through gradients."""
    rows = model.ternary(MIN_ROWS if case.tables else 1024)
    return {
        name: reference.ternary(value, rows[name]) if name in rows else value
        for name, value in leaves.items()
    }


def student_outputs(
    case: Case, model: Transformer, inputs: Mapping[str, Tensor], encoding: str, noise: int | None = None
) -> Any:
    """Return what the quantised student computes.

    Args:
        case: of the model.
        model: made with ``spelled``, in the mode wanted; it has the student's latent weights.
        inputs: of the model.
        encoding: of its activations.
        noise: a seed of a relative noise of ``NOISE`` on every value that is quantised; None: none.
    """
    with torch.no_grad():
        return functional_call(
            _Traced(model),
            _prefixed(model, ternary_weights(model, case, dict(model.named_parameters()))),
            (_trace(case, encoding, noise=noise), inputs),
            tie_weights=True,
        )


def _prefixed(model: Transformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in tensors.items()}


def _trace(
    case: Case, encoding: str, point: str = "none", teacher: Trace | None = None, noise: int | None = None
) -> Trace:
    generator = torch.Generator().manual_seed(noise or 0)

    def quantise(value: Tensor) -> Tensor:
        if noise is not None:
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value = value * (1 + NOISE * drawn)
        return reference.fake_quant(value, encoding)

    return Trace(
        point=point,
        teacher=teacher,
        quantise=quantise,
        operand=quantise if case.attention else lambda value: value,
    )


def losses_and_gradients(
    case: Case, student: Transformer, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None], Any]:
    """Return the losses by name, each parameter's gradient of their sum, and the student's outputs.

    Args:
        case: its options say what is ternary, quantised, intervened and compared.
        student: made with ``spelled``, in the mode wanted; the teacher is the same module in eval mode.
        inputs: of both.
    """
    target = Trace()
    teacher = build(case, spelled=True)
    with torch.no_grad():
        expected = teacher.run(**inputs, trace=target)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in student.named_parameters()}
    trace = _trace(case, case.encoding, case.at, target if case.at != "none" else None)
    outputs = functional_call(
        _Traced(student),
        _prefixed(student, ternary_weights(student, case, leaves)),
        (trace, inputs),
        tie_weights=True,
    )
    values = _losses(case, trace, target, first(outputs), first(expected))
    total = torch.stack(list(values.values())).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    detached = {name: value.detach() for name, value in values.items()}
    return detached, dict(zip(leaves, found, strict=True)), outputs


def first(outputs: Any) -> Tensor:
    """Return the logits of a case's outputs."""
    value = (
        outputs
        if isinstance(outputs, Tensor)
        else next(iter(outputs.values()))
        if isinstance(outputs, dict)
        else outputs[0]
    )
    assert isinstance(value, Tensor)
    return value


def _losses(case: Case, mine: Trace, theirs: Trace, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    if case.prompts and case.outputs in ("tensor", "tuple"):  # no layer's own, and not called logits
        values = {"embeddings": ((logits - target) ** 2).mean()}
    elif logits.shape[-1] == 1:
        values = {"logits": ((logits - target) ** 2).mean()}
    else:
        values = {"logits": -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()}
    if case.layer_outputs:
        values["layer_outputs"] = _squared(mine.stream, theirs.stream)
    values["scores"] = torch.stack(
        [reference.scores_error(*pair, None) for pair in zip(mine.scores, theirs.scores, strict=True)]
    ).sum()
    compared = "output" if case.variant == "paper" else "block"
    values["attention_outputs"] = _squared(getattr(mine, compared), getattr(theirs, compared))
    return values


def _squared(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    return torch.stack([((a - b) ** 2).mean() for a, b in zip(mine, theirs, strict=True)]).sum()
