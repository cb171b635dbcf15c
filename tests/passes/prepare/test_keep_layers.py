"""Students of fewer layers: the same as the model without them, compared by the map, trained and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model, gpt2_model, llama_model, t5_model, text_example, tokens, vit_model
from tiny_training import different, rows, trainer, weights
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import PreconditionError, SelectionError, TiFxError
from ti_fx.export import Runtime, to_onnx
from ti_fx.find.attention import streams
from ti_fx.ir import roles
from ti_fx.ir.facts import facts
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, KeepLayers, Pack, Strip
from ti_fx.passes.prepare.keep_layers import spread

TEXT = text_example()
IMAGE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


class Kind:
    """A kind of model, its inputs, its lists of layers, and the layers that are kept."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        example: dict[str, Tensor],
        lists: tuple[str, ...],
        keep: tuple[int, ...],
    ) -> None:
        self.make, self.example, self.lists, self.keep = make, example, lists, keep

    def shorter(self) -> nn.Module:
        """The model with those layers alone."""
        model = self.make()
        for path in self.lists:
            owner, _, name = path.rpartition(".")
            layers = getattr(model.get_submodule(owner), name)
            setattr(model.get_submodule(owner), name, nn.ModuleList(layers[number] for number in self.keep))
        return model.eval()

    def graph(self) -> GraphModule:
        return ti_fx.capture(self.make(), self.example)


KINDS = {
    "bert": Kind(lambda: bert_model(4), TEXT, ("bert.encoder.layer",), (1, 3)),
    "bert, last dropped": Kind(lambda: bert_model(3), TEXT, ("bert.encoder.layer",), (0,)),
    "gpt2": Kind(lambda: gpt2_model(n_layer=4), TEXT, ("transformer.h",), (1, 2)),
    "llama": Kind(lambda: llama_model(num_hidden_layers=3), TEXT, ("model.layers",), (0, 2)),
    "vit": Kind(lambda: vit_model(num_hidden_layers=4), IMAGE, ("vit.layers",), (1, 3)),
    "t5": Kind(
        lambda: t5_model(num_layers=3),
        {**TEXT, "decoder_input_ids": tokens(3, 5)},
        ("encoder.block", "decoder.block"),
        (0, 2),
    ),
}
SLOW = {"bert", "bert, last dropped", "gpt2", "llama", "t5"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS]
)
def test_the_student_is_the_model_without_the_others(name: str) -> None:
    kind = KINDS[name]
    gm = kind.graph()
    alone = ti_fx.fork(gm)
    keep = KeepLayers(layers=kind.keep)
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    before = gm.eval()(**kind.example).logits
    report = ti_fx.Pipeline(keep)(gm)
    assert "are the model's " + ", ".join(map(str, kind.keep)) in report.passes[0].explanation
    assert not ti_fx.Pipeline(keep)(gm).changed
    wanted = kind.shorter()(**kind.example).logits
    torch.testing.assert_close(gm(**kind.example).logits, wanted)
    assert not torch.allclose(before, wanted)
    for site in ti_fx.find_attention(gm):  # numbered anew, as the student has them
        assert roles.is_student(site.context)
        assert site.layer < len(kind.keep)
    assert all(layer.down.name for layer in ti_fx.find_feed_forward(gm) if roles.is_student(layer.down))

    ti_fx.Pipeline(Distill())(gm)
    teacher = roles.twin_of(gm.graph)
    compared = list(streams(gm, ti_fx.find_attention(gm)).values())
    for stream in compared:
        assert len(stream) == len(kind.keep) + 1
        assert all(node in teacher for node in stream)
    count = sum(map(len, compared))
    found = [node for node in gm.graph.nodes if node.name.startswith("loss_layer_outputs_")]
    assert len(found) == count
    ti_fx.Pipeline(Intervene("layer+ffn+map"))(gm)
    ti_fx.Pipeline(Intervene(), Strip())(gm)
    torch.testing.assert_close(gm(**kind.example).logits, wanted)
    ti_fx.Pipeline(keep)(alone)  # without a teacher
    assert set(gm.state_dict()) == set(alone.state_dict())
    torch.testing.assert_close(alone.eval()(**kind.example).logits, wanted)


