"""Layer-wise errors against Hugging Face's own hidden states, and the fate of every weight against what Pack stores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Tiny, prepared, text_example
from torch import Tensor
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.analysis import layer_errors, stored_weights
from ti_fx.errors import InputError, SelectionError
from ti_fx.passes import DuplicateTeacher, Intervene, Pack, Strip, Ternarize


def eager_values(model: Any, example: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    model = model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**example, output_attentions=True, output_hidden_states=True)
    return out.attentions, out.hidden_states


def test_errors_are_those_of_the_models_own_values(bert: Tiny) -> None:
    gm = bert.fork()
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize())(gm)
    found = {(row.layer, row.point): row.relative_error for row in layer_errors(gm, bert.example)}
    student = copy.deepcopy(bert.model)
    for name, parameter in student.named_parameters():
        quantised = parameter.dim() == 2 and "classifier" not in name and "_embeddings" not in name
        if quantised or "word_embeddings" in name:
            granularity: Any = "row" if "word_embeddings" in name else "tensor"
            parameter.data = numerics.ternary(parameter.data, granularity)
    ours = eager_values(student, bert.example)
    theirs = eager_values(copy.deepcopy(bert.model), bert.example)
    for layer in (0, 1):
        for point, index, place in (("map", layer, 0), ("layer output", layer + 1, 1)):
            gap = (ours[place][index] - theirs[place][index]).norm() / theirs[place][index].norm()
            # float32 sums in another order
            assert found[layer, point] == pytest.approx(gap.item(), rel=1e-4)


def test_rows_come_by_layer_and_point(t5: Tiny) -> None:
    rows = layer_errors(prepared(t5), t5.example)
    assert [(row.kind, row.point) for row in rows if row.stack == 1 and row.layer == 1] == [
        *(("self", point) for point in ("map", "context", "output")),
        *(("cross", point) for point in ("map", "context", "output")),
        ("layer", "layer output"),
    ]


def test_interventions_do_not_change_the_errors(prepared_bert: GraphModule) -> None:
    expected = layer_errors(prepared_bert, text_example())
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene(at="output"))(gm)
    before = ti_fx.dump(gm)
    assert layer_errors(gm, text_example()) == expected
    assert ti_fx.dump(gm) == before


def test_a_packed_student_is_compared_with_a_reference(bert: Tiny) -> None:
    gm = prepared(bert)
    expected = layer_errors(gm, bert.example)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    found = layer_errors(gm, bert.example, reference=bert.graph)
    assert [row.relative_error for row in found] == pytest.approx(
        [row.relative_error for row in expected], rel=1e-6
    )


def test_padding_is_left_out(prepared_bert: GraphModule) -> None:
    batch = text_example()
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    short, long = (
        layer_errors(prepared_bert, inputs, tokens=inputs["attention_mask"])[-1].relative_error
        for inputs in (batch, longer)
    )
    # int8's range still covers padding, so not equal bit for bit
    assert short == pytest.approx(long, rel=0.05)
    unmasked = layer_errors(prepared_bert, longer)[-1].relative_error
    assert unmasked != pytest.approx(long, rel=1e-3)


def test_what_can_not_be_compared(bert: Tiny, gpt2: Tiny, prepared_bert: GraphModule) -> None:
    with pytest.raises(InputError, match="no teacher to compare with"):
        layer_errors(bert.graph, bert.example)
    with pytest.raises(InputError, match="graphs of different models"):
        layer_errors(
            bert.graph, bert.example, reference=ti_fx.capture(torch.nn.Linear(2, 2), (torch.ones(2, 2),))
        )
    with pytest.raises(InputError, match="the batch lacks attention_mask"):
        layer_errors(prepared_bert, {"input_ids": bert.example["input_ids"]})


@pytest.mark.parametrize("weights", ["tensor", "row"])
def test_sizes_are_those_of_the_packed_graph(tiny: Tiny, weights: Any) -> None:
    rows = stored_weights(tiny.graph, Ternarize(weights=weights))
    assert sum(row.bytes_before for row in rows) == sum(
        value.numel() * value.element_size() for value in tiny.graph.parameters()
    )
    gm = tiny.fork()
    ti_fx.Pipeline(Ternarize(weights=weights), Pack())(gm)
    packed = [value for name, value in gm.named_buffers() if name.startswith("packed.")]
    stored = sum(value.numel() * value.element_size() for value in [*gm.parameters(), *packed])
    assert sum(row.bytes_after for row in rows) == stored


def test_each_weight_has_a_reason(bert: Tiny) -> None:
    rows = {row.name: row for row in stored_weights(bert.graph, Ternarize(skip=("*.layer.1.*.query",)))}
    expected = {
        "bert.embeddings.word_embeddings.weight": "word embedding",
        "bert.embeddings.position_embeddings.weight": "table of 32 rows; a word embedding has 1024 or more",
        "bert.embeddings.LayerNorm.weight": "norm",
        "bert.encoder.layer.0.attention.self.query.weight": "linear projection",
        "bert.encoder.layer.0.attention.self.query.bias": "bias",
        "bert.encoder.layer.1.attention.self.query.weight": "skip",
        "classifier.weight": "head: no parametric operation follows it",
    }
    assert {name: rows[name].reason for name in expected} == expected
    assert rows["bert.embeddings.word_embeddings.weight"].encoding == "ternary, a scale per row"
    with pytest.raises(SelectionError, match="matches no weight"):
        stored_weights(bert.graph, Ternarize(skip=("nothing",)))


def test_a_convolution_is_kept(vit: Tiny) -> None:
    (row,) = (row for row in stored_weights(vit.graph) if len(row.shape) == 4)
    assert (row.encoding, row.reason) == ("kept", "convolution, not a linear projection")
