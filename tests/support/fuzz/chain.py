"""A case goes through capture, training, packing and export, and is compared with itself after each.

What comes out is ``right``, ``refused`` (one line that ti_fx says on purpose), or a :class:`Wrong`.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

import ti_fx
from fuzz import statement
from fuzz.case import Case
from fuzz.inputs import inputs_of
from fuzz.modules import Transformer, build
from ti_fx import Pipeline
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)

SIZES = ((1, 5), (3, 11), (2, 16), (1, 1), (2, 60))
# Relative to the largest entry: eager against captured, and spelled out against fused or decomposed.
CLOSE = {"float32": 2e-5, "float64": 1e-9}
CLOSE_GRADIENT = {"float32": 3e-4, "float64": 1e-7}
# One activation that is rounded the other way moves one step.
CLOSE_QUANTISED = {"float32": 3e-2, "float64": 1e-6}
NOISES, NOISE_FACTOR, NOISE_CAP = (
    3,
    4.0,
    0.25,
)  # of files: seeds of noise, and how much of what it moves is allowed


class Wrong(AssertionError):
    """A difference that nobody was told of, or an error that is no :class:`TiFxError`."""


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        refused: what the chain said, None if it went through; at: the step that refused.
        sizes: how many inputs were compared, and what a graph or a file refused of those that the module takes.
    """

    refused: str | None = None
    at: str = ""
    compared: int = 0
    sizes: list[str] = field(default_factory=list)


def check(case: Case) -> Outcome:
    """Run a case.

    Raises:
        Wrong: a silent difference or a raw error.
    """
    outcome = Outcome()
    gm = GraphModule(nn.Module(), Graph())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, step in (("capture", _capture), ("prepare", _prepare), ("export", _export)):
            try:
                gm = step(case, outcome, gm)
            except TiFxError as error:
                if "\n" in str(error):
                    raise Wrong(f"{name}: refused in more than a line: {error}") from error
                outcome.refused, outcome.at = f"{type(error).__name__}: {error}", name
                return outcome
            except Wrong:
                raise
            except Exception as error:
                raise Wrong(f"{name}: raw {type(error).__name__}: {error}") from error
            if name == case.until:
                break
    return outcome


# --- capture --------------------------------------------------------------------------------------------------------


def _capture(case: Case, outcome: Outcome, _: GraphModule) -> GraphModule:
    """Capture, and compare graph and module at several sizes and values, in both modes, with gradients and buffers."""
    subject = build(case)
    before = _state(subject)
    gm = ti_fx.capture(subject, inputs_of(case, case.batch, case.length))
    _same_state("capture moved", before, _state(subject))
    source = build(case)
    for index, (batch, length) in enumerate(((case.batch, case.length), *SIZES)):
        for odd in (False, True):
            inputs = inputs_of(case, batch, length, index, odd=odd)
            where = f"graph at {batch}x{length}{' with odd values' if odd else ''}"
            _compare_calls(
                case, outcome, where, lambda given: source(**given), lambda given: gm(**given), inputs
            )
    for batch, length in ((case.batch, case.length), SIZES[1]):
        _compare_training(case, outcome, gm, batch, length)
    return gm


def _compare_calls(
    case: Case,
    outcome: Outcome,
    where: str,
    expected_of: Callable[[Mapping[str, Tensor]], Any],
    actual_of: Callable[[Mapping[str, Tensor]], Any],
    inputs: Mapping[str, Tensor],
    tolerance: float | Callable[[], float] | None = None,
) -> None:
    """Compare two functions in values and in what they raise; refusing is allowed, answering for an error is not."""
    with torch.no_grad():
        try:
            expected, raised = expected_of(inputs), None
        except Exception as error:
            expected, raised = None, error
        try:
            actual = actual_of(inputs)
        except TiFxError as error:
            outcome.sizes.append(f"{where}: {error}" if raised is None else "as the module")
            return
        except Exception as error:
            if raised is None and not str(error).startswith("ti_fx: "):  # what a graph itself checks
                raise Wrong(
                    f"{where}: raw {type(error).__name__} where the module answers: {error}"
                ) from error
            outcome.sizes.append(f"{where}: {error}" if raised is None else "as the module")
            return
    if raised is not None:
        raise Wrong(f"{where}: an answer where the module raises {type(raised).__name__}: {raised}")
    outcome.compared += 1
    if not callable(tolerance):
        _compare(where, expected, actual, CLOSE[case.dtype] if tolerance is None else tolerance)
        return
    try:
        _compare(where, expected, actual, CLOSE_QUANTISED[case.dtype])
    except Wrong:
        _compare(where, expected, actual, tolerance())


