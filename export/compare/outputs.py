"""An export compares ONNX Runtime's outputs with PyTorch's, at other sizes, padded, and with the batch permuted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import InputError, ParityError, first_line
from ti_fx.export import inputs as io
from ti_fx.export.file.content import FileContent
from ti_fx.export.report import OutputDifference
from ti_fx.export.run.session import Runtime, session_of
from ti_fx.ir.edit import aten_name, constant_size, mode
from ti_fx.ir.facts import facts
from ti_fx.numerics.closeness import gap, p99

# Float: two correct float32 implementations, sums in another order; relative to the largest value above 1.
FLOAT_TOLERANCE = 1e-4
# Quantised: a value beside a rounding boundary may fall on either side in two correct implementations; it then moves
# by one step of 1/255 of its range, and so do the values it feeds.
QUANTISED_TOLERANCE = 0.02
# ... and some networks amplify that (most of all untrained ones), so the same is measured within PyTorch alone, by
# nudging each product in its last bit. The cap keeps the check from being empty: a lost bias or scale exceeds it.
NOISE_FACTOR = 4.0
NOISE_CAP = 0.25
# Where that noise is a larger share of the range, as in deep untrained networks with activations of two bits, outputs
# say nothing of a file: its nodes are compared on the same inputs instead.
UNSTEADY = NOISE_CAP / NOISE_FACTOR
_PRODUCTS = frozenset({"linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "layer_norm", "softmax", "gelu"})


@dataclass(frozen=True)
class Failure:
    """Why outputs are not equal: what an error says, and the inputs that show it.

    ``cause`` is ONNX Runtime's own error where the file can't be run.
    """

    text: str
    inputs: dict[str, Tensor]
    cause: InputError | None = None


@dataclass(frozen=True)
class Outputs:
    """What the comparison of outputs found.

    Attributes:
        rows: one for each output and case, up to the first that differs.
        skipped: cases that the model does not take, and why.
        failure: of the first case that differs, None if none does.
        unsteady: inputs on which an output differs by no more than noise moves it, and on which nodes have to agree.
    """

    rows: tuple[OutputDifference, ...]
    skipped: tuple[str, ...]
    failure: Failure | None = None
    unsteady: tuple[dict[str, Tensor], ...] = ()


def compare_outputs(
    file: FileContent, student: GraphModule, bound: dict[str, Tensor], exact: bool
) -> Outputs:
    """Compare outputs at other sizes, padded, and with the batch permuted.

    Args:
        file: the file.
        student: the packed graph of the same encoding.
        bound: inputs of the graph, by name.
        exact: whether no activation is quantised, so that outputs differ by rounding only.

    Raises:
        ParityError: an output has another shape or type than the graph's.
    """
    path = str(file.path)
    runtime = Runtime(path, loaded=session_of(path, path))  # its data file was checked as it was opened
    rows: list[OutputDifference] = []
    skipped: list[str] = []
    unsteady: list[dict[str, Tensor]] = []
    cases = list(_cases(student, bound))
    for case, inputs, order in (*cases, ("the example", bound, None)):
        if case == "the example" and not skipped:
            continue
        try:
            expected = io.run_graph(student, inputs)
        except ValueError as error:  # as many image tokens as the images have patches
            if case == "the example":
                raise
            skipped.append(f"{case}: the model takes no such inputs ({first_line(error)})")
            continue
        noise = None if exact else _rounding_noise(student, inputs, expected)
        if order is not None:
            inputs = io.permuted(student, inputs, order)
            expected = _permuted_outputs(student, expected, order) or io.run_graph(student, inputs)
        try:
            found = runtime(inputs)
        except InputError as error:
            text = f"{file.path.name} can't be run at {case}: {error}"
            return Outputs(tuple(rows), tuple(skipped), Failure(text, inputs, error))
        for name, value in expected.items():
            allowed = _allowed(value, None if noise is None else noise[name])
            row = _difference(name, case, torch.from_numpy(found[name]), value, allowed)
            if noise is not None and row.p99 > row.allowed and _is_unsteady(row, noise[name]):
                skipped.append(
                    f"{case}: last-bit noise within PyTorch moves {name!r} by {noise[name]:.2g} of a range of "
                    f"{row.span:.2g}, so each node was compared there instead"
                )
                unsteady.append(inputs)
                continue
            rows.append(row)
            if (row.maximum if exact else row.p99) > row.allowed:  # a NaN in one alone is infinite
                text = (
                    f"{file.path.name}: output {row.output!r} differs from PyTorch at {row.case}: max "
                    f"{row.maximum:.2e}, p99 {row.p99:.2e}, range {row.span:.2e}, allowed {row.allowed:.2e}; "
                    "please report this with the graph's ti_fx.dump"
                )
                return Outputs(tuple(rows), tuple(skipped), Failure(text, inputs))
    return Outputs(tuple(rows), tuple(skipped), unsteady=tuple(unsteady))


def _is_unsteady(row: OutputDifference, noise: float) -> bool:
    """Whether noise within PyTorch alone moves an output by much of its range, and about as far as it differs."""
    return noise > UNSTEADY * row.span and row.p99 <= NOISE_FACTOR * noise


def _cases(
    gm: GraphModule, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor], Tensor | None]]:
    wanted = io.other_sizes(gm, inputs)
    for sizes in wanted:
        yield _case(sizes), io.padded(gm, io.resized(gm, inputs, sizes)), None
    # rows that are not one for each of the batch (codebooks of each) can't be put in order with it
    if all(names.get(0) == io.BATCH for names in io.dimensions(gm).values()):
        order = torch.arange(wanted[0][io.BATCH]).flip(0)
        yield f"{_case(wanted[0])}, permuted", io.padded(gm, io.resized(gm, inputs, wanted[0])), order


def _case(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the example"


def _permuted_outputs(
    gm: GraphModule, values: Mapping[str, Tensor], order: Tensor
) -> dict[str, Tensor] | None:
    """Return outputs with the batch in another order; None where rows are not one for each of it (its codebooks)."""
    symbols = {symbol for symbol, name in facts(gm).sizes.names.items() if name == io.BATCH}
    _, leaves = io.flat_outputs(gm)
    result = {}
    for name, value in values.items():
        # each text against each image has the batch twice
        for dim, size in enumerate(leaves[name].meta["val"].shape):
            if constant_size(size) is not None:
                continue
            if str(size) in symbols:
                value = value.index_select(dim, order)
            elif symbols & {str(symbol) for symbol in size.node.expr.free_symbols}:
                return None
        result[name] = value
    return result


class _Nudged(Interpreter):
    """Run a graph with each product moved by about one unit in the last place, as another summation order would."""

    def __init__(self, gm: GraphModule, seed: int) -> None:
        super().__init__(gm)
        self.random = torch.Generator().manual_seed(seed)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if aten_name(n) in _PRODUCTS and isinstance(value, Tensor) and value.numel():
            unit = torch.finfo(value.dtype).eps * value.abs().amax()
            value = value + unit * (2 * torch.rand(value.shape, generator=self.random, dtype=value.dtype) - 1)
        return value


def nudged_outputs(gm: GraphModule, inputs: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return the graph's outputs by name where each product is moved by about one unit in the last place."""
    flat, leaves = io.flat_outputs(gm)
    with mode(flat, False), torch.no_grad():
        nudged = _Nudged(flat, seed).run(*inputs.values())
    return dict(zip(leaves, nudged, strict=True))


