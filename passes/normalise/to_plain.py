"""Turn what torch.export returns into a plain fx.GraphModule that can be edited, trained, compiled and pickled.

1. the pytree signature goes: placeholders are the model's keywords, the output node holds the model's own structure
2. guard and assertion nodes go (inputs are validated before the call instead)
3. sub-graphs (``wrap_with_set_grad_enabled``) are inlined
4. what depends on the mode becomes leaf modules (``ti_fx.ir.leaves``, ``ti_fx.passes.normalise.stochastic_depth``)
5. one read per parameter, tied names merged, right before its first use
6. roles
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ti_fx.errors import CaptureError
from ti_fx.ir import leaves, outputs, roles
from ti_fx.ir.checks import is_random
from ti_fx.ir.edit import (
    aten_name,
    erase,
    is_persistent,
    prune,
    register,
    replace_by_leaf,
    tensor,
    written_arguments,
)
from ti_fx.ir.facts import record_facts
from ti_fx.ir.inputs import validate_inputs
from ti_fx.passes.normalise.drop_assertions import drop_assertions
from ti_fx.passes.normalise.stochastic_depth import replace_drop_paths


def to_plain(
    exported: torch.export.ExportedProgram, model: nn.Module, baked: Mapping[str, Tensor] | None = None
) -> GraphModule:
    """Return the plain trainable graph of an exported program; inputs that are ``baked`` are taken and not read."""
    source = exported.module()
    if not isinstance(source, GraphModule):
        raise CaptureError("torch.export returned no graph")
    gm = _plain_signature(source, type(model).__name__)
    _take_baked(gm, baked or {})
    _inline_subgraphs(gm)
    drop_assertions(gm)
    if model.training:
        replace_drop_paths(gm)
    _leaf_modules(gm, model.training)
    _share_model_tensors(gm, model)
    _one_read_each(gm)
    assign_roles(gm)
    gm.graph.lint()
    gm.recompile()
    validate_inputs(gm)
    return gm


def drop_dead(gm: GraphModule) -> None:
    """Remove what no output depends on, and the tensors that only that read.

    Comes after the comparison with the model: a dropout nobody reads draws from the random numbers of the next, so
    that with the same seed the graph then draws others than the model.
    """
    gm.graph.eliminate_dead_code()
    prune(gm)
    gm.recompile()


def _plain_signature(source: GraphModule, name: str) -> GraphModule:
    info = source.graph._codegen.pytree_info  # type: ignore[attr-defined]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            copies[node] = graph.node_copy(node)
    for node in source.graph.nodes:
        if node.op in ("placeholder", "output") or node.target == "_guards_fn":
            continue
        copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    flat: Any = torch.fx.node.map_arg(source.graph.output_node().args[0], lambda node: copies[node])
    graph.output(outputs.build(graph, info.out_spec, flat))
    root = nn.Module()
    root._modules, root._parameters, root._buffers = source._modules, source._parameters, source._buffers
    for node in graph.find_nodes(op="get_attr"):
        constant = None if "." in node.target else getattr(source, node.target, None)
        known = node.target in root._parameters or node.target in root._buffers
        if isinstance(constant, Tensor) and not known:  # made in forward: a plain attribute
            root.register_buffer(node.target, constant, persistent=False)
    gm = GraphModule(root, graph, class_name=name)
    for node in gm.graph.nodes:
        if outputs.is_container(node):
            node.meta["val"] = node.target(
                **torch.fx.node.map_arg(dict(node.kwargs), lambda n: n.meta["val"])
            )
    return gm


def _take_baked(gm: GraphModule, baked: Mapping[str, Tensor]) -> None:
    first = next(iter(gm.graph.nodes))
    fake = next(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")).fake_mode
    for name, value in baked.items():
        with gm.graph.inserting_before(first):
            node = gm.graph.placeholder(name)
        node.meta["val"] = fake.from_tensor(value, static_shapes=True)
    record_facts(gm, baked=dict(baked))


def _inline_subgraphs(gm: GraphModule) -> None:
    """Replace calls of a sub-graph wrapped in set_grad_enabled or autocast by the nodes of that sub-graph."""
    again = True
    while again:
        again = False
        for node in list(gm.graph.nodes):
            name = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else ""
            if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
                continue
            where = next(
                i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr"
            )
            read = node.args[where]
            inner = gm.get_submodule(read.target)
            if not isinstance(inner, GraphModule):
                raise CaptureError(f"node {node.name} calls a sub-graph that is not a graph")
            _inline(gm.graph, node, inner.graph, list(node.args[where + 1 :]))
            if not read.users:
                erase(read)
            again = True


def _inline(graph: Graph, caller: Node, inner: Graph, arguments: list[Any]) -> None:
    values: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(caller):
        for node in inner.nodes:
            if node.op not in ("placeholder", "output"):
                values[node] = graph.node_copy(node, lambda argument: values[argument])
    results: Any = torch.fx.node.map_arg(inner.output_node().args[0], lambda node: values[node])
    for user in list(caller.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"node {user.name} reads the whole result of sub-graph {caller.name}")
        user.replace_all_uses_with(results[user.args[1]])
        erase(user)
    erase(caller)


def _leaf_modules(gm: GraphModule, training: bool) -> None:
    for node in list(gm.graph.nodes):
        name = aten_name(node)
        if name in ("dropout", "dropout_") and training and not node.args[2]:
            node.replace_all_uses_with(node.args[0])  # switched off for good, whatever the mode
            erase(node)
        elif name in ("dropout", "dropout_"):
            leaf = nn.Dropout(float(node.args[1]), inplace=name == "dropout_")
            replace_by_leaf(gm, node, leaf, (node.args[0],))
        elif name == "scaled_dot_product_attention":
            arguments = _bound(node)
            fused = leaves.ScaledDotProductAttention(
                float(arguments["dropout_p"]),
                arguments["is_causal"],
                arguments["scale"],
                arguments["enable_gqa"],
            )
            operands = (arguments["query"], arguments["key"], arguments["value"], arguments["attn_mask"])
            node._rename("attention")
            replace_by_leaf(gm, node, fused, operands if operands[3] is not None else operands[:3])
        elif name in ("batch_norm", "native_dropout", "alpha_dropout", "feature_dropout", "rrelu"):
            _replace_mode_dependent(gm, node, name)


def _replace_mode_dependent(gm: GraphModule, node: Node, name: str) -> None:
    if name != "batch_norm":
        raise CaptureError(
            f"node {node.name} calls aten.{name}, whose mode is frozen by the trace; use nn.Dropout"
        )
    arguments = _bound(node)
    leaf = leaves.BatchNorm(float(arguments["momentum"]), float(arguments["eps"]))
    names = ("input", "weight", "bias", "running_mean", "running_var")
    replace_by_leaf(gm, node, leaf, tuple(arguments[key] for key in names))
    for update in list(gm.graph.nodes):  # num_batches_tracked is bookkeeping of the source module
        if (
            aten_name(update) == "add_"
            and isinstance(update.args[0], Node)
            and str(update.args[0].target).endswith("num_batches_tracked")
        ):
            erase(update)


def _bound(node: Node) -> dict[str, Any]:
    """Return an ATen call's arguments by name, defaults included."""
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def _share_model_tensors(gm: GraphModule, model: nn.Module) -> None:
    """Read the model's own Parameter and buffer objects, under the first of each tensor's names."""
    first: dict[int, str] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    by_name = dict(everything)
    for name, value in everything:
        first.setdefault(id(value), name)
    tied: dict[str, list[str]] = {}
    for name, value in everything:
        if first[id(value)] != name:
            tied.setdefault(first[id(value)], []).append(name)
    record_facts(gm, tied={name: tuple(others) for name, others in tied.items()})
    for node in gm.graph.find_nodes(op="get_attr"):
        own = by_name.get(node.target)
        if own is not None:
            node.target = first[id(own)]
            register(gm, node.target, own, is_persistent(model, node.target))
        elif isinstance(tensor(gm, node.target), nn.Parameter):
            raise CaptureError(f"the graph reads a parameter {node.target} that the model does not name")


