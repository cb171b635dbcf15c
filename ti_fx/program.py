"""One model through torch.export: which sizes are dynamic, and what Python may read on the way."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv, free_unbacked_symbols

from ti_fx.concrete import Concrete
from ti_fx.decisions import Decisions
from ti_fx.errors import first_line

Dynamic = Literal["auto", "all", "batch", "none"]
# Inputs of this many dimensions are images and videos: their sizes as symbols cost minutes of algebra.
IMAGE_RANK = 4

BATCH = "batch"


def _dynamic_shapes(tensors: dict[str, Tensor], dynamic: Dynamic) -> tuple[dict[str, Any], dict[str, str]]:
    if dynamic == "none":
        return dict.fromkeys(tensors), {}
    batch = next((value.shape[0] for value in tensors.values() if value.dim()), 0)
    named = torch.export.Dim(BATCH)
    shapes: dict[str, Any] = {}
    static: dict[str, str] = {}
    for name, value in tensors.items():
        dims: dict[int, Any] = {}
        for index, size in enumerate(value.shape):
            if index == 0 and size == batch and batch > 1:
                dims[index] = named
            elif dynamic == "auto" and value.dim() >= IMAGE_RANK:
                static[f"{name}.{index}"] = (
                    f"dynamic='auto' fixes it at {size}, as in every input of {IMAGE_RANK} or more dimensions; "
                    "dynamic='all' does not"
                )
            elif dynamic in ("auto", "all") and size > 1:
                dims[index] = torch.export.Dim.AUTO
            elif dynamic in ("auto", "all"):
                static[f"{name}.{index}"] = f"the example's size is {size}; give an example of at least 2"
        shapes[name] = dims or None
    return shapes, static


@dataclass(frozen=True)
class Known:
    """What a trace knows beside the model.

    Attributes:
        baked: values of inputs that are constants of the program.
        numbers: the model's buffers of one whole number.
        decisions: what Python read on the example; None: what it reads may not depend on values.
    """

    baked: dict[str, Tensor] = field(default_factory=dict)
    numbers: tuple[Tensor, ...] = ()
    decisions: Decisions | None = None


def export_program(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic, known: Known
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Return the program, and why a dimension is not dynamic, by ``input.dimension``.

    Sizes that the model ties or fixes in a way that can't be expressed are fixed: all but the batch, or all.
    """
    constants = {**constants, **known.baked}
    follows = known.decisions is not None
    rungs: list[Dynamic] = [dynamic]
    if dynamic in ("auto", "all"):
        rungs += (
            ["none"] if known.baked else ["batch", "none"]
        )  # values that are constants mostly fix the batch, too
    reason = ""
    spare: tuple[torch.export.ExportedProgram, dict[str, str]] | None = None
    for rung in rungs:
        shapes, static = _dynamic_shapes(tensors, rung)
        if reason:
            static = {
                f"{name}.{index}": reason
                for name, value in tensors.items()
                for index in range(int(rung == "batch"), value.dim())
            }
        try:
            program = _trace(model, tensors, constants, shapes, known)
            if fixed := _fixed_by_equalities(program, tensors):
                for name, index in fixed:
                    del shapes[name][index]
                    size = tensors[name].shape[index]
                    static[f"{name}.{index}"] = f"the model's code fixes {name}.{index} at {size}"
                program = _trace(model, tensors, constants, shapes, known)
        except Exception as error:
            # what reads values may do without them where sizes are numbers
            if rung == rungs[-1] or not (known.baked or follows or _is_about_shapes(error)):
                if spare is None:
                    raise
                break
            reason = reason or _shape_reason(error)
            continue
        if not (follows and has_open_sizes(program)):
            return program, static
        spare = spare or (program, static)
        reason = (
            reason or "the model computes sizes from it with tensors, which only a fixed size makes numbers"
        )
    assert spare is not None
    return spare


def _trace(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    shapes: dict[str, Any],
    known: Known,
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the half-made graph of a failed trace
    if known.decisions is not None:
        known.decisions.restart()
    with (
        _modules_stay(),
        _keywords_only(model, list(tensors), constants),
        torch.random.fork_rng(devices=[]),
        redirect_stderr(printed),
        _without_checks(known.decisions is not None),
        _broadcast_masks(),
        Concrete([*known.baked.values(), *known.numbers], decisions=known.decisions) as concrete,
        _taken_for_hit(concrete),
    ):
        exported = torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)
    sys.stderr.write(printed.getvalue())
    return exported


