"""Which of a model's outputs are logits, which are embeddings, and what a graph is without a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PlainTransformer, bert_model, seeded, text_example, tokens
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import PreconditionError
from ti_fx.ir.facts import facts
from ti_fx.ir.outputs import prepared_result
from ti_fx.passes import DecomposeAttention, Distill, DuplicateTeacher, Ternarize

EXAMPLE = {"tokens": tokens(), "keep": text_example()["attention_mask"]}


class Embedder(PlainTransformer):
    """A sentence's vector: two dense layers behind the first token, as ``form`` says."""

    def __init__(self, form: str) -> None:
        super().__init__(layers=1, dropout=0.0)
        self.form = form
        self.classify = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, tokens: Tensor, keep: Tensor) -> Any:
        vector = self.last(torch.tanh(super().forward(tokens, keep)))
        if self.form == "named":
            return {"sentence_embedding": F.normalize(vector, dim=-1)}
        if self.form == "normalised":
            return F.normalize(vector, dim=-1)
        if self.form == "tanh":
            return vector.tanh()
        if self.form == "by hand":
            return vector / vector.pow(2).sum(-1, keepdim=True).sqrt()
        if self.form == "norm":
            return F.layer_norm(vector, (8,))
        return vector


def prepared(model: nn.Module, distill: Distill, example: Any = EXAMPLE) -> tuple[GraphModule, Any]:
    graph = ti_fx.capture(model, example)
    report = ti_fx.Pipeline(DecomposeAttention(), DuplicateTeacher(), Ternarize(head=True), distill)(graph)
    return graph, report


@pytest.mark.parametrize("form", ["named", "norm", *slow("normalised", "tanh", "by hand")])
def test_an_embedding_is_compared_as_a_vector_and_trains_its_layers(form: str) -> None:
    model = seeded(lambda: Embedder(form))
    with torch.no_grad():
        given = model.eval()(**EXAMPLE)
    graph, _ = prepared(model, Distill())
    result = graph.eval()(**EXAMPLE)
    assert "logits" not in result["losses"]
    found = result["outputs"]
    loss = float(result["losses"]["embeddings"].detach())
    found, given = (value["sentence_embedding"] if form == "named" else value for value in (found, given))
    assert loss == pytest.approx(float((found - given).detach().square().mean()), rel=1e-5)
    result["loss"].backward()
    assert model.last.weight.grad is not None
    assert bool(model.last.weight.grad.any())


def test_what_a_linear_layer_computes_without_a_name_is_logits_and_said() -> None:
    graph, report = prepared(seeded(lambda: Embedder("linear")), Distill())
    assert set(graph(**EXAMPLE)["losses"]) == {"logits", "layer_outputs", "scores", "attention_outputs"}
    assert "taken for logits" in str(report)
    other, report = prepared(seeded(lambda: Embedder("linear")), Distill(logits=0.0, embeddings=1.0))
    assert set(other(**EXAMPLE)["losses"]) == {"layer_outputs", "scores", "attention_outputs", "embeddings"}
    assert "taken for logits" not in str(report)


def test_the_task_alone_needs_no_teacher() -> None:
    alone = Distill(logits=0.0, layer_outputs=0.0, scores=0.0, attention_outputs=0.0, task=0.7)
    graph = ti_fx.capture(bert_model(layers=1), text_example())
    ti_fx.Pipeline(DecomposeAttention(), Ternarize(), alone)(graph)
    result = prepared_result(graph)
    assert result is not None
    assert result.losses == {}
    assert facts(graph).task == 0.7
    assert float(graph(**text_example())["loss"]) == 0.0
    first = ti_fx.dump(graph)
    ti_fx.Pipeline(alone)(graph)
    assert ti_fx.dump(graph) == first
    with pytest.raises(PreconditionError, match="needs a teacher"):
        ti_fx.Pipeline(Distill(task=1.0))(graph)


def test_nothing_at_all_is_refused() -> None:
    graph = ti_fx.capture(bert_model(layers=1), text_example())
    with pytest.raises(PreconditionError):
        ti_fx.Pipeline(Distill(logits=0.0, layer_outputs=0.0, scores=0.0, attention_outputs=0.0))(graph)
