"""Every gradient and loss of the prepared graph equals an independent eager implementation (reference.py)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx.ir.blends import set_shares, shares
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, QuantizeActivations, Ternarize

# float64: the two differ by rounding alone, far below the figures.
GRADIENT_TOLERANCE = 1e-6  # of the largest entry of that gradient
LOSS_TOLERANCE = 1e-10  # relative

ENCODINGS = [
    ("int8-tensor", False),
    ("int8-tensor", True),
    ("int8-token", False),
    ("int8-token", True),
    ("reference", False),
    ("reference", True),
    ("float", False),
]
POINTS = ["none", "output", "context", "map"]
FURTHER = ["ffn", "layer"]


def bert(seed: int, dropout: float) -> BertForSequenceClassification:
    """Return a BERT of 2 layers in float64 whose every parameter is random; some weights lie beyond the clip."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        vocab_size=1100,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = 3
    model = BertForSequenceClassification(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
            if parameter.dim() == 2 and "classifier" not in name:
                parameter[1:6, ::5] = torch.tensor([2.49, 2.5, -2.5, 3.0, -4.0], dtype=torch.float64)[
                    :, None
                ][: len(parameter[1:6])]
    return model


def batch() -> dict[str, Tensor]:
    """Return 3 rows of 7 tokens, two of them padded; the ids include the rows with clipped weights."""
    ids = torch.randint(0, 1100, (3, 7), generator=torch.Generator().manual_seed(5))
    ids[0, :6] = torch.arange(6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def prepared(encoding: str, attention: bool, dropout: float = 0.0) -> GraphModule:
    gm = ti_fx.fork(ternarized(dropout))
    ti_fx.Pipeline(QuantizeActivations(encoding=encoding, attention=attention))(gm)
    return gm


@cache
def ternarized(dropout: float) -> GraphModule:
    gm = ti_fx.capture(bert(0, dropout), batch())
    # another model as the teacher, so that a tensor taken from the wrong side shows
    ti_fx.Pipeline(DuplicateTeacher(teacher=bert(1, dropout)), Ternarize())(gm)
    return gm.train()


def check(gm: GraphModule, settings: Any, seed: int | None = None, *, zero_is_none: bool = False) -> None:
    """Compare losses and gradients of the prepared graph with the reference's.

    With ``zero_is_none``, a gradient of zeros stands for none.
    """
    student = {name: value for name, value in gm.named_parameters() if not name.startswith("teacher.")}
    teacher = {
        name.removeprefix("teacher."): value
        for name, value in gm.named_parameters()
        if name.startswith("teacher.")
    }
    assert student.keys() <= teacher.keys()  # the teacher also has the buffers
    inputs = batch()
    if seed is not None:
        torch.manual_seed(seed)
    expected_losses, expected = reference.gradients(student, teacher, settings, **inputs)
    gm.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    result = gm(**inputs)
    result["loss"].backward()
    assert result["losses"].keys() == expected_losses.keys()
    for name, value in expected_losses.items():
        torch.testing.assert_close(result["losses"][name].detach(), value, rtol=LOSS_TOLERANCE, atol=0)
    total = torch.stack(list(expected_losses.values())).sum()
    torch.testing.assert_close(result["loss"].detach(), total, rtol=LOSS_TOLERANCE, atol=0)
    for name, parameter in student.items():
        wanted = expected[name]
        if zero_is_none and (wanted is None or not wanted.any()):
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient"
            continue
        if wanted is None or parameter.grad is None:
            assert wanted is None, f"{name} has no gradient; the reference has one"
            assert parameter.grad is None, f"{name} has a gradient; the reference has none"
            continue
        worst = (parameter.grad - wanted).abs().max() / wanted.abs().max()
        assert worst <= GRADIENT_TOLERANCE, f"{name}: {worst:.1e} of the largest entry"
    assert all(value.grad is None for value in teacher.values())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("encoding", "attention"), ENCODINGS)
def test_gradients_and_losses_equal_the_reference(encoding: str, attention: bool, point: str) -> None:
    gm = prepared(encoding, attention)
    for variant in ("reference", "paper"):
        for mask_padding in (False, True):
            ti_fx.Pipeline(
                Distill(variant=variant, mask_padding=mask_padding),
                Intervene(at=None if point == "none" else point),
            )(gm)
            settings = reference.Settings(
                layers=2,
                heads=3,
                encoding=encoding,
                attention=attention,
                point=point,
                variant=variant,
                mask_padding=mask_padding,
            )
            check(gm, settings)


@pytest.mark.parametrize("point", FURTHER)
@pytest.mark.parametrize(("encoding", "attention"), [("int8-tensor", True), ("float", False)])
def test_further_points_equal_the_reference(encoding: str, attention: bool, point: str) -> None:
    gm = prepared(encoding, attention)
    ti_fx.Pipeline(Distill(), Intervene(at=point))(gm)
    check(gm, reference.Settings(layers=2, heads=3, encoding=encoding, attention=attention, point=point))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("point", [*POINTS[1:], *FURTHER])
def test_blends_equal_the_reference(point: str, share: float) -> None:
    """λ of the teacher's value and 1 - λ of the student's; of the gradient below what is detached, 1 - λ."""
    gm = ti_fx.fork(prepared("int8-token", True))
    ti_fx.Pipeline(Distill(), Intervene(at=point, blend=True))(gm)
    set_shares(gm, {one.tap: share for one in shares(gm)})
    check(
        gm,
        reference.Settings(
            layers=2, heads=3, encoding="int8-token", attention=True, point=point, share=share
        ),
        zero_is_none=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, *FURTHER])
