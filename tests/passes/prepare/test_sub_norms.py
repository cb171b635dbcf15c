"""The student's own norms: the formula, what they stand for, training, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Tiny, bert_model, llama_model, text_example
from tiny_training import different, rows, trainer, weights

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import ExportError, PreconditionError
from ti_fx.export import with_cache
from ti_fx.ir.edit import tensor
from ti_fx.passes import (
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    SubNorms,
    Ternarize,
)
from ti_fx.passes.prepare.sub_norms import SUB_NORMS

NORMED = (
    "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.mlp.down_proj",
)


def test_a_projection_reads_what_is_normalised(llama: Tiny) -> None:
    """Against the model itself, with norms before the same linear layers."""
    gm, model = llama.fork().eval(), llama.model.eval()
    ti_fx.Pipeline(DuplicateTeacher(), SubNorms(epsilon=1e-5))(gm)
    generator = torch.Generator().manual_seed(4)
    handles = []
    for index in range(2):
        for path in NORMED:
            path = path.format(index)
            weight = tensor(gm, f"{SUB_NORMS}{path}.weight")
            with torch.no_grad():
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            norm = torch.nn.RMSNorm(len(weight), eps=1e-5)
            norm.weight = torch.nn.Parameter(weight.detach())
            handles.append(
                model.get_submodule(path).register_forward_pre_hook(
                    lambda _, inputs, norm=norm: (norm(inputs[0]),)
                )
            )
    wanted = model(**llama.example).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(gm(**llama.example).logits, wanted)
    assert len([name for name, _ in gm.named_parameters() if name.startswith(SUB_NORMS)]) == 4


def test_it_runs_once_in_any_order_and_follows_its_option(llama: Tiny) -> None:
    first, last = llama.fork(), llama.fork()
    ti_fx.Pipeline(DuplicateTeacher(), SubNorms(), Ternarize(), QuantizeActivations(), Distill())(first)
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill(), SubNorms())(last)
    assert not ti_fx.Pipeline(SubNorms())(last).changed
    assert ti_fx.Pass.parse("sub-norms{epsilon=0.5}") == SubNorms(0.5)
    one, other = first.eval()(**llama.example), last.eval()(**llama.example)
    assert torch.equal(one["loss"], other["loss"])
    ti_fx.Pipeline(SubNorms(epsilon=1.0))(last)
    assert not torch.equal(one["loss"], last(**llama.example)["loss"])
    ti_fx.Pipeline(SubNorms())(last)
    assert torch.equal(one["loss"], last(**llama.example)["loss"])
    ti_fx.Pipeline(Intervene("layer+map+output+ffn"))(last)
    ti_fx.Pipeline(Intervene(), Strip(), Pack())(last)
    assert len(ti_fx.find_attention(last)) == len(ti_fx.find_feed_forward(last)) == 2


def test_what_can_not_be_is_refused_in_one_line(llama: Tiny) -> None:
    flat = ti_fx.capture(torch.nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    with pytest.raises(PreconditionError, match="finds no attention or feed-forward block"):
        ti_fx.Pipeline(SubNorms())(flat)
    gm = llama.fork()
    ti_fx.Pipeline(DuplicateTeacher(), Intervene("map"))(gm)
    with pytest.raises(PreconditionError, match="comes before an intervention"):
        ti_fx.Pipeline(SubNorms())(gm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitdistill", "xtc"])
def test_a_cached_graph_of_another_student_is_refused(name: str, llama: Tiny) -> None:
    gm = llama.fork()
    Recipe.preset(name).prepare(gm)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    with pytest.raises(ExportError, match="export it without a cache") as caught:
        with_cache(gm, llama_model(), {"input_ids": text_example()["input_ids"]})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_norms_are_trained_and_kept(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    made = trainer(
        tmp_path, "bitdistill", model=bert_model(1), arguments_options=options, eval_dataset=rows(4)
    )
    made.train()
    made.evaluate()
    norms = {name: value for name, value in weights(made).items() if name.startswith(SUB_NORMS)}
    assert len(norms) == 2
    assert all(bool((value != 1).any()) for value in norms.values())
    again = trainer(tmp_path / "on", "bitdistill", model=bert_model(1), arguments_options={"max_steps": 4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert different(weights(made), weights(again)) == []
    student = ti_fx.load(tmp_path / "checkpoint-4", bert_model(1))
    for name, value in norms.items():
        assert torch.equal(tensor(student, name), value)
