"""A captured graph's inputs and outputs have names, and its inputs can be made at other sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import ExportError, InputError, first_line
from ti_fx.export import arguments
from ti_fx.ir.edit import call, constant_size, erase_dead, fork, mode
from ti_fx.ir.facts import facts
from ti_fx.ir.inputs import distinct
from ti_fx.ir.outputs import is_container, named_leaves
from ti_fx.ir.shapes import fake_mode

BATCH = "batch"
_SHORTEST = 2  # torch.export takes a size of 1 for a constant


def bind(gm: GraphModule, example: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the example's tensors by input name, in the graph's order; values that are not tensors were baked in.

    Raises:
        InputError: it is no mapping or tuple, names don't match the graph's inputs, or a tensor is no dense one on the
            CPU.
    """
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    example = arguments.example(example)
    if isinstance(example, Mapping):
        given = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    else:
        given = dict(zip(names, [value for value in example if isinstance(value, Tensor)], strict=False))
    if set(given) != set(names):
        raise InputError(
            f"the graph takes the inputs {', '.join(names)}, and the example has "
            f"{', '.join(map(str, given)) or 'none'}; give one tensor for each"
        )
    for name, value in given.items():
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise InputError(
                f"input {name!r} is {value.layout} on {value.device}; give a dense tensor on the CPU"
            )
    return distinct({name: given[name] for name in names})