def test_gradients_equal_the_reference_with_dropout(point: str) -> None:
    """The student's dropouts draw in the order of the forward pass, and the teacher draws nothing."""
    gm = prepared("reference", True, dropout=0.1)
    ti_fx.Pipeline(Distill(variant="paper"), Intervene(at=None if point == "none" else point))(gm)
    settings = reference.Settings(
        layers=2, heads=3, encoding="reference", attention=True, point=point, variant="paper", dropout=0.1
    )
    check(gm, settings, seed=3)


def test_gradients_of_one_intervened_layer_stay_within_it() -> None:
    """An intervention of layer 1 alone leaves layer 0 as in plain training: detach acts on layer 1's inputs only."""
    gm = prepared("int8-tensor", False)
    ti_fx.Pipeline(Distill(), Intervene())(gm)
    gm.zero_grad(set_to_none=True)
    gm(**batch())["loss"].backward()
    plain = {name for name, value in gm.named_parameters() if value.grad is not None}
    ti_fx.Pipeline(Intervene(at="output", layers=(1,)))(gm)
    gm.zero_grad(set_to_none=True)
    gm(**batch())["loss"].backward()
    trained = {name for name, value in gm.named_parameters() if value.grad is not None}
    layer = "bert.encoder.layer.1.attention"
    parts = [f"{layer}.self.value", f"{layer}.output.dense"]
    assert plain - trained == {f"{part}.{tensor}" for part in parts for tensor in ("weight", "bias")}


@pytest.mark.parametrize(
    ("point", "variant", "without"),
    [
        ("none", "reference", []),
        ("none", "paper", []),
        ("output", "reference", ["self.value", "output.dense"]),  # the comparison is past the teacher's value
        ("output", "paper", []),
        ("context", "reference", ["self.value"]),
        ("context", "paper", ["self.value"]),
        ("map", "reference", []),
        ("map", "paper", []),
    ],
)
def test_which_parameters_a_mode_trains(point: str, variant: Any, without: list[str]) -> None:
    gm = prepared("int8-tensor", False)
    ti_fx.Pipeline(Distill(variant=variant), Intervene(at=None if point == "none" else point))(gm)
    gm.zero_grad(set_to_none=True)
    gm(**batch())["loss"].backward()
    untrained = {
        name
        for name, value in gm.named_parameters()
        if value.grad is None and not name.startswith("teacher.")
    }
    assert untrained == {
        f"bert.encoder.layer.{layer}.attention.{part}.{tensor}"
        for layer in range(2)
        for part in without
        for tensor in ("weight", "bias")
    }


def test_weights_beyond_the_clip_get_no_gradient() -> None:
    """Zero at and beyond ±2.5, in linear weights and in the rows of the word embedding that were looked up."""
    gm = prepared("int8-tensor", False)
    ti_fx.Pipeline(Distill(), Intervene())(gm)
    gm.zero_grad(set_to_none=True)
    gm(**batch())["loss"].backward()
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.intermediate.dense.weight"):
        weight = gm.get_parameter(name)
        assert weight.grad is not None
        beyond = weight.detach().abs() >= 2.5
        assert beyond.any()
        assert not weight.grad[beyond].any()
        assert weight.grad[1:2, ::5].all()  # 2.49 still learns
