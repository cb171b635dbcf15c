"""Learned steps of activations are Parameters of the student from preparation to the file, whose constants they are."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from exported_models import Layers, layers_example
from grids import LEARNED
from torch import nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import PreconditionError
from ti_fx.export import Runtime, check, to_onnx
from ti_fx.export import inputs as io
from ti_fx.ir.facts import record_facts
from ti_fx.passes import Pack, QuantizeActivations, Requantize, Strip, Ternarize

STEPS = ("activation_quant.values_int4.step", "activation_quant.gelu_int4.step")


def prepared(encoding: str = "int4-learned") -> GraphModule:
    gm = ti_fx.capture(Layers().eval(), layers_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding))(gm)
    return gm


def steps(gm: GraphModule) -> dict[str, float]:
    return {
        name: value.item() for name, value in gm.named_parameters() if name.startswith("activation_quant.")
    }


def trained(gm: GraphModule) -> GraphModule:
    optimiser = torch.optim.SGD(gm.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        gm(**layers_example())["logits"].square().mean().backward()
        optimiser.step()
    return gm


def test_steps_start_from_the_example_and_are_trained() -> None:
    gm = prepared()
    assert "%values_int4 = int4_learned(%values, %values_int4_step)" in ti_fx.dump(gm)
    before = steps(gm)
    assert tuple(before) == STEPS
    first = 2 * layers_example()["values"].abs().mean().item() / 7**0.5
    assert before[STEPS[0]] == pytest.approx(first, rel=1e-6)
    after = steps(trained(gm))
    assert all(after[name] != before[name] for name in STEPS)


def test_a_step_goes_with_its_quantiser_and_stays_with_it() -> None:
    gm = trained(prepared())
    known, text = steps(gm), ti_fx.dump(gm)
    ti_fx.Pipeline(QuantizeActivations("int4-learned"))(gm)
    assert (steps(gm), ti_fx.dump(gm)) == (known, text)
    fork = ti_fx.fork(gm)
    ti_fx.Pipeline(QuantizeActivations("int4-token"))(gm)
    assert steps(gm) == {}
    assert ti_fx.dump(gm) == ti_fx.dump(prepared("int4-token"))
    assert (steps(fork), ti_fx.dump(fork)) == (known, text)


@pytest.mark.parametrize(
    "name",
    [name if name == "int4-learned" else pytest.param(name, marks=pytest.mark.slow) for name in LEARNED],
)
def test_a_file_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    gm = trained(prepared(name))
    ti_fx.Pipeline(Strip(), Pack(kept="float16"))(gm)
    assert len(steps(gm)) == 2  # nothing was rounded to half precision that codes are multiplied by
    report = to_onnx(gm, tmp_path / "student.onnx", layers_example())
    assert (report.encoding, report.batch_invariant) == (name, True)
    assert report.parity.nodes is not None
    assert report.parity.nodes.worst < 1e-5
    found = [node.op_type for node in onnx.load(report.path).graph.node]
    assert (found.count("MatMulInteger"), found.count("QuantizeLinear")) == (2, 2)
    assert found.count("ReduceMax") == 0
    values = 100 * layers_example(5)["values"]  # most of which lie beyond the range
    outputs = Runtime(report.path, threads=1)({"values": values})["logits"]
    torch.testing.assert_close(
        torch.from_numpy(outputs), io.run_graph(gm, {"values": values})["logits"], rtol=1e-4, atol=1e-4
    )
    check(report.path, gm, layers_example())


def test_requantize_forgets_steps_and_learns_none() -> None:
    gm = trained(prepared())
    ti_fx.Pipeline(Strip(), Pack())(gm)
    with pytest.raises(
        PreconditionError, match=r"can't learn the steps of int8-learned, and first\.weight has none"
    ):
        ti_fx.Pipeline(Requantize("int8-learned"))(ti_fx.fork(gm))
    known = steps(gm)
    ti_fx.Pipeline(Requantize("int4-learned"))(gm)
    assert steps(gm) == known
    other = ti_fx.fork(gm)
    ti_fx.Pipeline(Requantize("int8-token"))(other)
    assert "%values_int8 = int8_token(%values)" in ti_fx.dump(other)
    assert steps(other) == {}
    none = ti_fx.fork(gm)
    ti_fx.Pipeline(Requantize("float"))(none)
    assert "activation_quant" not in ti_fx.dump(none)
    assert steps(gm) == known


def test_a_graph_without_values_to_start_from_is_refused() -> None:
    gm = ti_fx.capture(Layers().eval(), layers_example())
    record_facts(gm, example=None)
    with pytest.raises(
        PreconditionError, match="starts learned steps from values on the example, and the graph keeps"
    ):
        ti_fx.Pipeline(Ternarize(), QuantizeActivations("int8-learned"))(gm)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    empty = ti_fx.capture(model.eval(), {"input": torch.zeros(2, 8, device="meta")})
    with pytest.raises(PreconditionError, match="the graph is on the meta device"):
        ti_fx.Pipeline(Ternarize(), QuantizeActivations("int8-learned"))(empty)
