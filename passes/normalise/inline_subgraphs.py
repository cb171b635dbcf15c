"""Put the nodes of a sub-graph in the place of its call."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ti_fx.errors import CaptureError
from ti_fx.ir.checks import is_assertion
from ti_fx.ir.edit import aten_name, call, erase, insert_copy, stored, written_arguments
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED

# What torch.export makes of `with torch.no_grad():` and `with torch.autocast(...):`.
_GRADIENTS = "wrap_with_set_grad_enabled"
_WRAPPED = (_GRADIENTS, "wrap_with_autocast")
# What to write instead of an operator that decides or repeats by itself.
_INSTEAD = {
    "cond": "compute both branches and choose with torch.where(condition, first, second)",
    "while_loop": "write a Python loop of a fixed number of steps",
    "map_impl": "call the function on the whole tensor (torch.vmap, or a batch dimension)",
    "scan": "write a Python loop of a fixed number of steps, or a cumulative operation (torch.cumsum)",
    "associative_scan": "use a cumulative operation (torch.cumsum, torch.cumprod, torch.logcumsumexp)",
    "flex_attention": "use scaled_dot_product_attention with the mask and the bias as a tensor (attn_mask=)",
}


@dataclass(frozen=True)
class InlineSubgraphs(Pass):
    """A region of the model that runs without gradients or under autocast is part of the graph itself.

    before:  %submod = submod_1                                         after:  %sum_1 = sum(%x)
             %call = wrap_with_set_grad_enabled(False, %submod, [%x])           %sum_1_detached = detach(%sum_1)
             %item = getitem(%call, 0)                                          %y = mul(%x, %sum_1_detached)
             %y = mul(%x, %item)

    1. a sub-graph's nodes come before its call, each where it was, and read what the call was given; torch.export's own
       assertions stay out, which need not hold outside the region (autocast gives other dtypes)
    2. who read one of its results reads the node that computes it
    3. a sub-graph may hold others, which are inlined in turn
    4. what leaves a region without gradients is detached, and so is what the region writes into a stored tensor; what
       no gradient could reach is left: rotary's tables, made from constants and positions
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Inline one after another, outer ones first.

        Raises:
            CaptureError: a sub-graph that is called in another way (``torch.cond``), or whose results are read whole; a
                region without gradients changes in place what has one.
        """
        regions: dict[Node, Node | None] = {}
        calls = _calls(gm)
        while calls:
            for one in calls:
                _inline(gm, one, regions)
            calls = _calls(gm)
        if any(regions.values()):
            _detach(gm, regions)


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]


def _line(call: Node) -> str:
    """Return where the model calls it, if torch.export noted that."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(call.meta.get("stack_trace") or ""))
    own = [(Path(file).name, line) for file, line in frames if not file.startswith(("<", torch.__path__[0]))]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _inline(gm: GraphModule, of: Node, regions: dict[Node, Node | None]) -> None:
    """Inline one; ``regions`` says of each node which region without gradients it is in."""
    name = getattr(of.target, "__name__", str(of.target))
    if name not in _WRAPPED:
        raise CaptureError(
            f"%{of.name} calls torch's operator {name}{_line(of)}, whose sub-graphs have no place in one graph; "
            f"{_INSTEAD.get(name, 'make it tensor operations')}, or leave that part out of the model"
        )
    where, read = next(
        (index, node)
        for index, node in enumerate(of.args)
        if isinstance(node, Node) and node.op == "get_attr"
    )
    inner = gm.get_submodule(str(read.target))
    assert isinstance(inner, GraphModule)  # torch.export's own
    values: dict[Node, Any] = dict(
        zip(inner.graph.find_nodes(op="placeholder"), of.args[where + 1 :], strict=True)
    )
    region = regions.pop(of, None)
    if name == _GRADIENTS:
        region = None if of.args[0] else region or of
    for node in inner.graph.nodes:
        if node.op in ("placeholder", "output") or is_assertion(node):
            continue
        values[node] = insert_copy(of, node, values.__getitem__)
        regions[values[node]] = region
        if node.op == "get_attr":  # a sub-graph of the sub-graph
            values[node].target = f"{read.target}.{node.target}"
    results: Any = torch.fx.node.map_arg(inner.graph.output_node().args[0], values.__getitem__)
    for user in list(of.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"%{user.name} reads the whole result of the sub-graph %{of.name}")
        user.replace_all_uses_with(results[user.args[1]])
        erase(user)
    erase(of)
    if not read.users:
        erase(read)


def _detach(gm: GraphModule, regions: dict[Node, Node | None]) -> None:
    """Detach what leaves each region, where a gradient could flow."""
    flows: set[Node] = set()
    for node in list(gm.graph.nodes):
        region = regions.get(node)
        if region is not None:
            _detach_written(node, region, regions, flows)
        if not (_begins(gm, node) or (_is_float(node) and not flows.isdisjoint(node.all_input_nodes))):
            continue
        if aten_name(node) == "detach":
            continue
        flows.add(node)
        readers = [user for user in node.users if regions.get(user) is not region]
        if region is not None and readers:
            detached = _detached(node.next, node)
            for user in readers:
                user.replace_input_with(node, detached)


def _detach_written(node: Node, region: Node, regions: dict[Node, Node | None], flows: set[Node]) -> None:
    """Let what a region writes into a tensor from outside be without a gradient."""
    for written in written_arguments(node):
        if regions.get(written) is region:
            continue
        if written in flows and written.op != "get_attr":
            raise CaptureError(
                f"%{node.name} changes %{written.name} in place without a gradient (torch.no_grad), and that has one; "
                "write the result into a new tensor"
            )
        for value in node.all_input_nodes:
            if value is not written and value in flows:
                node.replace_input_with(value, _detached(node, value))


def _detached(before: Node, node: Node) -> Node:
    return call(before, torch.ops.aten.detach.default, (node,), f"{node.name}_detached", like=node)


def _begins(gm: GraphModule, node: Node) -> bool:
    """Whether a gradient may flow to a node that reads no other: a Parameter, or an input of floats."""
    return isinstance(stored(gm, node), nn.Parameter) or (node.op == "placeholder" and _is_float(node))


def _is_float(node: Node) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves)
