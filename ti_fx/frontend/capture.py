"""Captures an nn.Module as a plain, trainable fx.GraphModule, from example inputs.

torch.export gives training-level ATen (``ti_fx.frontend.trace``); ``ti_fx.passes.normalise`` rewrites what stands in
the way of editing and training it, and the result is compared with the source model in both modes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, get_args

from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import (
    CaptureError,
    InputError,
    RandomnessError,
    SizeError,
    TiFxError,
    VerificationError,
    VersionError,
    WriteError,
    first_line,
)
from ti_fx.frontend.assumptions import size_assumptions
from ti_fx.frontend.bind_example import CACHES, bind_example, rows_for_trace
from ti_fx.frontend.compare import Compared, compare_shapes, compare_values, draws_alike, evaluation_writes
from ti_fx.frontend.drop_fields import random_fields
from ti_fx.frontend.dynamic_sizes import Dynamic, has_open_sizes, named_sizes
from ti_fx.frontend.exported_graph import exported_graph
from ti_fx.frontend.model_for_trace import runs, unchanged_attributes
from ti_fx.frontend.patches import one_at_a_time, traceable
from ti_fx.frontend.size_questions import Questions
from ti_fx.frontend.source_lines import short
from ti_fx.frontend.trace import (
    FollowedDecisions,
    TraceResult,
    is_about_values,
    trace_following_decisions,
    trace_without_decisions,
)
from ti_fx.frontend.wrappers import plain_model, unwrapped
from ti_fx.ir.checks import MARK, REFUSES, check_message
from ti_fx.ir.edit import mode
from ti_fx.ir.facts import CaptureReport, facts, record_facts, record_sizes
from ti_fx.ir.inputs import validate_compiled, validate_inputs
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.shapes import guard_count
from ti_fx.passes.normalise import NORMALISE
from ti_fx.passes.normalise.drop_dead import DropDead
from ti_fx.passes.normalise.name_sizes import NameSizes

_WIDTH: tuple[Dynamic, ...] = ("none", "batch", "auto", "all")  # from no dynamic size to all


class _Captured(NamedTuple):
    """A graph, and what its report says."""

    gm: GraphModule
    static: dict[str, str]
    compared: Compared
    followed: tuple[str, ...]
    open_sizes: bool
    questions: Questions


def capture_report(gm: GraphModule) -> CaptureReport:
    """Return the report of the capture that made ``gm``: dynamic dimensions, and why any is not."""
    report = facts(gm).capture
    if report is None:
        raise InputError("this graph has no capture report; make it with ti_fx.capture(model, example)")
    return report


@one_at_a_time()
def capture(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...], *, dynamic: Dynamic = "auto"
) -> GraphModule:
    """Capture a model as a plain fx.GraphModule that takes and returns what the model does.

    The graph shares the model's Parameters and buffers. ``train()`` and ``eval()`` work as on any module. A Hugging
    Face model is switched to eager attention for the trace and restored, and its mode is left as it was.

    Captures in several threads run one after another, whatever their models. While one runs, the whole process sees
    internals of torch and transformers replaced (``ti_fx.frontend.patches``), Python's, NumPy's and torch's random
    numbers fixed and the model's own mode and configuration switched; all are put back when it ends. So another thread
    must not run models or draw random numbers meanwhile: it gets plain kernels, the same numbers again, or an error.

    Args:
        model: any nn.Module that torch.export can trace, on any device, in any dtype, in either mode. One that
            ``torch.compile``, DDP or accelerate wraps is captured as it is without them. On the meta
            device (``with torch.device("meta")``) a model of any size is captured, and every pass but Pack runs on it.
        example: keyword inputs (a dict or BatchEncoding), or a tuple of positional ones. Tensors become inputs;
            other values (flags, None) are baked in. For a model on the meta device they may be on any device. Inputs of
            as many rows share one batch; where the numbers differ (one image, two texts), each has a batch of its own.
        dynamic: ``auto`` makes every dimension dynamic that the model allows, of images and videos (four dimensions or
            more) the batch alone; ``all`` tries those, too; ``batch`` only dimension 0, ``none`` nothing. See
            :func:`capture_report`.

    Raises:
        InputError: the example does not fit the model's signature.
        CaptureError: the model can't be traced, or the graph does not equal the model in eval or train mode on the
            example (randomness decided in Python is baked by the trace); names the source line where it is known.
        VersionError: the installed torch or transformers lacks an internal that a trace replaces.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"capture needs an nn.Module, got {type(model).__name__}")
    if dynamic not in get_args(Dynamic):
        raise InputError(f"dynamic is {dynamic!r}; use {', '.join(map(repr, get_args(Dynamic)))}")
    model = plain_model(model)
    with unwrapped(model):
        return _capture(model, example, dynamic)


def _capture(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...], dynamic: Dynamic) -> GraphModule:
    tensors, constants = bind_example(model, example)
    with unchanged_attributes(model), traceable(model) as attention:
        found = _right_everywhere(model, tensors, constants, dynamic)
    gm, static = found.gm, found.static
    dims = named_sizes(gm, list(tensors))[0]
    for name, sizes in dims.items():
        for index, size in enumerate(sizes):
            if isinstance(size, int):
                static.setdefault(f"{name}.{index}", _why_fixed(found.questions, name, index, size, dynamic))
    report = CaptureReport(
        dims=dims,
        static=static,
        constants={name: value for name, value in constants.items() if name not in CACHES},
        attention=attention,
        nodes=len(gm.graph.nodes),
        parameters=sum(parameter.numel() for parameter in gm.parameters()),
        checked=found.compared.checked,
        unchecked=found.compared.unchecked,
        further=found.compared.further,
        left_out=tuple(found.compared.left_out),
        followed=found.followed,
        assumptions=facts(gm).sizes.assumptions,
    )
    record_facts(gm, capture=report, example=tensors, dynamic=dynamic, passes=())
    gm.train(model.training)
    return gm


