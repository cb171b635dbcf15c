"""The front end: an nn.Module and example inputs become a plain, trainable fx.GraphModule.

torch.export gives training-level ATen; what stands in the way of editing and training that graph is normalised here
(``ti_fx.normalise``), and the result is checked against the source model in both modes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ti_fx import normalise
from ti_fx.errors import CaptureError, InputError, RandomnessError
from ti_fx.graph import aten_name, constant_size, mode, state
from ti_fx.metadata import guard_count, refresh, signature
from ti_fx.passes.canonicalize import Canonicalize
from ti_fx.steering import Concrete
from ti_fx.tracing import BATCH, Dynamic, export, traceable

# Keywords that ask for a cache, which a training graph has not. XLNet's exists in evaluation alone.
CACHES = ("use_cache", "use_mems")
RELATIVE_TOLERANCE = (
    1e-5  # captured against source, of the largest entry: eager attention sums in another order
)


@dataclass(frozen=True)
class CaptureReport:
    """What capture found out.

    Attributes:
        dims: per input, each dimension's name if it is dynamic, else its size.
        static: why a dimension is not dynamic, by ``input.dimension``.
        constants: keyword arguments that are not tensors and are baked into the graph.
        attention: the attention implementation used for the trace (None: not a transformers model).
        nodes: nodes in the graph.
        parameters: number of parameter elements the graph reads.
        checked: largest relative difference from the source model, in ``eval`` and ``train`` mode.
        unchecked: what could not be compared with the source model, and why; None if everything was.
    """

    dims: dict[str, tuple[str | int, ...]]
    static: dict[str, str]
    constants: dict[str, Any]
    attention: str | None
    nodes: int
    parameters: int
    checked: dict[str, float] = field(default_factory=dict)
    unchecked: str | None = None

    def __str__(self) -> str:
        rows = [f"{name}: [{', '.join(map(str, sizes))}]" for name, sizes in self.dims.items()] + [
            f"{where} is static: {why}" for where, why in self.static.items()
        ]
        checked = ", ".join(f"{name} {value:.1e}" for name, value in self.checked.items())
        compared = self.unchecked or f"relative difference: {checked}"
        rows.append(f"{self.nodes} nodes, {self.parameters:,} parameters; {compared}")
        return "\n".join(rows)


def capture_report(gm: GraphModule) -> CaptureReport:
    """Return the report of the capture that made ``gm``: dynamic dimensions, and why any is not."""
    report = state(gm).get("capture")
    if not isinstance(report, CaptureReport):
        raise InputError("this graph has no capture report; make it with ti_fx.capture(model, example)")
    return report


def capture(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...], *, dynamic: Dynamic = "auto"
) -> GraphModule:
    """Capture a model as a plain fx.GraphModule that takes and returns what the model does.

    The graph shares the model's Parameters and buffers. ``train()`` and ``eval()`` work as on any module. A Hugging
    Face model is switched to eager attention for the trace and restored, and its mode is left as it was.

    Args:
        model: any nn.Module that torch.export can trace, on any device, in any dtype, in either mode. On the meta
            device (``with torch.device("meta")``) a model of any size is captured, and every pass but Pack runs on it.
        example: keyword inputs (a dict or BatchEncoding), or a tuple of positional ones. Tensors become inputs;
            other values (flags, None) are baked in. For a model on the meta device they may be on any device.
        dynamic: ``auto`` makes every dimension dynamic that the model allows, of images and videos (four dimensions or
            more) the batch alone; ``all`` tries those, too; ``batch`` only dimension 0, ``none`` nothing. See
            :func:`capture_report`.

    Raises:
        InputError: the example does not fit the model's signature.
        CaptureError: the model can't be traced, or the graph does not equal the model in eval or train mode on the
            example (randomness decided in Python is baked by the trace); names the source line where it is known.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"capture needs an nn.Module, got {type(model).__name__}")
    if dynamic not in get_args(Dynamic):
        raise InputError(f"dynamic is {dynamic!r}; use {', '.join(map(repr, get_args(Dynamic)))}")
    tensors, constants = _bind(model, example)
    with traceable(model) as attention:
        try:
            gm, static, checked, unchecked = _traced(model, tensors, constants, dynamic, training=True)
        except RandomnessError:
            raise
        except (CaptureError, InputError) as error:
            # Control flow that only training has (a clamp of overflows) is left out by a trace in eval mode; dropout
            # is not. Whether that is the model in training, too, is compared like everything else, unless the model
            # does not run in training with these inputs (it wants labels), which the report says.
            try:
                gm, static, checked, unchecked = _traced(model, tensors, constants, dynamic, training=False)
            except (CaptureError, InputError):
                raise error from None
            if unchecked is None and not _draws_alike(model, gm, tensors, constants):
                raise
    dims = _dims(gm, list(tensors))[0]
    for name, sizes in dims.items():
        for index, size in enumerate(sizes):
            if isinstance(size, int):
                static.setdefault(f"{name}.{index}", f"the model (or dynamic={dynamic!r}) fixes it at {size}")
    state(gm)["capture"] = CaptureReport(
        dims=dims,
        static=static,
        constants={name: value for name, value in constants.items() if name not in CACHES},
        attention=attention,
        nodes=len(gm.graph.nodes),
        parameters=sum(parameter.numel() for parameter in gm.parameters()),
        checked=checked,
        unchecked=unchecked,
    )
    gm.train(model.training)
    return gm


