"""Interventions by value and by gradient, also on fused projections and across an encoder and its decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Tiny, prepared
from recorder import run_recorded
from slow import slow

import ti_fx
from ti_fx.ir import roles
from ti_fx.ir.edit import tensor
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import (
    DuplicateTeacher,
    Intervene,
)

aten = torch.ops.aten


@pytest.mark.parametrize("at", ["map", "context", "output"])
@pytest.mark.parametrize("name", ["bert", "t5", "vit", *slow("gpt2", "llama")])
def test_consumers_read_the_teachers_value_and_the_tap_keeps_the_students(
    name: str, at: str, request: pytest.FixtureRequest
) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = prepared(tiny)
    sites = ti_fx.find_attention(gm)
    teacher = {node.name: twin.name for twin, node in roles.twins(gm.graph).items()}
    before = run_recorded(gm, tiny.example)
    Pipeline(Intervene(at))(gm)
    after = run_recorded(gm, tiny.example)
    for site in sites:
        tap = site.at(at)
        assert tap is not None
        twin = teacher[tap.name]
        assert not torch.equal(after[tap.name], after[twin])
        assert torch.equal(after[twin], before[twin])
        assert all(not roles.is_student(user) for user in tap.users)
    # up to the first intervened point the student is what it was
    first = sites[0].at(at)
    assert first is not None
    assert torch.equal(after[first.name], before[first.name])


def test_map_on_a_fused_projection_splits_the_gradient(gpt2: Tiny) -> None:
    """GPT-2's Q, K and V are one addmm: V's input keeps its gradient under TI-M, Q's and K's is cut."""
    gm = copy.deepcopy(gpt2.graph).train(False)
    Pipeline(DuplicateTeacher())(gm)
    base = ti_fx.dump(gm)
    reference = gm(**gpt2.example).logits
    Pipeline(Intervene("map"))(gm)
    # nothing is quantised yet, so the teacher's map is the student's: forward values are equal
    assert torch.equal(gm(**gpt2.example).logits, reference)
    site = ti_fx.find_attention(gm)[0]
    assert site.map is not None
    assert site.query is site.key is site.value

    # 1. the outputs: nothing flows through the map, all of V's part flows
    name = "transformer.h.0.attn.c_attn.weight"
    gm(**gpt2.example).logits.square().sum().backward()
    gradient = tensor(gm, name).grad
    assert gradient is not None
    query_key, value = gradient[:, :32], gradient[:, 32:]
    assert torch.equal(query_key, torch.zeros_like(query_key))
    assert value.abs().max() > 0
    below = tensor(gm, "transformer.wpe.weight").grad
    assert below is not None
    gm.zero_grad(set_to_none=True)

    # 2. the tap: its projections are trained, what feeds them is not
    values = run_recorded(gm, gpt2.example)
    values[site.map.name].square().sum().backward()
    gradient = tensor(gm, name).grad
    assert gradient is not None
    assert gradient[:, :32].abs().max() > 0
    assert torch.equal(gradient[:, 32:], torch.zeros_like(value))
    assert tensor(gm, "transformer.wpe.weight").grad is None
    assert tensor(gm, "transformer.h.0.ln_1.weight").grad is None
    gm.zero_grad(set_to_none=True)

    Pipeline(Intervene())(gm)
    assert ti_fx.dump(gm) == base


@pytest.mark.parametrize("at", ["map", "context", "output"])
def test_what_a_loss_at_the_tap_trains(at: str, bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph).train(False)
    Pipeline(DuplicateTeacher(), Intervene(at))(gm)
    site = ti_fx.find_attention(gm)[1]
    tap = site.at(at)
    assert tap is not None
    values = run_recorded(gm, bert.example)
    values[tap.name].square().sum().backward()
    trained = {
        name.removeprefix("bert.encoder.layer.1.attention.").removesuffix(".weight")
        for name, parameter in gm.named_parameters()
        if parameter.grad is not None and name.endswith("weight")
    }
    expected = {
        "map": {"self.query", "self.key"},
        "context": {"self.query", "self.key", "self.value"},
        "output": {"self.query", "self.key", "self.value", "output.dense"},
    }
    assert trained == expected[at]


def test_the_encoders_gradient_can_be_kept(t5: Tiny) -> None:
    gm = copy.deepcopy(t5.graph).train(False)
    Pipeline(DuplicateTeacher())(gm)
    found = {}
    for keep in (False, True):
        Pipeline(Intervene("output", kind="cross", keep_encoder_gradient=keep))(gm)
        tap = ti_fx.find_attention(gm)[-1].output
        assert tap is not None
        gm.zero_grad(set_to_none=True)
        run_recorded(gm, t5.example)[tap.name].square().sum().backward()
        grads = {name for name, parameter in gm.named_parameters() if parameter.grad is not None}
        found[keep] = {
            tower
            for tower in ("encoder", "decoder")
            if any(name.startswith(f"{tower}.block") and ".SelfAttention." in name for name in grads)
        }
    assert found == {False: set(), True: {"encoder"}}
