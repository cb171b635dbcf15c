"""A checkpoint's graph is made again as it was made: from a captured graph, through passes of one's own, or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import bert_model
from tiny_training import arguments, batch, rows
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import ti_fx
from ti_fx import Pass, Pipeline, Recipe
from ti_fx.errors import CheckpointError
from ti_fx.ir import roles
from ti_fx.ir.edit import call, get_attr, register
from ti_fx.passes import QuantizeActivations
from ti_fx.train import TernaryTrainer

aten = torch.ops.aten
PLAIN = Recipe("plain")


@dataclass(frozen=True)
class LearntGain(Pass):
    """The pooler's tanh is multiplied by a number that is trained; a teacher there is does not follow."""

    start: float = 1.0

    def apply(self, gm: GraphModule) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=aten.tanh.default):
            if not roles.is_student(node):
                continue
            register(gm, "gain", nn.Parameter(torch.tensor(self.start)))
            gain = get_attr(node.next, "gain", "gain", "student", like=node)
            louder = call(gain.next, aten.mul.Tensor, (node, gain), "louder", "student", like=node)
            for user in [user for user in node.users if user is not louder]:
                user.replace_input_with(node, louder)
            ti_fx.stands_for(louder, node)


class Relu(PassBase):
    """A pass of torch.fx alone: GELU becomes ReLU, everywhere."""

    def call(self, graph_module: GraphModule) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.gelu.default):
            node.target = aten.relu.default
        return PassResult(graph_module, True)


def trained(folder: Path, model: nn.Module, recipe: Recipe = PLAIN) -> tuple[Path, torch.Tensor]:
    """Train for a step and save; return the checkpoint and the student's logits."""
    made = TernaryTrainer(
        model, recipe, arguments(folder, max_steps=1, warmup_steps=0), train_dataset=rows(8), compile="off"
    )
    made.train()
    made.save_model(str(folder / "saved"))
    return folder / "saved", made.student()(**batch()).logits


def same(loaded: GraphModule, logits: torch.Tensor) -> None:
    assert torch.equal(loaded(**batch()).logits, logits)


def graph() -> GraphModule:
    """With other options, and on another example, than the trainer would capture the model."""
    example = {**batch(3), "output_hidden_states": True}
    return ti_fx.capture(bert_model(layers=1), example, dynamic="batch")


def test_from_a_captured_graph(tmp_path: Path) -> None:
    saved, logits = trained(tmp_path, graph())
    same(ti_fx.load(saved, bert_model(layers=1)), logits)
    same(ti_fx.load(saved, graph()), logits)


@pytest.mark.slow
def test_with_steps_that_activations_learn(tmp_path: Path) -> None:
    """Which the model lacks, and the passes make again."""
    recipe = Recipe("learned", activations=QuantizeActivations("int4-learned"))
    saved, logits = trained(tmp_path, bert_model(layers=1), recipe)
    loaded = ti_fx.load(saved, bert_model(layers=1))
    same(loaded, logits)
    assert [name for name, _ in loaded.named_parameters() if name.startswith("activation_quant.")]


@pytest.mark.slow
def test_through_a_pass_before_preparation(tmp_path: Path) -> None:
    own = graph()
    Pipeline(LearntGain())(own)
    saved, logits = trained(tmp_path, own)
    assert json.loads((saved / "ti_fx.json").read_text())["made"]["passes"] == ["learnt-gain", "recipe"]
    same(ti_fx.load(saved, bert_model(layers=1)), logits)
    same(ti_fx.load(saved, graph()), logits)
    again = graph()
    Pipeline(LearntGain())(again)
    same(ti_fx.load(saved, again), logits)
    other = graph()
    Pipeline(LearntGain(2.0))(other)
    with pytest.raises(
        CheckpointError, match=r"went through learnt-gain\{start=2.0\}, the checkpoint's through"
    ):
        ti_fx.load(saved, other)


@pytest.mark.slow
def test_through_a_pass_after_preparation(tmp_path: Path) -> None:
    own = graph()
    PLAIN.prepare(own)
    Pipeline(LearntGain())(own)
    saved, logits = trained(tmp_path, own)
    same(ti_fx.load(saved, bert_model(layers=1)), logits)


@pytest.mark.slow
def test_through_an_extra_pass_of_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe("own", extra_passes=(LearntGain(),))
    saved, logits = trained(tmp_path, bert_model(layers=1), recipe)
    same(ti_fx.load(saved), logits)
    description = saved / "ti_fx.json"
    unknown = description.read_text().replace("learnt-gain", "unlearnt-gain")
    description.write_text(unknown)
    with pytest.raises(
        CheckpointError, match=r"no pass is called 'unlearnt-gain'.* import the module"
    ) as caught:
        ti_fx.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_through_a_pass_of_torch_fx(tmp_path: Path) -> None:
    own = graph()
    Pipeline(Relu())(own)
    saved, logits = trained(tmp_path, own)
    with pytest.raises(
        CheckpointError, match=r"went through the pass .*Relu, .*give model= a captured graph"
    ):
        ti_fx.load(saved, bert_model(layers=1))
    again = graph()
    Pipeline(Relu())(again)
    same(ti_fx.load(saved, again), logits)


@pytest.mark.slow
def test_edited_without_a_pass(tmp_path: Path) -> None:
    own = graph()
    for node in own.graph.find_nodes(op="call_function", target=aten.gelu.default):
        node.target = aten.relu.default
    own.recompile()
    saved, _ = trained(tmp_path, own)
    with pytest.raises(
        CheckpointError, match="is another graph now, though the versions are those"
    ) as caught:
        ti_fx.load(saved, bert_model(layers=1))
    assert "use the versions" not in str(caught.value)


@pytest.mark.slow
def test_what_was_saved_before_this_was_said(tmp_path: Path) -> None:
    saved, logits = trained(tmp_path, bert_model(layers=1))
    description = saved / "ti_fx.json"
    facts = json.loads(description.read_text())
    del facts["made"]
    description.write_text(json.dumps(facts))
    same(ti_fx.load(saved), logits)
