"""The weight of a loss that training moves is a tensor of the graph: a buffer that a curve sets, or a Parameter.

What is scheduled is a buffer of one phase's graph: it follows from the step, and no file has it. What is learned is a
Parameter of every phase's, the logarithm of a variance; a checkpoint has it, and the student does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.ir import roles
from ti_fx.ir.edit import call, erase, get_attr, register, stored, tensor
from ti_fx.ir.outputs import PreparedResult, prepared_result
from ti_fx.numerics import losses
from ti_fx.numerics.precision import at_least_float32

WEIGHTS = "loss_weights"  # the submodule of what is scheduled
LEARNED = "losses"  # the submodule of what is learned


def weights(result: PreparedResult) -> dict[str, float | Node]:
    """Return each term's weight in a loss that is a weighted sum: a number, or the read of a buffer."""
    names = {node: name for name, node in result.losses.items()}
    if result.loss.target is not losses.weighted:
        return {}
    terms, each = result.loss.args
    found = {names.get(unlearned(term)): weight for term, weight in zip(terms, each, strict=True)}  # type: ignore[arg-type]
    return {} if None in found else found  # type: ignore[return-value]


def unlearned(term: Node) -> Node:
    """Return the loss that a learned variance divides; of any other, itself."""
    return term.all_input_nodes[0] if term.target is losses.learned else term


def number(weight: float | Node) -> float:
    """Return a term's weight as its recipe gives it."""
    return float(roles.fact(weight, "weight") if isinstance(weight, Node) else weight)


def schedule(gm: GraphModule, term: str) -> None:
    """Read a term's weight from a buffer, which begins with the weight that it is."""
    result = prepared_result(gm)
    assert result is not None
    own = weights(result)
    weight = own[term]
    if isinstance(weight, Node):
        return
    target = f"{WEIGHTS}.{term}"
    like = result.losses[term].meta["val"]
    register(gm, target, torch.tensor(weight, dtype=like.dtype, device=like.device), persistent=False)
    read = get_attr(result.loss, target, f"loss_{term}_weight", "loss")
    roles.record(read, weight=weight)
    _put(result.loss, {**own, term: read})


def unschedule(gm: GraphModule, term: str) -> None:
    """Weigh a term by its number again."""
    result = prepared_result(gm)
    assert result is not None
    own = weights(result)
    read = own[term]
    if isinstance(read, Node):
        _put(result.loss, {**own, term: number(read)})
        erase(read)
        _drop(gm, WEIGHTS, term)


def _put(loss: Node, own: Mapping[str, float | Node]) -> None:
    loss.args = (loss.args[0], list(own.values()))


def scheduled(gm: GraphModule) -> dict[str, Node]:
    """Return the reads of the weights that are scheduled, by term."""
    result = prepared_result(gm)
    own = {} if result is None else weights(result)
    return {term: weight for term, weight in own.items() if isinstance(weight, Node)}


def set_weights(gm: GraphModule, shares: Mapping[str, float]) -> dict[str, float]:
    """Write such a share of each term's own weight, in place; return the weights."""
    found = {}
    for term, read in scheduled(gm).items():
        found[term] = number(read) * shares[term]
        tensor(gm, str(read.target)).fill_(found[term])
    return found


def learn(gm: GraphModule, term: str, loss: Node, before: Node, like: Tensor) -> Node:
    """Divide a loss by a variance that is learned, from 1 on, or from where it was; return what is added up.

    Args:
        gm: the graph.
        term: the loss's name.
        loss: the node.
        before: the node that follows.
        like: a value that is compared, for dtype and device.
    """
    target = f"{LEARNED}.{term}.log_variance"
    if _is_missing(gm, target):
        zero = torch.zeros((), dtype=at_least_float32(like.new_empty(0)).dtype, device=like.device)
        register(gm, target, nn.Parameter(zero))
    read = get_attr(before, target, f"loss_{term}_log_variance", "loss")
    return call(before, losses.learned, (loss, read), f"loss_{term}_learned", "loss")


def log_variances(gm: GraphModule) -> dict[str, Node]:
    """Return the reads of the logarithms of variances that are learned, by term."""
    return {
        str(node.target).removeprefix(f"{LEARNED}.").removesuffix(".log_variance"): node
        for node in gm.graph.find_nodes(op="get_attr")
        if roles.role(node) == "loss" and str(node.target).endswith(".log_variance")
    }


def forget(gm: GraphModule, term: str) -> None:
    """Drop a variance that is learned no more."""
    _drop(gm, LEARNED, term)


def _is_missing(gm: GraphModule, target: str) -> bool:
    try:
        tensor(gm, target)
    except AttributeError:
        return True
    return False


def _drop(gm: GraphModule, group: str, name: str) -> None:
    """Drop a tensor or module of a submodule, which a fork may share and then keeps."""
    own = copy.copy(gm.get_submodule(group))
    own._buffers = {key: value for key, value in own._buffers.items() if key != name}
    own._modules = {key: value for key, value in own._modules.items() if key != name}
    gm._modules[group] = own
    if not (own._buffers or own._modules or own._parameters):
        del gm._modules[group]


def broken(gm: GraphModule) -> Iterator[str]:
    """Yield what a loss reads for its weight or variance and must not."""
    for term, read in scheduled(gm).items():
        value = stored(gm, read)
        if read.target != f"{WEIGHTS}.{term}" or value is None or value.requires_grad:
            yield f"%{read.name} is read for the weight of {term}; it must be {WEIGHTS}.{term}, which nothing trains"
    for node in gm.graph.find_nodes(op="call_function", target=losses.learned):
        read = node.args[1]
        value = stored(gm, read) if isinstance(read, Node) else None
        if not isinstance(value, nn.Parameter) or not value.requires_grad:
            yield f"%{node.name} is learned and reads no Parameter that is trained for its variance"