def _rounding_noise(
    gm: GraphModule, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    found = {name: gap(value, expected[name]) for name, value in nudged_outputs(gm, inputs).items()}
    return {name: p99(value.masked_fill(value.isinf(), 0.0)) for name, value in found.items()}


def _allowed(expected: Tensor, noise: float | None) -> float:
    finite = _finite(expected)
    if not finite.numel():
        return 0.0
    if noise is None:
        return FLOAT_TOLERANCE * max(1.0, float(finite.abs().max()))
    span = _span(expected)
    return max(QUANTISED_TOLERANCE * span, min(NOISE_FACTOR * noise, NOISE_CAP * span))


def tolerance_text(exact: bool) -> str:
    """Return how far outputs may be apart, and why, for people."""
    if exact:
        return f"{FLOAT_TOLERANCE:g} of the largest value above 1, at most: float32 sums in another order"
    return (
        f"p99 within {QUANTISED_TOLERANCE:.0%} of the output's range, or {NOISE_FACTOR:g}x what last-bit noise does to "
        f"PyTorch itself (at most {NOISE_CAP:.0%}): a value beside a rounding boundary may fall on either side"
    )


def _finite(value: Tensor) -> Tensor:
    """Return the values that are numbers: a row that is all padding may be NaN, or masked scores an infinity."""
    return value[value.isfinite()].double()  # a mask that is an output has no absolute value


def _span(value: Tensor) -> float:
    finite = _finite(value)
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _difference(name: str, case: str, found: Tensor, expected: Tensor, allowed: float) -> OutputDifference:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ParityError(
            f"output {name!r} is {found.dtype}{list(found.shape)} in ONNX Runtime and "
            f"{expected.dtype}{list(expected.shape)} in PyTorch, at {case}"
        )
    difference = gap(found, expected)
    maximum = float(difference.max()) if difference.numel() else 0.0
    mean = float(difference.mean()) if difference.numel() else 0.0
    return OutputDifference(name, case, maximum, p99(difference), mean, _span(expected), allowed)