def _traced(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic, training: bool
) -> tuple[GraphModule, dict[str, str], dict[str, float], str | None]:
    """Trace in one mode and compare in both; return the graph, what is static, the differences, what is unchecked."""
    traced = {name: _at_least_two(value) for name, value in tensors.items()} if dynamic != "none" else tensors
    with mode(model, training):
        found = export(model, traced, constants, dynamic)
        gm = normalise.to_plain(found.program, model, found.baked)
        static = found.static
        for name, value in found.baked.items():
            why = "the model turns its values into Python numbers, so they are constants of the graph"
            static.update({f"{name}.{index}": why for index in range(value.dim())})
        names = _dims(gm, list(tensors))[1]
        refresh(gm, gm.graph.nodes)  # torch.export's strides of views are not always what evaluating gives
        known = set(gm.graph.nodes)
        Canonicalize().apply(gm)
        refresh(gm, [node for node in gm.graph.nodes if node not in known])
        state(gm)["dims"] = names
        _name_sizes(gm, names)
        state(gm)["guards"] = guard_count(gm)
        checked: dict[str, float] = {}
        unchecked: str | None
        if any(value.is_meta for value in tensors.values()):
            unchecked = _check_shapes(model, gm, tensors, constants)
        else:
            checked, unchecked = _check(model, gm, tensors, constants)
        normalise.drop_dead(gm)
    return gm, static, checked, unchecked


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that draw random numbers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws_alike(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> bool:
    """Whether model and graph draw random numbers as often in training: a layer that is dropped at random does not."""
    counts: list[int] = []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module, inputs in ((model, {**tensors, **constants}), (gm, tensors)):
        with (
            mode(module, True),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            Concrete(),
            _Draws() as draws,  # type: ignore[no-untyped-call]
        ):
            module(**inputs)
        counts.append(draws.count)
        _restore(model, buffers)
    return counts[0] == counts[1]


def _bind(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**example) if isinstance(example, Mapping) else signature.bind(*example)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise InputError(
            f"the example does not fit {type(model).__name__}.forward({known}): {error}"
        ) from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(f"{type(model).__name__}.forward takes *{name}; give the model named inputs")
        else:
            arguments[name] = value
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    for name, value in constants.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise InputError(
                f"input {name!r} nests tensors in a {type(value).__name__}; give each tensor a keyword"
            )
    if not tensors:
        raise InputError("the example holds no tensor; give at least one input tensor")
    stored = {parameter.device for parameter in model.parameters()}
    if stored == {torch.device("meta")}:
        tensors = {name: value.to("meta") for name, value in tensors.items()}
    devices = stored | {value.device for value in tensors.values()}
    if len(devices) > 1:
        raise InputError(f"model and example are on different devices: {sorted(map(str, devices))}")
    for name in CACHES:
        if name in signature.parameters:
            constants.setdefault(name, False)
    return tensors, constants


def _at_least_two(value: Tensor) -> Tensor:
    """Repeat the batch when there is one row: torch.export takes a size of 1 for a constant."""
    return torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value


def _dims(gm: GraphModule, inputs: list[str]) -> tuple[dict[str, tuple[str | int, ...]], dict[str, str]]:
    """Name the symbols: dimension 0 is the batch, dimension 1 of a rank-2 input a sequence, others by input."""
    names: dict[str, str] = {}
    dims: dict[str, tuple[str | int, ...]] = {}
    placeholders = {node.target: node for node in gm.graph.find_nodes(op="placeholder")}
    for name in inputs:
        sizes: list[str | int] = []
        for index, size in enumerate(placeholders[name].meta["val"].shape):
            if (constant := constant_size(size)) is not None:
                sizes.append(constant)
                continue
            symbol = str(size)
            if symbol not in names:
                base = BATCH if index == 0 else "sequence" if index == 1 else f"{name}_{index}"
                names[symbol] = base if base not in names.values() else f"{name}_{base}"
            sizes.append(names[symbol])
        dims[name] = tuple(sizes)
    return dims, names


def _name_sizes(gm: GraphModule, names: dict[str, str]) -> None:
    """Call the node that reads a dynamic size by the size's name."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) in names and aten_name(node) == "sym_size":
            node._rename(names[str(value)])
    gm.recompile()


def _check(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> tuple[dict[str, float], str | None]:
    """Compare the graph with the source model on the example, in both modes; return what could not be."""
    checked: dict[str, float] = {}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({value.device.index or 0 for value in tensors.values() if value.is_cuda})
    for name, training in (("eval", False), ("train", True)):
        with (
            mode(model, training),
            mode(gm, training),
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
        ):
            torch.manual_seed(0)
            try:
                with Concrete():  # a number that nothing depends on is not drawn in the graph
                    expected = model(**tensors, **constants)
            except Exception as error:
                if not training:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                return (
                    checked,
                    f"not compared with the model in train mode, where it fails on the example: {reason}",
                )
            _restore(model, buffers)
            torch.manual_seed(0)
            actual = _run(gm, tensors, type(model).__name__)
            _restore(model, buffers)
        checked[name] = _difference(expected, actual)
        if not checked[name] <= _tolerance(expected):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} differs from the model in {name} mode (relative "
                f"{checked[name]:.1e}): something is decided in Python by the mode or at random; turn it off in the "
                "model's config (layerdrop, drop_path, masking)"
            )
    return checked, None


def _check_shapes(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> str:
    """Compare shapes and dtypes where there are no values, in both modes, and return what that leaves open."""
    for name, training in (("eval", False), ("train", True)):
        with mode(model, training), mode(gm, training), torch.no_grad():
            try:
                expected = model(**tensors, **constants)
            except (NotImplementedError, RuntimeError) as error:  # it looks at a value
                reason = str(error).splitlines()[0]
                return (
                    f"not compared with the model in {name} mode: it does not run without values ({reason})"
                )
            if signature(expected) != signature(_run(gm, tensors, type(model).__name__)):
                raise CaptureError(
                    f"the captured graph of {type(model).__name__} returns other shapes or dtypes than the model in "
                    f"{name} mode; capture it with values to see where they part"
                )
    return (
        "values not compared with the model, whose tensors have none on the meta device; in eval and train mode shapes "
        "and dtypes are equal"
    )


def _run(gm: GraphModule, tensors: dict[str, Tensor], name: str) -> Any:
    try:
        return gm(**tensors)
    except (
        Exception
    ) as error:  # whatever an operation raises on sizes that only this example's values let pass
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptureError(
            f"the captured graph of {name} fails on the example, where the model does not: {reason}; check that the "
            "inputs' sizes fit each other"
        ) from error


def _restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _tolerance(value: Any) -> float:
    leaves = [
        leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    coarsest = max((torch.finfo(leaf.dtype).eps for leaf in leaves), default=0.0)
    return max(RELATIVE_TOLERANCE, 8 * coarsest if coarsest > 1e-4 else 0.0)


def _difference(expected: Any, actual: Any) -> float:
    """Return the largest difference of two output structures, relative to each tensor's largest entry."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    pairs = [(a, b) for a, b in zip(left, right, strict=False) if isinstance(a, Tensor)]
    if len(left) != len(right):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b) or not a.numel():
            continue
        same_nan = a.isnan() & b.isnan()
        gap = (a.double() - b.double()).abs().masked_fill(same_nan | (a == b), 0)
        finite = a.double().masked_fill(~a.isfinite(), 0).abs().max().clamp(min=1e-30)
        worst = max(worst, (gap.max() / finite).item())
    return worst
