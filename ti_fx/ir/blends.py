"""The share of each blended site is a buffer of the graph: how much of the teacher's value its readers read, 0 to 1.

A tap that is blended records by what it is blended and where it is; the buffer is named after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.ir import leaves, roles
from ti_fx.ir.edit import stored

SHARES = "blend"  # the submodule that holds the buffers


@dataclass(frozen=True)
class Share:
    """How much of the teacher's value is read at one site.

    Attributes:
        tap: the name of the student's own value.
        point: where it is: ``layer``.
        stack, layer: of the site; -1 where it belongs to none.
        value: the share, [], floating: write into it, and the next call reads it.
    """

    tap: str
    point: str
    stack: int
    layer: int
    value: Tensor


def share_name(tap: str) -> str:
    """Return the name of the buffer that holds a tap's share."""
    return f"{SHARES}.{tap}"


def shares(gm: GraphModule) -> list[Share]:
    """Return the share of every blended site, in graph order."""
    return list(_shares(gm))


def _shares(gm: GraphModule) -> Iterator[Share]:
    for node in gm.graph.nodes:
        if roles.fact(node, "blended") is None:
            continue
        stack, layer, _ = roles.fact(node, "place")
        value = gm.get_buffer(share_name(node.name))
        yield Share(node.name, roles.fact(node, "intervened"), stack, layer, value)


def set_shares(gm: GraphModule, values: Mapping[str, float]) -> None:
    """Write the shares of some sites, by the tap's name, in place: what runs the graph reads them in its next call.

    Raises:
        KeyError: no such site is blended.
    """
    known = {share.tap: share for share in _shares(gm)}
    for tap, value in values.items():
        known[tap].value.fill_(value)


def add_share(gm: GraphModule, tap: Node, value: Tensor | None = None) -> str:
    """Give a tap a share of 1, or the one that is given; return the buffer's name.

    It is no part of ``state_dict()``: it follows from the step of training, and no file of a student has it.
    """
    if value is None:
        like = tap.meta["val"]
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        value = torch.ones((), dtype=dtype, device=like.device)
    _own(gm).register_buffer(tap.name, value, persistent=False)
    return share_name(tap.name)


def add_draws(gm: GraphModule, tap: Node, each: str, heads: bool) -> str:
    """Give a tap a module that draws which rows or tokens read the teacher; return its name."""
    leaf = leaves.DrawnShare(each, heads)
    leaf.train(gm.training)
    _own(gm).add_module(f"{tap.name}_drawn", leaf)
    return f"{share_name(tap.name)}_drawn"


def drop_share(gm: GraphModule, tap: str) -> None:
    """Forget a tap's share and draws."""
    own = _own(gm)
    own._buffers.pop(tap, None)
    own._modules.pop(f"{tap}_drawn", None)
    if not (own._buffers or own._modules or own._parameters):
        del gm._modules[SHARES]


def _own(gm: GraphModule) -> nn.Module:
    """Return the module of the shares with lists of its own: a fork may share the one before, and keeps it."""
    held = gm._modules.get(SHARES)
    own = nn.Module() if held is None else copy.copy(held)
    own._buffers, own._modules = dict(own._buffers), dict(own._modules)
    own._non_persistent_buffers_set = set(own._non_persistent_buffers_set)
    gm._modules[SHARES] = own
    return own


def is_share_of(gm: GraphModule, node: object, tap: Node) -> bool:
    """Whether a node reads a tap's share, a buffer that nothing trains."""
    if not isinstance(node, Node) or node.target != share_name(tap.name):
        return False
    value = stored(gm, node)
    return value is not None and not isinstance(value, nn.Parameter) and not value.requires_grad


def is_drawn_from(gm: GraphModule, node: object, tap: Node) -> bool:
    """Whether a node reads a tap's share, or draws by it which rows or tokens read the teacher."""
    if isinstance(node, Node) and node.op == "call_module":
        draws = isinstance(gm.get_submodule(str(node.target)), leaves.DrawnShare)
        return draws and len(node.args) == 2 and node.args[0] is tap and is_share_of(gm, node.args[1], tap)
    return is_share_of(gm, node, tap)