def dimensions(gm: GraphModule) -> dict[str, dict[int, str]]:
    """Return the dynamic dimensions of each input by name, as capture named them (``batch``, ``sequence``)."""
    known = facts(gm).sizes.names
    found: dict[str, dict[int, str]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        found[name] = {
            index: known.get(str(size), f"{name}_{index}")
            for index, size in enumerate(node.meta["val"].shape)
            if constant_size(size) is None
        }
    return found


def limits(gm: GraphModule) -> dict[str, tuple[int, int | None]]:
    """Return the smallest and the largest size of each dynamic dimension; None where there is no largest."""
    names = dimensions(gm)
    found: dict[str, tuple[int, int | None]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        for index, name in names[str(node.target)].items():
            symbol = node.meta["val"].shape[index].node
            bounds = symbol.shape_env.bound_sympy(symbol.expr)
            upper = int(bounds.upper) if bounds.upper.is_Integer else None
            found[name] = max(_SHORTEST, int(bounds.lower)), upper
    return found


def sizes(gm: GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the size of each named dimension in these inputs."""
    return {
        name: inputs[key].shape[index] for key, dims in dimensions(gm).items() for index, name in dims.items()
    }


def resized(gm: GraphModule, inputs: Mapping[str, Tensor], wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the inputs tiled and cropped to other sizes of the named dimensions."""
    names = dimensions(gm)
    result = {}
    for key, value in inputs.items():
        for index, name in names[key].items():
            positions = torch.arange(wanted.get(name, value.shape[index])) % value.shape[index]
            value = value.index_select(index, positions)
        result[key] = value.contiguous()
    return result


def traceable(gm: GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with every dynamic dimension at least 2."""
    return resized(gm, inputs, {name: max(size, _SHORTEST) for name, size in sizes(gm, inputs).items()})


def other_sizes(gm: GraphModule, inputs: Mapping[str, Tensor]) -> list[dict[str, int]]:
    """Return two sets of sizes, each unlike the example's in every dynamic dimension that allows it, and special ones.

    Those are of a graph with a cache: before the first token, and one token at a time.
    """
    bounds, own = limits(gm), sizes(gm, inputs)
    longer, shorter = dict(own), dict(own)
    for name, size in own.items():
        step = 1 if name == BATCH else 3
        lowest, highest = bounds[name]
        allowed = [
            candidate
            for candidate in (
                *(size + step, size + 2 * step, size - step, size // 2),
                *(size + 1, size - 1, 2 * size, 3 * size),
            )
            if lowest <= candidate <= (highest or candidate) and _fits(gm, {**longer, name: candidate})
        ] or [size]
        longer[name] = allowed[0]
        others = [
            candidate
            for candidate in allowed
            if candidate not in (size, allowed[0]) and _fits(gm, {**shorter, name: candidate})
        ]
        shorter[name] = min(
            others, key=lambda candidate: abs(candidate - size / 2), default=_last(gm, shorter, name, allowed)
        )
    if own and longer == own:  # sizes that change together: one is twice the other
        scaled = [{name: times * size for name, size in own.items()} for times in (2, 3)]
        longer = next((sizes for sizes in scaled if _allowed(gm, sizes, bounds)), longer)
    found = [longer, shorter, *({**longer, **case} for case in facts(gm).sizes.cases)]
    for name, parts in facts(gm).sizes.sums.items():  # a mask covers the cache and what is new
        for wanted in found:
            wanted[name] = sum(wanted[part] for part in parts)
    return found


def _last(gm: GraphModule, wanted: Mapping[str, int], name: str, allowed: list[int]) -> int:
    return next((one for one in reversed(allowed) if _fits(gm, {**wanted, name: one})), wanted[name])


def _allowed(
    gm: GraphModule, wanted: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]
) -> bool:
    within = all(bounds[name][0] <= size <= (bounds[name][1] or size) for name, size in wanted.items())
    return within and _fits(gm, wanted)


def _fits(gm: GraphModule, wanted: Mapping[str, int]) -> bool:
    """Whether what the graph assumes of sizes holds, and the equalities that the trace asked of them."""
    for name, parts in facts(gm).sizes.sums.items():
        wanted = {**wanted, name: sum(wanted[part] for part in parts)}
    if not all(assumption.holds(wanted) for assumption in facts(gm).sizes.assumptions):
        return False
    environment = fake_mode(gm).shape_env
    symbols = {symbol: wanted[name] for symbol, name in facts(gm).sizes.names.items() if name in wanted}
    guards = [guard.expr for guard in environment.guards] if environment is not None else []
    known = [(symbol, symbols.get(str(symbol))) for guard in guards for symbol in guard.free_symbols]
    values = {symbol: value for symbol, value in known if value is not None}
    return all(
        guard.subs(values) != False  # noqa: E712  a sympy relation is neither true nor false until it is decided
        for guard in guards
        if type(guard).__name__ in ("Equality", "Or")
    )


def padded(gm: GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with each row of ``attention_mask`` ending in another amount of padding."""
    result = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.dtype.is_floating_point:
        return result
    rows, length = mask.shape
    kept = length - torch.arange(rows) % max(1, length // 2)
    result["attention_mask"] = mask * (torch.arange(length) < kept.unsqueeze(1)).to(mask.dtype)
    return result


def permuted(gm: GraphModule, values: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Return the inputs with their batch in another order."""
    names = dimensions(gm)
    return {
        key: value.index_select(0, order) if names[key].get(0) == BATCH else value
        for key, value in values.items()
    }


def flat_outputs(gm: GraphModule) -> tuple[GraphModule, dict[str, Node]]:
    """Return a fork that returns its outputs as one tuple, and those outputs by exported name.

    Names are the fields of the model's ModelOutput or the keys of its dict; ``output_0``, ... where there are none. An
    output that is called as an input (a mask that comes back) is ``output_<name>``: a file can't have both.

    Raises:
        ExportError: the graph returns something that is not a tensor.
    """
    flat = fork(gm)
    output = flat.graph.output_node()
    inputs = {str(node.target) for node in flat.graph.find_nodes(op="placeholder")}
    leaves = {_output_name(name, inputs): node for name, node in named_leaves(output.args[0]).items()}
    for name, node in leaves.items():
        if not isinstance(node.meta.get("val"), Tensor):
            raise ExportError(f"output {name!r} (%{node.name}) is not a tensor; return tensors only")
    if not leaves:
        raise ExportError("the graph returns no tensor, so there is nothing to export")
    for name, node in leaves.items():
        if node.op == "placeholder":  # or the exporter gives the input the output's name
            leaves[name] = call(output, torch.ops.aten.clone.default, (node,))
            leaves[name].meta = dict(node.meta)
    output.args = (tuple(leaves.values()),)
    erase_dead(node for node in flat.graph.nodes if is_container(node))
    flat.recompile()
    return flat, {str(name): node for name, node in leaves.items()}


def _output_name(name: str, inputs: Collection[str]) -> str:
    if name == "output":
        return "output_0"
    return f"output_{name}" if name[:1].isdigit() or name in inputs else name


def run_graph(gm: GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the graph in eval mode without gradients; outputs by exported name.

    Raises:
        InputError: the graph was not captured for these inputs, or an id is beyond its table.
    """
    flat, leaves = flat_outputs(gm)
    with mode(flat, False), torch.no_grad(), refusals():
        values = flat(**inputs)
    return dict(zip(leaves, values, strict=True))


@contextmanager
def refusals() -> Iterator[None]:
    """Say in one line that a graph does not take its inputs.

    Raises:
        InputError: the graph was not captured for these inputs, or an id is beyond its table.
    """
    try:
        yield
    except IndexError as error:
        raise InputError(
            f"the example holds an id beyond its table ({first_line(error)}); give ids that the model knows"
        ) from error
    except RuntimeError as error:
        reason = first_line(error)
        raise InputError(
            f"the graph can't run these inputs ({reason}); are they longer than the model takes?"
        ) from error