@pytest.mark.slow
def test_the_losses_compare_by_the_map() -> None:
    """The stream behind each kept layer with the teacher's behind that layer; weights of others are gone."""
    gm = KINDS["bert"].graph()
    gm.eval()
    Recipe.preset("xtc").prepare(gm)
    assert facts(gm).layer_map == {0: (1, 3)}
    assert not [name for name in gm.state_dict() if name.startswith("bert.encoder.layer.0.")]
    assert "teacher.bert.encoder.layer.0.output.dense.weight" in gm.state_dict()
    first, second, third = streams(gm, ti_fx.find_attention(gm))[0]
    teacher = roles.twin_of(gm.graph)
    model: Any = bert_model(4)
    model.eval()
    hidden = model(**TEXT, output_hidden_states=True).hidden_states
    found: dict[str, Tensor] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = value = super().run_node(n)
            return value

    Record(gm).run(*(TEXT[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")))
    for node, index in ((first, 0), (second, 2), (third, 4)):
        torch.testing.assert_close(found[teacher[node].name], hidden[index])
    Recipe.preset("xtc").prepare(gm)  # again: nothing is left out twice
    assert facts(gm).layer_map == {0: (1, 3)}
    Recipe.preset("xtc").prepare(gm, teacher=bert_model(4))


def test_evenly_spread() -> None:
    assert spread(12, 0.5) == (1, 3, 5, 7, 9, 11)
    assert spread(5, 0.5) == (1, 4)
    assert spread(1, 0.5) == (0,)
    assert spread(4, 1.0) == (0, 1, 2, 3)
    for one in (KeepLayers(), KeepLayers(share=0.25), KeepLayers(layers=(0, 2), stack=1)):
        assert ti_fx.Pass.parse(str(one)) == one


def test_what_can_not_be_is_refused_in_one_line() -> None:
    plain = KINDS["llama"].graph()
    hidden = ti_fx.capture(bert_model(2), {**TEXT, "output_hidden_states": True})
    flat = ti_fx.capture(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    after = ti_fx.fork(plain)
    ti_fx.Pipeline(DuplicateTeacher(), Distill())(after)
    once = ti_fx.fork(plain)
    ti_fx.Pipeline(KeepLayers())(once)
    cases: list[tuple[GraphModule, KeepLayers, type[TiFxError], str]] = [
        (plain, KeepLayers(layers=(0, 7)), SelectionError, "stack 0 has layers 0 to 2; keep at least one"),
        (plain, KeepLayers(layers=()), SelectionError, "keep at least one"),
        (plain, KeepLayers(stack=3), SelectionError, "there is no stack 3"),
        (plain, KeepLayers(share=0.0), SelectionError, "give a number above 0"),
        (
            hidden,
            KeepLayers(layers=(1,)),
            PreconditionError,
            "the model returns what stack 0, layer 0 leaves",
        ),
        (flat, KeepLayers(), PreconditionError, "finds no attention block"),
        (after, KeepLayers(), PreconditionError, "comes before distill"),
        (once, KeepLayers(share=0.3), PreconditionError, "left out by keep-layers already"),
    ]
    for gm, one, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            ti_fx.Pipeline(one)(gm)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_layer_whose_maps_are_returned_stays() -> None:
    gm = ti_fx.capture(bert_model(2, attn_implementation="eager"), {**TEXT, "output_attentions": True})
    with pytest.raises(PreconditionError, match=r"the model returns %\w+ of stack 0, layer 0"):
        ti_fx.Pipeline(KeepLayers(layers=(1,)))(gm)


@pytest.mark.slow
def test_a_shallow_student_is_resumed_loaded_and_exported(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    made = trainer(tmp_path, "xtc", model=bert_model(4), arguments_options=options, eval_dataset=rows(4))
    made.train()
    made.evaluate()
    again = trainer(tmp_path / "on", "xtc", model=bert_model(4), arguments_options={"max_steps": 4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert different(weights(made), weights(again)) == []
    student = ti_fx.load(tmp_path / "checkpoint-4", bert_model(4))
    assert len(ti_fx.find_attention(student)) == 2
    ti_fx.Pipeline(Pack())(student)
    to_onnx(student, tmp_path / "student.onnx", made.example)
    Runtime(tmp_path / "student.onnx")
