"""``loss_surface`` measures a loss around the weights, along two random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.analysis.hessian import trained_loss
from ti_fx.errors import InputError
from ti_fx.ir.edit import mode


@dataclass(frozen=True)
class LossSurface:
    """A loss at ``weights + x · first + y · second``.

    Attributes:
        offsets: the values of x and of y, ascending; 0 is the weights as they are.
        losses: ``losses[i][j]`` at ``x = offsets[i]``, ``y = offsets[j]``.
    """

    offsets: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


def loss_surface(
    gm: GraphModule,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    steps: int = 11,
    span: float = 1.0,
    seed: int = 0,
) -> LossSurface:
    """Measure the mean loss over batches at a grid of weights, in eval mode; the weights are left as they were.

    Each direction has, for every row of a weight (every filter), that row's own length, so that models of other scales
    can be compared; vectors stay as they are. Source: Li et al., "Visualizing the Loss Landscape of Neural Nets",
    arXiv 1712.09913, section 4; in Kim et al., arXiv 2302.11812, Fig. 2a.

    Args:
        gm: a prepared graph; any graph with ``loss``.
        batches: inputs by name.
        loss: gives the scalar from what the graph returns; None: ``result["loss"]``.
        steps: points along each direction, odd, so that one is the weights themselves.
        span: how far a direction goes, in its own lengths, to both sides.
        seed: of the directions.

    Raises:
        InputError: ``steps`` is even, or there is no batch.
    """
    if steps < 1 or steps % 2 == 0:
        raise InputError(
            f"steps is {steps}; give an odd number, so that the weights themselves are one point"
        )
    given = [dict(batch) for batch in batches]
    if not given:
        raise InputError("there is no batch to measure the loss on")
    measure = loss or trained_loss
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in gm.parameters() if parameter.requires_grad]
    first, second = ([_direction(parameter, generator) for parameter in parameters] for _ in range(2))
    offsets = torch.linspace(-span, span, steps, dtype=torch.float64).tolist()
    offsets[steps // 2] = 0.0
    rows = []
    with torch.no_grad(), mode(gm, training=False), _restored(parameters) as originals:
        for x in offsets:
            row = []
            for y in offsets:
                for parameter, original, one, two in zip(parameters, originals, first, second, strict=True):
                    parameter.copy_(original + x * one + y * two)
                values = [float(measure(gm(**batch))) for batch in given]
                row.append(sum(values) / len(values))
            rows.append(tuple(row))
    return LossSurface(tuple(offsets), tuple(rows))


def _direction(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction, each row as long as the parameter's; zeros for vectors (biases and norms)."""
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
    lengths, own = (value.detach().flatten(1).norm(dim=1) for value in (drawn, parameter))
    scale = own / lengths.clamp(min=torch.finfo(parameter.dtype).tiny)
    found: Tensor = drawn * scale.view(-1, *(1,) * (parameter.dim() - 1))
    return found


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
