"""What a weight costs that alone is ternary, the order within attention maps, and how fast a curve falls."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Tiny
from torch import Tensor
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.analysis import area_under, map_ranking, sensitivity, steps_until
from ti_fx.errors import InputError
from ti_fx.passes import DecomposeAttention, DuplicateTeacher, Intervene, Strip, Ternarize


def test_a_weights_cost_is_that_of_the_model_with_it_alone(bert: Tiny, prepared_bert: GraphModule) -> None:
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"]
    found = sensitivity(prepared_bert, [bert.example], groups=[*([name] for name in names), names])
    with torch.no_grad():
        teacher = bert.model.eval()(**bert.example).logits.double().log_softmax(-1)
        for row in found:
            model = copy.deepcopy(bert.model).eval()
            for name in row.weights:
                weight = model.get_parameter(name)
                weight.copy_(numerics.ternary(weight, "row" if "word" in name else "tensor"))
            own = model(**bert.example).logits.double().log_softmax(-1)
            expected = F.kl_div(own, teacher, reduction="batchmean", log_target=True)
            assert row.cost == pytest.approx(float(expected), rel=0.05, abs=1e-12)
    assert [row.weights for row in found] == [(names[0],), (names[1],), tuple(names)]


def test_every_ternary_weight_has_a_row_and_interventions_do_not_count(
    bert: Tiny, prepared_bert: GraphModule
) -> None:
    rows = sensitivity(prepared_bert, [bert.example])
    assert {name for row in rows for name in row.weights} == {
        str(node.all_input_nodes[0].target)
        for node in prepared_bert.graph.nodes
        if node.target is numerics.ternary
    }
    assert all(row.cost > 0 for row in rows)
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene(at="output"))(gm)
    assert sensitivity(gm, [bert.example]) == rows


def ranking(student: Tensor, teacher: Tensor) -> float:
    """Count by hand, one map."""
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        for i in range(len(mine)):
            for j in range(len(mine)):
                sign = (theirs[i] > theirs[j]) - (theirs[i] < theirs[j])
                total += max(0.0, -(mine[i] - mine[j]) * sign)
    return total


def test_the_ranking_loss_is_the_papers(bert: Tiny, prepared_bert: GraphModule) -> None:
    keep = bert.example["attention_mask"].clone()
    keep[0, 4:] = 0
    example = {**bert.example, "attention_mask": keep}
    found = map_ranking(prepared_bert, example, tokens=keep)
    student = copy.deepcopy(bert.model)
    for name, weight in student.named_parameters():
        if weight.dim() == 2 and "classifier" not in name and "_embeddings" not in name:
            weight.data = numerics.ternary(weight.data)
        elif "word_embeddings" in name:
            weight.data = numerics.ternary(weight.data, "row")
    values = []
    for model in (student, copy.deepcopy(bert.model)):
        model.eval().set_attn_implementation("eager")  # type: ignore[operator]
        with torch.no_grad():
            values.append(model(**example, output_attentions=True).attentions)
    plain = bert.fork()
    ti_fx.Pipeline(DecomposeAttention(), DuplicateTeacher(), Ternarize())(plain)
    for row in map_ranking(plain, example, tokens=keep):
        each = []
        for index, kept in enumerate(keep.bool()):
            mine, theirs = (value[row.layer][index, row.head][kept][:, kept] for value in values)
            each.append(ranking(mine, theirs))
        assert row.loss == pytest.approx(sum(each) / len(each), rel=1e-3, abs=1e-6)
    assert [(row.layer, row.head) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_without_a_teacher_there_is_nothing_to_compare(bert: Tiny, prepared_bert: GraphModule) -> None:
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Strip())(gm)
    for measure in (lambda: sensitivity(gm, [bert.example]), lambda: map_ranking(gm, bert.example)):
        with pytest.raises(InputError, match="no teacher") as caught:
            measure()
        assert "\n" not in str(caught.value)


def test_what_is_not_ternary_has_no_cost(bert: Tiny, prepared_bert: GraphModule) -> None:
    with pytest.raises(InputError, match=r"'classifier\.weight' is no ternary weight"):
        sensitivity(prepared_bert, [bert.example], groups=[["classifier.weight"]])
    with pytest.raises(InputError, match="no batch"):
        sensitivity(prepared_bert, [])


def test_curves() -> None:
    steps, values = [0, 10, 30], [4.0, 2.0, 1.0]
    assert area_under(steps, values) == pytest.approx((10 * 3 + 20 * 1.5) / 30)
    assert steps_until(steps, values, 1.5) == pytest.approx(20)
    assert steps_until(steps, values, 5.0) == 0
    assert steps_until(steps, values, 0.5) is None
    for wrong in ([0, 0, 1], [0]):
        with pytest.raises(InputError):
            area_under(wrong, values[: len(wrong)])