def _right_everywhere(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic
) -> _Captured:
    """Capture with fewer dynamic sizes where the graph differs from the model at other sizes than the example's."""
    reason = ""
    for attempt in (dynamic, "batch", "none"):
        if reason and _WIDTH.index(attempt) >= _WIDTH.index(dynamic):
            continue
        try:
            found = _captured(model, tensors, constants, attempt)
        except SizeError as error:
            if attempt == "none":
                raise
            reason = reason or first_line(error).partition(": ")[0]
            continue
        if reason:
            for name, value in tensors.items():
                for index in range(int(attempt == "batch"), value.dim()):
                    found.static[f"{name}.{index}"] = f"with more of it dynamic, {reason}"
        return found
    raise AssertionError("a graph of fixed sizes has no others")


def _captured(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic
) -> _Captured:
    """Trace in training mode; where that fails in eval mode; where Python reads values, following the example's.

    Control flow that only training has (a clamp of overflows) is left out by a trace in eval mode; dropout is not.
    Whether that is the model in training, too, is compared like everything else, unless the model does not run in
    training with these inputs (it wants labels), which the report says.
    """
    errors: list[TiFxError] = []
    spare: _Captured | None = None
    for trace in (trace_without_decisions, trace_following_decisions):
        for training in (True, False):
            try:
                found = _traced(model, tensors, constants, dynamic, training, trace)
            except (SizeError, VersionError, WriteError):
                raise
            except RandomnessError as error:
                _raise_with_fields(model, error)
            except (CaptureError, InputError, VerificationError) as error:
                errors.append(error)
                continue
            if not (
                training
                or found.compared.unchecked is not None
                or draws_alike(model, found.gm, tensors, constants)
            ):
                continue
            if trace is trace_following_decisions or not found.open_sizes:
                return found
            spare = found  # sizes that depend on values; where what decides them is followed, they don't
            break
        if spare is None and not any(map(is_about_values, errors)):
            break
    if spare is not None:
        return spare
    _raise_with_fields(model, errors[0])


def _raise_with_fields(model: nn.Module, error: TiFxError) -> NoReturn:
    """Raise an error that says of a random choice which fields of the model make it."""
    fields = random_fields(model) if re.search("at random|random number", str(error)) else ""
    if fields:
        raise type(error)(f"{error}: {fields}") from error
    raise error


def _traced(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    dynamic: Dynamic,
    training: bool,
    trace: Callable[..., TraceResult],
) -> _Captured:
    """Trace in one mode and compare in both."""
    with mode(model, training):
        traced = tensors
        if dynamic != "none":
            traced = rows_for_trace(tensors, lambda inputs: runs(model, inputs, constants))
        found = trace(model, traced, constants, dynamic)
        written = evaluation_writes(found.program, model, tensors, constants)
        gm = exported_graph(found.program, model, found.baked, written)
        NORMALISE(gm)
        validate_inputs(gm)
        static = found.static
        for name, value in found.baked.items():
            why = "the model turns its values into Python numbers, so they are constants of the graph"
            static.update({f"{name}.{index}": why for index in range(value.dim())})
        names = named_sizes(gm, list(tensors))[1]
        record_sizes(gm, names=names)
        record_facts(gm, guards=guard_count(gm))
        assumed = size_assumptions(model, gm, found.program, found.questions, traced, constants)
        record_sizes(gm, assumptions=assumed)
        if assumed:
            validate_compiled(gm)
        if any(value.is_meta for value in tensors.values()):
            compared = Compared(unchecked=compare_shapes(model, gm, tensors, constants))
        else:
            compared = compare_values(model, gm, tensors, constants)
        Pipeline(NameSizes(), DropDead())(gm)
    return _Captured(
        gm,
        static,
        compared,
        _decided_by_values(gm, found.followed),
        has_open_sizes(found.program),
        found.questions,
    )


def _why_fixed(questions: Questions, name: str, index: int, size: int, dynamic: Dynamic) -> str:
    return questions.why_fixed(name, index, size) or f"the model (or dynamic={dynamic!r}) fixes it at {size}"


def _decided_by_values(gm: GraphModule, followed: FollowedDecisions) -> tuple[str, ...]:
    """Return a line for each check and each decision that the graph has, and for each loop over what a mask hits."""
    checks = {message for node in gm.graph.nodes if (message := check_message(node)) is not None}
    lines = [
        f"{message.removeprefix(MARK)}: the graph checks that, too, and a plain ONNX session does not"
        for message in sorted(checks)
        if message.startswith(REFUSES)
    ]
    lines += [
        f"{decision} on the example: the graph follows that and refuses inputs that decide otherwise, which an ONNX "
        "file does not"
        for decision in followed.decisions
        if decision.message in checks and not decision.message.startswith(REFUSES)
    ]
    for where, missed in followed.loops.items():
        compared = "" if missed else ", which the example does not show: it hits them all"
        lines.append(
            f"{short(where)} runs over all rows that its mask may hit; one that is not hit is empty in the graph"
            f"{compared}"
        )
    return tuple(dict.fromkeys(lines))
