"""The Hessian of a student's loss by products with vectors: its largest eigenvalues, and how all are spread.

Quantisers count as their surrogate gradients say, so this is the Hessian of the loss in the weights that are
multiplied, at the quantised ones. Source of the measure: Kim et al., arXiv 2302.11812, Fig. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.ir.edit import mode

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """How a Hessian's eigenvalues are spread, by stochastic Lanczos quadrature.

    Attributes:
        eigenvalues: of the quadrature, ascending. weights: the share of all eigenvalues that each stands for; they add
            up to 1.
        parameters: how many there are: the Hessian's size.
    """

    eigenvalues: tuple[float, ...]
    weights: tuple[float, ...]
    parameters: int

    @property
    def trace(self) -> float:
        """An estimate of the sum of all eigenvalues."""
        pairs = zip(self.eigenvalues, self.weights, strict=True)
        return self.parameters * sum(value * weight for value, weight in pairs)


def trained_loss(result: Any) -> Tensor:
    """Return the loss that a prepared graph returned."""
    loss: Tensor = result["loss"]
    return loss


class HessianProducts:
    """Multiplies vectors by the Hessian of a graph's loss on one batch, in eval mode.

    Args:
        gm: a prepared graph; any graph with ``loss``.
        batch: its inputs by name.
        loss: gives the scalar from what the graph returns; None: ``result["loss"]``.
        parameters: names of the Parameters; None: all that are trained.

    Raises:
        InputError: nothing that is trained is asked for, or the loss does not depend on it.
    """

    def __init__(
        self,
        gm: GraphModule,
        batch: Mapping[str, Tensor],
        *,
        loss: Loss | None = None,
        parameters: Sequence[str] | None = None,
    ) -> None:
        self.gm, self.batch, self.loss = gm, dict(batch), loss or trained_loss
        self.parameters = _chosen(gm, parameters)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        with mode(gm, training=False), torch.enable_grad():
            value = self.loss(gm(**self.batch))
            found = torch.autograd.grad(value, self.parameters, create_graph=True, allow_unused=True)
        self.gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]
        if not any(gradient.requires_grad for gradient in self.gradients):
            raise InputError(
                "the loss is linear in what is asked for, or does not depend on it; choose others"
            )

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the Hessian times ``vector``, both flat, ``(size,)``."""
        parts = _split(vector, self.parameters)
        along = [
            (one * part).sum() for one, part in zip(self.gradients, parts, strict=True) if one.requires_grad
        ]
        found = torch.autograd.grad(sum(along), self.parameters, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        flat = [
            (torch.zeros_like(parameter) if one is None else one).reshape(-1)
            for parameter, one in zip(self.parameters, found, strict=True)
        ]
        return torch.cat(flat)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Return a random vector of signs, of length 1."""
        signs = torch.randint(0, 2, (self.size,), generator=generator).to(self.parameters[0]) * 2 - 1
        length: float = self.size**0.5
        return signs / length


def top_eigenvalues(
    products: HessianProducts, count: int = 1, *, steps: int = 40, seed: int = 0
) -> list[float]:
    """Return the eigenvalues of largest magnitude, the largest first, by Lanczos' method.

    Args:
        products: of the Hessian.
        count: how many.
        steps: of the method, each a product; more than ``count``, and more for eigenvalues that lie close together.
        seed: of the first vector.

    Raises:
        InputError: there are not as many.
    """
    if not 1 <= count <= min(steps, products.size):
        raise InputError(f"count is {count}; give 1 to {min(steps, products.size)}")
    tridiagonal = _lanczos(products, products.drawn(torch.Generator().manual_seed(seed)), steps)
    values: list[float] = torch.linalg.eigvalsh(tridiagonal).tolist()
    return sorted(values, key=abs, reverse=True)[:count]


def spectrum(products: HessianProducts, *, steps: int = 40, draws: int = 4, seed: int = 0) -> Spectrum:
    """Return how the eigenvalues are spread.

    Source: Ghorbani et al., arXiv 1901.10159, section 2.

    Args:
        products: of the Hessian.
        steps: products for each vector.
        draws: how many random vectors.
        seed: of these.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[float, float]] = []
    for _ in range(draws):
        values, vectors = torch.linalg.eigh(_lanczos(products, products.drawn(generator), steps))
        found += zip(values.tolist(), (vectors[0].square() / draws).tolist(), strict=True)
    values_, weights = zip(*sorted(found), strict=True)
    return Spectrum(values_, weights, products.size)


def eigenvalues_by_example(
    gm: GraphModule, batch: Mapping[str, Tensor], *, steps: int = 20, seed: int = 0, **options: Any
) -> list[float]:
    """Return the largest eigenvalue of the loss of each row of a batch, as the paper pools them into a histogram."""
    return [
        top_eigenvalues(HessianProducts(gm, row, **options), steps=steps, seed=seed)[0]
        for row in _rows(batch)
    ]


def _rows(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for index in range(len(next(iter(batch.values())))):
        yield {name: value[index : index + 1] for name, value in batch.items()}


def _lanczos(products: HessianProducts, start: Tensor, steps: int) -> Tensor:
    """Return the tridiagonal matrix, float64, of at most ``steps`` rows; every vector is made orthogonal to all."""
    vectors = [start.double() / start.double().norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(steps, products.size)):
        found = products(vectors[-1].to(start)).double()
        diagonal.append(found @ vectors[-1])
        basis = torch.stack(vectors)
        for _again in range(2):
            found = found - basis.T @ (basis @ found)
        length = found.norm()
        if length < 1e-10 * max(1.0, float(torch.stack(diagonal).abs().max())):
            break  # an invariant subspace: its eigenvalues are found
        beside.append(length)
        vectors.append(found / length)
    size = len(diagonal)
    off = torch.stack(beside[: size - 1]) if size > 1 else torch.zeros(0, dtype=torch.float64)
    return torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)


def _chosen(gm: GraphModule, names: Sequence[str] | None) -> list[nn.Parameter]:
    known = dict(gm.named_parameters())
    if names is not None and (unknown := [name for name in names if name not in known]):
        raise InputError(f"the graph has no parameter {unknown[0]!r}; see named_parameters()")
    chosen = known if names is None else {name: known[name] for name in names}
    trained = [parameter for parameter in chosen.values() if parameter.requires_grad]
    if not trained:
        raise InputError("none of these Parameters is trained")
    return trained


def _split(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