def _compare_training(case: Case, outcome: Outcome, gm: GraphModule, batch: int, length: int) -> None:
    """Compare two training calls and an evaluation: outputs, gradients, which parameters get any, and buffers."""
    where = f"training at {batch}x{length}"
    source, subject = build(case), copy.deepcopy(gm)
    _restore(subject, source)
    for index in range(2):
        inputs = inputs_of(case, batch, length, 50 + index)
        results = []
        for module in (source, subject):
            module.train()
            module.zero_grad()
            torch.manual_seed(5)
            try:
                outputs = module(**inputs)
            except TiFxError as error:
                outcome.sizes.append(f"{where}: {error}")
                return
            weights = torch.Generator().manual_seed(9)
            total = torch.zeros((), dtype=case.torch_dtype)
            for leaf in _tensors(outputs):
                total = total + (leaf * torch.randn(leaf.shape, generator=weights, dtype=torch.float64)).sum()
            total.backward()  # type: ignore[no-untyped-call]
            results.append(outputs)
        _compare(where, results[0], results[1], CLOSE[case.dtype])
        _compare_gradients(
            where,
            {name: value.grad for name, value in source.named_parameters()},
            {name: value.grad for name, value in subject.named_parameters()},
            CLOSE_GRADIENT[case.dtype],
        )
    _same_state(f"{where}: buffers after it", _state(source), _state(subject), CLOSE[case.dtype])
    inputs = inputs_of(case, batch, length, 60)
    with torch.no_grad():
        _compare(
            f"evaluation after {where}", source.eval()(**inputs), subject.eval()(**inputs), CLOSE[case.dtype]
        )


# --- prepare --------------------------------------------------------------------------------------------------------


def _prepare(case: Case, outcome: Outcome, captured: GraphModule) -> GraphModule:
    """Prepare, and compare losses, gradients and outputs with the statement; then strip, pack and compare again."""
    gm = captured
    Pipeline(DecomposeAttention(), DuplicateTeacher())(gm)
    Pipeline(
        Ternarize(
            weights=case.weights,  # type: ignore[arg-type]
            min_rows=statement.MIN_ROWS if case.tables else 1024,
        ),
        QuantizeActivations(case.encoding, case.attention),
        Distill(layer_outputs=float(case.layer_outputs), variant=case.variant),  # type: ignore[arg-type]
        Intervene(None if case.at == "none" else case.at),
    )(gm)
    subject = copy.deepcopy(gm)
    spelled = build(case, spelled=True)
    for module in (subject, spelled):
        module.train(case.dropout == 0)
    inputs = inputs_of(case, case.batch, case.length, 70)
    result = subject(**inputs)
    result["loss"].backward()
    losses, gradients, outputs = statement.losses_and_gradients(case, spelled, inputs)
    exact = case.encoding == "float"
    close = (CLOSE if exact else CLOSE_QUANTISED)[case.dtype]
    for name, value in losses.items():
        if name not in result["losses"]:
            raise Wrong(f"prepared: no loss {name}; there are {', '.join(result['losses'])}")
        _compare(f"prepared: loss {name}", value, result["losses"][name], 10 * close)
    if extra := set(result["losses"]) - set(losses):
        raise Wrong(f"prepared: losses {', '.join(sorted(extra))} that the statement lacks")
    _compare("prepared: outputs", _plain(outputs), _plain(result["outputs"]), close)
    if (
        exact or case.dtype == "float64"
    ):  # in float32 one value that is rounded the other way changes them all
        own = {
            name: value.grad for name, value in subject.named_parameters() if not name.startswith("teacher.")
        }
        _compare_gradients(
            "prepared", gradients, own, (CLOSE_GRADIENT if exact else CLOSE_QUANTISED)[case.dtype]
        )
    Pipeline(Intervene(None))(gm)
    Pipeline(Strip(), Pack())(gm)
    gm.eval()
    student = build(case, spelled=True)
    for index, (batch, length) in enumerate(((case.batch, case.length), *SIZES)):
        _compare_calls(
            case,
            outcome,
            f"packed graph at {batch}x{length}",
            lambda given: statement.student_outputs(case, student, given, case.encoding),
            lambda given: gm(**given),
            inputs_of(case, batch, length, 80 + index),
            close,
        )
    return gm


# --- export ---------------------------------------------------------------------------------------------------------


