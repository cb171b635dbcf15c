"""This step removes torch.export's own assertions and keeps the checks of what the model decided by values."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import CaptureError, RandomnessError
from ti_fx.ir.checks import MARK, check_message, is_random
from ti_fx.ir.edit import aten_name, erase, tensor

ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
)
# Tests that come out alike for every sound set of weights.
FINITENESS = ("isfinite", "isinf", "isnan")


def drop_assertions(gm: GraphModule) -> None:
    """Drop torch.export's assertions, and those of our checks that only constants decide.

    Raises:
        CaptureError: a weight decides, or a random number; training changes the one, and every run the other.
    """
    for node in reversed(list(gm.graph.nodes)):
        asserts = aten_name(node) in ASSERTIONS or node.target is torch._check
        if asserts and not (check_message(node) and _varies(gm, node)):
            erase(node)


def _varies(gm: GraphModule, check: Node) -> bool:
    """Whether a decision depends on inputs or stored tensors."""
    sources = _value_sources(check)
    place = str(check_message(check)).removeprefix(MARK)
    stored = [source for source in sources if source.op == "get_attr"]
    trained = any(isinstance(tensor(gm, str(source.target)), nn.Parameter) for source in stored)
    if trained and not any(aten_name(source) in FINITENESS for source in sources):
        raise CaptureError(
            "data-dependent control flow by what the weights compute, which training changes: "
            f"{place.partition(', and')[0]}; make it a tensor operation, or leave that part out of the model"
        )
    if stored or any(source.op == "placeholder" for source in sources):
        return True
    if any(is_random(source) for source in sources):
        raise RandomnessError(
            f"a random number decides in Python: {place.partition(', and')[0]}; turn that off"
        )
    return False


def _value_sources(check: Node) -> set[Node]:
    """Return what a decision's value depends on: past what only lends its shape."""
    seen: set[Node] = set()
    queue = list(check.all_input_nodes)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        name = aten_name(node)
        if re.fullmatch("expand_as|view_as|type_as", name):
            queue += node.all_input_nodes[:1]
        elif not re.fullmatch("(full|ones|zeros|empty|rand|randn)_like|new_.*|sym_size", name):
            queue += node.all_input_nodes
    return seen
