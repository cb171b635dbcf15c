"""Moments add up what a linear product takes and what it should give, so that any weight's error is known from sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class InputMoments:
    """Sums over the rows of what products read: count, first and second moment, in float64.

    Attributes:
        count: rows seen.
        first: sum of the rows, ``(inputs,)``.
        second: sum of their outer products, ``(inputs, inputs)``.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.count = 0
        self.first = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.second = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)

    def __add__(self, other: InputMoments) -> InputMoments:
        """Return the sums over the rows of both."""
        both = InputMoments(0, self.first.device)
        both.count = self.count + other.count
        both.first, both.second = self.first + other.first, self.second + other.second
        return both

    def add(self, rows: Tensor) -> None:
        """Add rows, ``(rows, inputs)``."""
        self.count += len(rows)
        self.first += rows.sum(0, dtype=torch.float64)
        self.second += rows.T @ rows


class OutputMoments:
    """Sums over the rows of what one product should give, beside those of what it reads.

    Attributes:
        first: sum of the wanted rows, ``(outputs,)``.
        cross: sum of the outer products of read and wanted rows, ``(inputs, outputs)``.
        square: sum of the squares of all wanted entries.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.first = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.square = 0.0

    def __add__(self, other: OutputMoments) -> OutputMoments:
        """Return the sums over the rows of both."""
        both = OutputMoments(0, 0, self.first.device)
        both.first, both.cross = self.first + other.first, self.cross + other.cross
        both.square = self.square + other.square
        return both

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Add rows, ``(rows, inputs)``, and what they should give, ``(rows, outputs)``."""
        self.first += wanted.sum(0, dtype=torch.float64)
        self.cross += rows.T @ wanted
        self.square += float(wanted.double().square().sum())


@dataclass(frozen=True)
class Moments:
    """Of one weight's products: what they read, and what they should give.

    Attributes:
        read: of their inputs.
        given: of the wanted outputs.
    """

    read: InputMoments
    given: OutputMoments

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over the rows of both."""
        return Moments(self.read + other.read, self.given + other.given)


def fitted_bias(sums: Moments, weight: Tensor) -> Tensor:
    """Return the bias that leaves no mean error beside a weight, ``(outputs,)``, float64."""
    return (sums.given.first - weight.double() @ sums.read.first) / max(sums.read.count, 1)


def relative_error(sums: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """Return the squared error of ``X weight' + bias`` beside the variance of what is wanted.

    Args:
        sums: of X and of what is wanted.
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``, or None.
    """
    read, given, wide = sums.read, sums.given, weight.double()
    total = (
        given.square + float(((wide @ read.second) * wide).sum()) - 2 * float((wide.T * given.cross).sum())
    )
    if bias is not None:
        shift = bias.double()
        total += float((shift * (2 * (wide @ read.first) - 2 * given.first + read.count * shift)).sum())
    spread = given.square - float(given.first.square().sum()) / max(read.count, 1)
    return max(total, 0.0) / max(spread, 1e-30)


def centred(sums: Moments) -> tuple[Tensor, Tensor]:
    """Return second and cross moment about the means, a row's share, for a weight beside a bias that is free."""
    read, given, count = sums.read, sums.given, max(sums.read.count, 1)
    mean = read.first / count
    second, cross = read.second - torch.outer(mean, read.first), given.cross - torch.outer(mean, given.first)
    return second / count, cross / count


def without_bias(sums: Moments, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return second and cross moment, a row's share, for a weight beside a bias that stays as it is."""
    read, cross, count = sums.read, sums.given.cross, max(sums.read.count, 1)
    if bias is not None:
        cross = cross - torch.outer(read.first, bias.double())
    return read.second / count, cross / count
