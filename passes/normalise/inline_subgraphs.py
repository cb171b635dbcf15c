"""Put the nodes of a sub-graph in the place of its call."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.errors import CaptureError
from ti_fx.ir.checks import is_assertion
from ti_fx.ir.edit import erase, insert_copy
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED

# What torch.export makes of `with torch.no_grad():` and `with torch.autocast(...):`.
_WRAPPED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
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
             %call = wrap_with_set_grad_enabled(False, %submod, [%x])           %y = mul(%x, %sum_1)
             %item = getitem(%call, 0)
             %y = mul(%x, %item)

    1. a sub-graph's nodes come before its call, each where it was, and read what the call was given; torch.export's own
       assertions stay out, which need not hold outside the region (autocast gives other dtypes)
    2. who read one of its results reads the node that computes it
    3. a sub-graph may hold others, which are inlined in turn

    What is trained is decided after capture, so the region's own mode (no gradient) has no place in the graph.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Inline one after another, outer ones first.

        Raises:
            CaptureError: a sub-graph that is called in another way (``torch.cond``), or whose results are read whole.
        """
        calls = _calls(gm)
        while calls:
            for call in calls:
                _inline(gm, call)
            calls = _calls(gm)


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]


def _line(call: Node) -> str:
    """Return where the model calls it, if torch.export noted that."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(call.meta.get("stack_trace") or ""))
    own = [(Path(file).name, line) for file, line in frames if not file.startswith(("<", torch.__path__[0]))]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _inline(gm: GraphModule, call: Node) -> None:
    name = getattr(call.target, "__name__", str(call.target))
    if name not in _WRAPPED:
        raise CaptureError(
            f"%{call.name} calls torch's operator {name}{_line(call)}, whose sub-graphs have no place in one graph; "
            f"{_INSTEAD.get(name, 'make it tensor operations')}, or leave that part out of the model"
        )
    where, read = next(
        (index, node)
        for index, node in enumerate(call.args)
        if isinstance(node, Node) and node.op == "get_attr"
    )
    inner = gm.get_submodule(str(read.target))
    assert isinstance(inner, GraphModule)  # torch.export's own
    values: dict[Node, Any] = dict(
        zip(inner.graph.find_nodes(op="placeholder"), call.args[where + 1 :], strict=True)
    )
    for node in inner.graph.nodes:
        if node.op in ("placeholder", "output") or is_assertion(node):
            continue
        values[node] = insert_copy(call, node, values.__getitem__)
        if node.op == "get_attr":  # a sub-graph of the sub-graph
            values[node].target = f"{read.target}.{node.target}"
    results: Any = torch.fx.node.map_arg(inner.graph.output_node().args[0], values.__getitem__)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"%{user.name} reads the whole result of the sub-graph %{call.name}")
        user.replace_all_uses_with(results[user.args[1]])
        erase(user)
    erase(call)
    if not read.users:
        erase(read)