def _export(case: Case, outcome: Outcome, gm: GraphModule) -> GraphModule:
    """Export, and compare ONNX Runtime with the statement at other sizes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        to_onnx(gm, path, inputs_of(case, case.batch, case.length))
        runtime = Runtime(path, threads=1)
    student = build(case, spelled=True)

    def stated(given: Mapping[str, Tensor], noise: int | None = None) -> list[Tensor]:
        return _tensors(statement.student_outputs(case, student, given, case.encoding, noise))

    for index, (batch, length) in enumerate(((case.batch, case.length), *SIZES)):
        for odd in (False, True):
            _compare_calls(
                case,
                outcome,
                f"file at {batch}x{length}{' with odd values' if odd else ''}",
                stated,
                lambda given: list(runtime.tensors(given).values()),
                inputs := inputs_of(case, batch, length, 90 + index, odd=odd),
                10 * CLOSE["float32"] if case.encoding == "float" else partial(_tolerance, stated, inputs),
            )
    return gm


def _tolerance(stated: Callable[..., list[Tensor]], inputs: Mapping[str, Tensor]) -> float:
    """Return how far a quantised file may be from the statement: some times as far as noise moves the latter.

    A value beside a rounding boundary may fall on either side; in a small network it is much of the output.
    """
    right, close = stated(inputs), CLOSE_QUANTISED["float32"]
    for seed in range(NOISES):
        moved = max(map(_distance, right, stated(inputs, seed)), default=0.0)
        close = max(close, min(NOISE_FACTOR * moved, NOISE_CAP))
    return close


# --- comparisons ----------------------------------------------------------------------------------------------------


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(_plain(outputs)) if isinstance(leaf, Tensor)]


def _plain(outputs: Any) -> Any:
    """Return a structure of tuples and dicts: a graph's dict stands for a ModelOutput."""
    return dict(outputs.items()) if isinstance(outputs, Mapping) else outputs


def _compare(where: str, expected: Any, actual: Any, tolerance: float) -> None:
    left, right = _tensors(expected), _tensors(actual)
    if len(left) != len(right):
        raise Wrong(f"{where}: {len(right)} tensors where there are {len(left)}")
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise Wrong(
                f"{where}: output {index} is {other.dtype} {tuple(other.shape)} where it is {one.dtype} "
                f"{tuple(one.shape)}"
            )
        if not (found := _distance(one, other)) <= tolerance:
            raise Wrong(f"{where}: output {index} is off by {found:.1e} (allowed {tolerance:.0e})")


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest entry; entries that are equal (NaN, inf) count as 0."""
    one, other = one.detach().double(), other.detach().double()
    alike = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(alike, 0, (one - other).abs())
    if not gap.numel():
        return 0.0
    return float(gap.max() / one[one.isfinite()].abs().max().clamp(min=1e-9)) if bool(gap.any()) else 0.0


def _compare_gradients(
    where: str, expected: Mapping[str, Tensor | None], actual: Mapping[str, Tensor | None], tolerance: float
) -> None:
    if missing := expected.keys() ^ actual.keys():
        raise Wrong(f"{where}: parameters {', '.join(sorted(missing))} are not in both")
    largest = max((float(value.abs().max()) for value in expected.values() if value is not None), default=0.0)
    for name, value in expected.items():
        other = actual[name]
        if value is None or other is None:
            some = other if value is None else value
            if some is not None and float(some.abs().max()) > tolerance * largest:
                raise Wrong(f"{where}: {name} {'gets' if value is None else 'misses'} a gradient")
            continue
        if value.isnan().any() and torch.equal(value.isnan(), other.isnan()):
            continue
        scale = max(float(value.abs().max()), 1e-3 * largest)
        gap = float((value - other).abs().max())
        if not gap <= tolerance * scale:
            raise Wrong(
                f"{where}: the gradient of {name} is off by {gap / scale:.1e} (allowed {tolerance:.0e})"
            )


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def _same_state(
    where: str, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], tolerance: float = 0.0
) -> None:
    for name in expected.keys() & actual.keys():
        if not _distance(expected[name], actual[name]) <= tolerance:
            raise Wrong(
                f"{where}: {name} is {actual[name].flatten()[:3].tolist()}, not {expected[name].flatten()[:3].tolist()}"
            )


def _restore(gm: GraphModule, source: Transformer) -> None:
    """Give a graph the source's values again."""
    wanted = dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.no_grad():
        for name, value in [*gm.named_parameters(), *gm.named_buffers()]:
            if name in wanted:  # not a constant that the trace has made
                value.copy_(wanted[name])
