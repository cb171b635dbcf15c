"""What a pass, find_attention, verify, dump or diff reads of the nodes grows exactly as the number of layers does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from models import bert_model, llama_model, t5_model, text_example, tokens
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx.passes import (
    Canonicalize,
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)

pytestmark = pytest.mark.seconds

LAYERS = (2, 3, 4)  # exact counts: what is not linear shows at any three
MODELS: dict[str, Callable[[int], torch.nn.Module]] = {
    "bert": bert_model,
    "llama": lambda layers: llama_model(num_hidden_layers=layers),
    "t5": lambda layers: t5_model(num_layers=layers),
}
PASSES = (
    Canonicalize(),
    DecomposeAttention(),
    DuplicateTeacher(),
    Ternarize(),
    QuantizeActivations(attention=True),
    Distill(),
    Intervene(at="map"),
    Intervene(at="context"),
    Intervene(at="output"),
    Intervene(),
)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count every read of an attribute of any node: nobody looks at a node without one."""
    count = [0]
    read = Node.__getattribute__

    def counting(node: Node, name: str) -> Any:
        count[0] += 1
        return read(node, name)

    with monkeypatch.context() as patch:
        patch.setattr(Node, "__getattribute__", counting)
        yield count


def steps(gm: GraphModule) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each step by name, on the graph as the steps before left it."""
    before = ti_fx.fork(gm)
    for one in PASSES:
        yield str(one), partial(ti_fx.Pipeline(one), gm)
    yield "find_attention", lambda: ti_fx.find_attention(gm)
    yield "verify", lambda: ti_fx.verify(gm)
    yield "dump", lambda: ti_fx.dump(gm)
    yield "diff", lambda: ti_fx.diff(before, gm)
    yield "fork", lambda: ti_fx.fork(gm)
    yield "strip", lambda: ti_fx.Pipeline(Strip())(gm)
    yield "pack", lambda: ti_fx.Pipeline(Pack())(gm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_node_visits_are_linear_in_the_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visits: dict[str, list[int]] = {}
    for layers in LAYERS:
        example = text_example()
        if name == "t5":
            example["decoder_input_ids"] = tokens(3, 5)
        gm = ti_fx.capture(MODELS[name](layers), example)
        for step, run in steps(gm):
            with counted(monkeypatch) as count:
                run()
            visits.setdefault(step, []).append(count[0])
    for step, (few, more, most) in visits.items():
        assert few > 0, step
        assert most - more == more - few, f"{step}: {few}, {more}, {most} visits at {LAYERS} layers"


def test_a_difference_is_the_edit_script_between_two_texts() -> None:
    random = Random(0)
    for _ in range(50):
        old = [random.choice("abcdefgh") for _ in range(random.randrange(12))]
        new = [random.choice("abcdefgh") for _ in range(random.randrange(12))]
        change = ti_fx.diff("\n".join(old), "\n".join(new), context=100).splitlines()[1:]
        assert (old == new) == (not change)
        if change:
            assert [line[1:] for line in change if line[0] in " -"] == old
            assert [line[1:] for line in change if line[0] in " +"] == new
