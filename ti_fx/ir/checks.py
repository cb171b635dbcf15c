"""A check is a node that refuses inputs: those by which the model would decide otherwise, and those it refuses."""

from __future__ import annotations

import torch
from torch.fx import Node

from ti_fx.ir.edit import aten_name

# What every check's message begins with: torch.export's own assertions are dropped, these are not.
MARK = "ti_fx: "
# ... and that of a check of the model's own.
REFUSES = f"{MARK}the model refuses these inputs: "


ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
)
RANDOM_OPS = frozenset(
    (
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "normal",
        "uniform_",
        "normal_",
    )
)


def check_message(node: Node) -> str | None:
    """Return what a check says when it fails, of a decision or the model's own; None for any other node."""
    if aten_name(node) == "_assert_async" and len(node.args) == 2 and str(node.args[1]).startswith(MARK):
        return str(node.args[1])
    return None


def is_assertion(node: Node) -> bool:
    """Whether a node is an assertion of torch.export's own, which no check is."""
    asserts = aten_name(node) in ASSERTIONS or node.target is torch._check
    return asserts and check_message(node) is None


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers in every mode."""
    return aten_name(node) in RANDOM_OPS