def _one_read_each(gm: GraphModule) -> None:
    """Keep one get_attr node per tensor, right before its first user, named by the last two parts of its path."""
    reads: dict[str, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target in reads:
            node.replace_all_uses_with(reads[node.target])
            erase(node)
        else:
            reads[node.target] = node
            node._rename("_".join([part for part in node.target.split(".") if not part.isdigit()][-2:]))
    moved: set[Node] = set()
    for node in list(gm.graph.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in moved:
                moved.add(source)
                node.prepend(source)


def assign_roles(gm: GraphModule) -> None:
    """Give every node its first role: shared if nothing trainable, stored or random is upstream, else student.

    A tensor that the student writes into is the student's own: a twin writes into another.
    """
    while True:
        written: set[Node] = set()
        for node in gm.graph.nodes:
            own = (
                node.op in ("get_attr", "call_module", "output")
                or is_random(node)
                or outputs.is_container(node)
                or roles.fact(node, "written")
            )
            inherited = any(roles.is_student(source) for source in node.all_input_nodes)
            roles.set_role(node, "student" if own or inherited else "shared")
            if roles.is_student(node):
                written |= {base for base in _written(node) if not roles.is_student(base)}
        for base in written:
            roles.record(base, written=True)
        if not written:
            break
    for node in gm.graph.nodes:
        roles.record(node, written=None)


def _written(node: Node) -> Iterator[Node]:
    """Yield what an in-place operator writes into, and what that is a view of."""
    for written in written_arguments(node):
        value: Any = written
        while isinstance(value, Node):
            if value.op == "placeholder":
                break
            yield value
            views = isinstance(value.target, torch._ops.OpOverload) and value.target.is_view
            value = value.args[0] if views or value.target is operator.getitem else None