def _fixed_by_equalities(
    program: torch.export.ExportedProgram, tensors: dict[str, Tensor]
) -> list[tuple[str, int]]:
    """Return the dimensions that are symbols in the program and whose equalities hold at no size but the example's.

    Where one has several symbols, torch.export does not solve it: 8 * bins * (length // (length // 8)) = 256.
    """
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    places: dict[Any, list[tuple[str, int]]] = {}
    for name, given in zip(tensors, program.graph_signature.user_inputs, strict=True):
        for index, size in enumerate(nodes[str(given)].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                places.setdefault(size.node.expr, []).append((name, index))
    own = {
        symbol: tensors[name].shape[index]
        for symbol, ((name, index), *_) in places.items()
        if symbol.is_Symbol
    }
    equalities = [one.expr for one in environment.guards if one.expr.is_Equality] if own else []

    def changes(symbol: Any, size: int) -> bool:
        asked = [one for one in equalities if symbol in one.free_symbols]
        others = (2 * size, 3 * size, size // 2, *range(size + 1, size + 33), *range(2, size))
        return any(
            all(_may_hold(one, {**scaled, symbol: other}) for one in asked)
            for other in others
            for scaled in (own, {one: 2 * value for one, value in own.items()})
        )

    return [place for symbol, size in own.items() if not changes(symbol, size) for place in places[symbol]]


def _may_hold(equality: Any, sizes: Mapping[Any, int]) -> bool:
    """Whether an equality of sizes is not known to fail; what further symbols leave open is neither true nor false."""
    try:
        return bool(equality.subs(sizes) != False)  # noqa: E712
    except ZeroDivisionError:  # 256 // (length // 8) has no value at a length below 8
        return False


def has_open_sizes(program: torch.export.ExportedProgram) -> bool:
    """Whether the size of an output or of a map depends on values: a teacher's may differ from a student's."""
    nodes = program.graph.nodes
    maps = [node for node in nodes if "softmax" in getattr(node.target, "__name__", "")]
    return any(
        free_unbacked_symbols(node.meta["val"].shape)
        for node in [*maps, *program.graph.output_node().all_input_nodes]
        if isinstance(node.meta.get("val"), Tensor)
    )


@contextmanager
def _taken_for_hit(concrete: Concrete) -> Iterator[None]:
    """In a loop over what a mask hits, take what a row selects for not empty: ``if not places.numel(): continue``.

    Where it is empty the body computes on nothing.
    """
    original: Any = ShapeEnv.evaluate_expr

    def evaluated(environment: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(environment, expression, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            empty = getattr(expression, "rhs", None) == 0 and expression.rel_op in ("==", "!=")
            if not (concrete.looping and empty):
                raise
            return original(
                environment, expression, *args, **{**kwargs, "fallback_value": expression.rel_op == "!="}
            )

    ShapeEnv.evaluate_expr = evaluated  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]


@contextmanager
def _without_checks(active: bool) -> Iterator[None]:
    """Leave out transformers' own checks of values, which compute nothing; the model has run on the example."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    if active:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if active and before is None:
            del os.environ[name]
        elif active and before is not None:
            os.environ[name] = before


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Masks of transformers by broadcast instead of vmap: a graph can't hold its batched tensors."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None:
        yield
        return
    before = masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex

    def broadcast(function: Any) -> Any:
        def of(*indices: Tensor) -> Tensor:
            mask: Tensor = function(*masks._non_vmap_expansion_sdpa(*indices))
            return mask.expand(*(len(index) for index in indices))

        return of

    masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex = broadcast, nullcontext
    try:
        yield
    finally:
        masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex = before


@contextmanager
def whole_numbers_stay(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Take the model's buffers of one whole number (a stride, a kernel's size) for constants, and yield them."""
    found = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and buffer.numel() == 1
        and not (buffer.is_floating_point() or buffer.is_complex())
    ]
    before = [(module, dict(module._buffers)) for module in {id(one[0]): one[0] for one in found}.values()]
    try:
        for module, name, buffer in found:
            del module._buffers[name]
            module.__dict__[name] = buffer
        yield tuple(buffer for _, _, buffer in found)
    finally:
        for module, name, _ in found:
            del module.__dict__[name]
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)  # in their order, which state_dict() has


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer's values back as they were: running statistics change with every forward in training."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


@contextmanager
def _modules_stay() -> Iterator[None]:
    """Let ``module.to(dtype)`` within forward return a module that has that dtype: a trace can't swap weights."""
    original = nn.Module.to

    def stays(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if all(
            (device is None or value.device == device) and (dtype is None or value.dtype == dtype)
            for value in module.parameters()
        ):
            return module
        return original(module, *args, **kwargs)

    nn.Module.to = stays  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@contextmanager
def _keywords_only(model: nn.Module, inputs: list[str], constants: dict[str, Any]) -> Iterator[None]:
    """Bind what is constant."""
    forward = model.forward

    def bound(**tensors: Tensor) -> Any:
        return without_caches(forward(**tensors, **constants))

    with forward_of_tensors(model, bound, inputs):
        yield


def without_caches(outputs: Any) -> Any:
    """Return a model's outputs as ``use_cache=False`` gives them, also where the model makes a cache all the same."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None or not isinstance(outputs, Mapping):
        return outputs
    kept = {name: value for name, value in outputs.items() if not isinstance(value, library.Cache)}
    kind: Any = type(outputs)
    return outputs if len(kept) == len(outputs) else kind(**kept)


@contextmanager
def forward_of_tensors(
    model: nn.Module, function: Callable[..., Any], inputs: Sequence[str]
) -> Iterator[None]:
    """Let a function of keyword tensors be the model's forward.

    It gets the signature that the graph will have: torch.export can't name what ``**kwargs`` takes.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _is_about_shapes(error: Exception) -> bool:
    return bool(re.search(r"[Cc]onstraint|dynamic_shapes|specializ", str(error)))


def _shape_reason(error: BaseException) -> str:
    """Return which size the model's code fixes, as far as torch.export tells."""
    found = re.search(
        r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    return f"the model's code fixes {found[1]} at {found[2]}" if found else first_line(error)
