"""Weights are phased in: a buffer of the graph holds the share of their quantised values that they are read by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.ir.edit import call, erase, get_attr, register, replace_input, stored, tensor
from ti_fx.ir.inserted import quantised_weights, weight_quantiser_of

SHARE = "phase_in.share"  # one for all weights: it follows from the step, and no file has it


def is_phase_in(node: Node) -> bool:
    """Whether a node gives a weight of which a share is quantised."""
    return node.op == "call_function" and node.target is numerics.phase_in


def phase_in(gm: GraphModule) -> None:
    """Let readers of each quantiser read ``latent + share · (quantised - latent)``; the share is 1 until it moves."""
    left = [node for node in quantised_weights(gm) if not any(map(is_phase_in, node.users))]
    if not left:
        return
    read = next((node for node in gm.graph.find_nodes(op="get_attr") if node.target == SHARE), None)
    if read is None:
        first = left[0].meta["val"]
        dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
        register(gm, SHARE, torch.ones((), dtype=dtype, device=first.device), persistent=False)
        read = get_attr(left[0], SHARE, "phase_in_share", "student")
    for quantiser in left:
        weight, readers = quantiser.args[0], list(quantiser.users)
        assert isinstance(weight, Node)
        arguments = (weight, quantiser, read)
        made = call(
            quantiser.next, numerics.phase_in, arguments, f"{weight.name}_in", "student", like=quantiser
        )
        for reader in readers:
            replace_input(reader, quantiser, made)


def undo(gm: GraphModule) -> None:
    """Let readers read the quantised weights alone again."""
    for node in [node for node in gm.graph.nodes if is_phase_in(node)]:
        quantised = node.args[1]
        assert isinstance(quantised, Node)
        node.replace_all_uses_with(quantised)
        erase(node)
    for node in [node for node in gm.graph.find_nodes(op="get_attr") if node.target == SHARE]:
        erase(node)
        del gm._modules[SHARE.partition(".")[0]]


def set_share(gm: GraphModule, share: float) -> None:
    """Write how much of each weight is quantised, in place."""
    tensor(gm, SHARE).fill_(share)


def broken(gm: GraphModule) -> Iterator[str]:
    """Yield what does not read a weight, its quantiser and the share, or reads a quantiser beside it."""
    for node in gm.graph.nodes:
        if not is_phase_in(node):
            continue
        latent, quantised, share = node.args
        if (
            not isinstance(quantised, Node)
            or weight_quantiser_of(quantised) is None
            or quantised.args[0] is not latent
        ):
            yield f"%{node.name} must read a weight and that weight's quantiser"
            continue
        value = stored(gm, share) if isinstance(share, Node) and share.target == SHARE else None
        if value is None or value.requires_grad:
            yield f"%{node.name} takes %{share} for its share; it must be {SHARE}, which nothing trains"
        beside = [user.name for user in quantised.users if user is not node]
        if beside:
            yield f"%{beside[0]} reads %{quantised.name} beside %{node.name}, which phases it in"
