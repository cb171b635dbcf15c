"""Drop what asserts in an exported program: torch.export's own assertions go, open checks of decisions stay."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import CaptureError, RandomnessError
from ti_fx.ir.checks import MARK, REFUSES, check_message, is_assertion, is_random
from ti_fx.ir.edit import aten_name, erase, tensor
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED

# Tests that come out alike for every sound set of weights.
FINITENESS = ("isfinite", "isinf", "isnan")


@dataclass(frozen=True)
class DropAssertions(Pass):
    """Nothing asserts but the checks of decisions that another input could fail.

    before:  %size = sym_size(%x, 0)                           after:  %y = relu(%x)
             %ge = ge(%size, 2)
             %assert = _assert_scalar(%ge, "size >= 2")
             %y = relu(%x)

    1. torch.export's own assertions: inputs are validated before the call instead
    2. a check of a decision (``ti_fx.ir.checks``) stays if inputs or buffers decide, and goes if only constants do; one
       that a weight or a random number decides is refused: training changes the one, and every run the other
    3. so does a check of the model's own, whatever decides it but constants

    What only an assertion read has no reader any more; it goes with everything else that is dead.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Erase them, last first.

        Raises:
            CaptureError: a weight decides what the model computes; names the line.
            RandomnessError: a random number does.
        """
        for node in reversed(list(gm.graph.nodes)):
            if is_assertion(node) or (check_message(node) is not None and not _varies(gm, node)):
                erase(node)


def _varies(gm: GraphModule, check: Node) -> bool:
    """Whether a decision depends on inputs or stored tensors."""
    sources = _value_sources(check)
    place = str(check_message(check)).removeprefix(MARK)
    stored = [source for source in sources if source.op == "get_attr"]
    own = str(check_message(check)).startswith(REFUSES)
    trained = not own and any(isinstance(tensor(gm, str(source.target)), nn.Parameter) for source in stored)
    if trained and not any(aten_name(source) in FINITENESS for source in sources):
        raise CaptureError(
            "data-dependent control flow by what the weights compute, which training changes: "
            f"{place.partition(', and')[0]}; make it a tensor operation, or leave that part out of the model"
        )
    if stored or any(source.op == "placeholder" for source in sources):
        return True
    if not own and any(is_random(source) for source in sources):
        raise RandomnessError(
            f"a random number decides in Python: {place.partition(', and')[0]}; turn that off"
        )
    return own and any(is_random(source) for source in sources)


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
        elif name == "sym_size":
            queue += _sized_by_values(node)
        elif not re.fullmatch("(full|ones|zeros|empty|rand|randn)_like|new_.*", name):
            queue += node.all_input_nodes
    return seen


def _sized_by_values(size: Node) -> list[Node]:
    """Return what a size depends on that values decide: how many distinct numbers there are, what a mask selects."""
    seen: set[Node] = set()
    queue = list(size.all_input_nodes)
    found = []
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += node.all_input_nodes
            if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
                found.append(node)
    return found
