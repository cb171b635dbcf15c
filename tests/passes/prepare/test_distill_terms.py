"""What each option of Distill compares: the graph's losses against formulas over the values of its own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Tiny, text_example
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import ti_fx
from ti_fx import Pipeline
from ti_fx.errors import PreconditionError
from ti_fx.ir import roles
from ti_fx.passes import DecomposeAttention, Distill, DuplicateTeacher, QuantizeActivations, Ternarize

ALONE = {"logits": 0.0, "layer_outputs": 0.0, "scores": 0.0, "attention_outputs": 0.0, "embeddings": 0.0}


class Values(Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def prepared(tiny: Tiny, **options: Any) -> GraphModule:
    gm = tiny.fork()
    Pipeline(DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations())(gm)
    Pipeline(Distill(**{**ALONE, **options}))(gm)
    return gm.eval()


def run(gm: GraphModule, example: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[Node, Any]]:
    values = Values(gm)
    inputs = [example[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        result = values.run(*inputs)
    return result["losses"], values.found


def pairs(gm: GraphModule, values: dict[Node, Any], nodes: list[Node | None]) -> list[tuple[Tensor, Tensor]]:
    teacher = roles.twin_of(gm.graph)
    return [(values[node], values[teacher[node]]) for node in nodes if node is not None]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_maps_and_relations(name: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = prepared(tiny, maps=1.0, relations=0.5)
    found, values = run(gm, tiny.example)
    sites = ti_fx.find_attention(gm)
    maps = sum(kl(*pair).mean() for pair in pairs(gm, values, [site.scores for site in sites]))
    torch.testing.assert_close(found["maps"], maps, rtol=1e-4, atol=1e-7)

    last = {site.stack: site for site in sites if site.kind == "self"}.values()
    expected = torch.zeros(())
    for site in last:
        for one in pairs(gm, values, [site.query, site.key, site.value]):
            vectors = [torch.unflatten(value, -1, (2, -1)).transpose(-2, -3) for value in one]
            expected = expected + kl(*(value @ value.mT / value.shape[-1] ** 0.5 for value in vectors)).mean()
    torch.testing.assert_close(found["relations"], expected, rtol=1e-4, atol=1e-7)


def test_relations_of_one_linear_are_of_its_thirds(gpt2: Tiny) -> None:
    gm = prepared(gpt2, relations=1.0)
    found, values = run(gm, gpt2.example)
    site = ti_fx.find_attention(gm)[-1]
    ((mine, theirs),) = pairs(gm, values, [site.query])
    batch, tokens = gpt2.example["input_ids"].shape
    mine, theirs = (
        value.view(batch, tokens, -1) for value in (mine, theirs)
    )  # addmm has the tokens side by side
    expected = torch.zeros(())
    for one, other in zip(mine.chunk(3, -1), theirs.chunk(3, -1), strict=True):
        vectors = [torch.unflatten(value, -1, (2, -1)).transpose(-2, -3) for value in (one, other)]
        expected = expected + kl(*(value @ value.mT / value.shape[-1] ** 0.5 for value in vectors)).mean()
    torch.testing.assert_close(found["relations"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("errors", ["token", "layer"])
def test_relative_errors(errors: str, bert: Tiny) -> None:
    gm = prepared(bert, layer_outputs=1.0, attention_outputs=1.0, scores=1.0, errors=errors)
    found, _ = run(gm, bert.example)
    plain, _ = run(
        prepared(bert, layer_outputs=1.0, attention_outputs=1.0, scores=1.0, variant="reference"),
        bert.example,
    )
    assert set(found) == set(plain)
    # layer norm leaves a variance of 1 a token, so there both say nearly the same
    torch.testing.assert_close(found["layer_outputs"], plain["layer_outputs"], rtol=0.2, atol=0)
    assert found["scores"] > plain["scores"]  # these are small


def test_logits(gpt2: Tiny) -> None:
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "soft": {"temperature": 2.0},
        "kl": {"logits_loss": "kl", "temperature": 2.0},
        "scaled": {"logits_loss": "token-scaled"},
    }
    for name, options in cases.items():
        gm = prepared(gpt2, logits=1.0, **options)
        losses, values = run(gm, gpt2.example)
        found[name] = losses["logits"]
        (node,) = [node for node in gm.graph.nodes if node.name.startswith("loss_logits_0")]
        student, teacher = (values[one] for one in node.args[:2])
        if name == "scaled":
            ids = gpt2.example["input_ids"]
            hard = F.cross_entropy(teacher[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") / 10
            each = F.cross_entropy(
                student[:, :-1].transpose(1, 2), teacher[:, :-1].softmax(-1).transpose(1, 2), reduction="none"
            )
            torch.testing.assert_close(found[name], (hard.softmax(-1) * each).sum(-1).mean())
    entropy = -(teacher / 2).softmax(-1).mul((teacher / 2).log_softmax(-1)).sum(-1).mean() * 4
    torch.testing.assert_close(found["soft"] - found["kl"], entropy)


def test_masked_terms_do_not_see_padding(bert: Tiny) -> None:
    options = {"layer_outputs": 1.0, "scores": 1.0, "maps": 1.0, "relations": 1.0, "errors": "token"}
    gm = prepared(bert, **options, mask_padding=True)
    example = text_example(batch=2)
    example["attention_mask"][:, 5:] = 0
    short = {name: value[:, :5] for name, value in example.items()}
    long, cut = run(gm, example)[0], run(gm, short)[0]
    for name in ("layer_outputs", "maps", "relations"):
        torch.testing.assert_close(long[name], cut[name], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": 1.0, "temperature": 0.0}, r"distill\{temperature=0.0\}: give a number above 0"),
        ({"logits": 1.0, "logits_loss": "token-scaled"}, "needs one input with the token of each"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], message: str, bert: Tiny) -> None:
    with pytest.raises(PreconditionError, match=message) as caught:
        prepared(bert, **options)
    assert "\n" not in str(caught.value)
