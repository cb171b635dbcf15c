"""Every normalising pass on a small export made for it: the difference it makes, and what it refuses."""

from __future__ import annotations

import operator
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from models import seeded
from raw_graphs import normalised, normalised_up_to, raw_graph
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import CaptureError, PreconditionError, RandomnessError
from ti_fx.frontend.exported_graph import exported_graph
from ti_fx.ir.checks import MARK
from ti_fx.ir.edit import aten_name, call, input_names
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.shapes import fake_mode
from ti_fx.passes import Canonicalize
from ti_fx.passes.normalise import NORMALISE
from ti_fx.passes.normalise.assign_roles import AssignRoles
from ti_fx.passes.normalise.buffer_writes import BufferWrites
from ti_fx.passes.normalise.drop_assertions import DropAssertions
from ti_fx.passes.normalise.drop_dead import DropDead
from ti_fx.passes.normalise.evaluate_anew import EvaluateAnew
from ti_fx.passes.normalise.inline_subgraphs import InlineSubgraphs
from ti_fx.passes.normalise.leaf_modules import LeafModules
from ti_fx.passes.normalise.merge_tied_names import MergeTiedNames
from ti_fx.passes.normalise.name_sizes import NameSizes
from ti_fx.passes.normalise.one_read_each import OneReadEach
from ti_fx.passes.normalise.out_of_place import OutOfPlace
from ti_fx.passes.normalise.plain_signature import PlainSignature
from ti_fx.passes.normalise.stochastic_depth import StochasticDepth
from ti_fx.passes.normalise.take_baked_inputs import TakeBakedInputs

aten = torch.ops.aten
Point = namedtuple("Point", ["x", "y"])


class Computes(nn.Module):
    """A linear layer of its own, and a function of it and the input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer, x)


class Tied(nn.Module):
    """A word embedding whose table is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.embed(ids).relu())
        return result


class Counts(nn.Module):
    """Keeps a count and a mean, which it puts in the place of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))
        self.count: Tensor
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return x - self.mean


class Attends(nn.Module):
    """Everything that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(x), 0.1, self.training)
        off = nn.functional.dropout(x, 0.1, training=False)
        return nn.functional.scaled_dot_product_attention(x, off, x, dropout_p=0.2)


def features() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def computes(function: Callable[[nn.Module, Tensor], object], x: Tensor | None = None) -> GraphModule:
    return raw_graph(seeded(lambda: Computes(function)), x=features() if x is None else x)


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sum(-1, keepdim=True)
        with torch.enable_grad():
            shift = scale * 2
        scale = scale + shift
    result: Tensor = layer(x) * scale
    return result


def checked(layer: nn.Module, x: Tensor) -> Tensor:
    aten._assert_async.msg(x.sum() > 0, f"{MARK}forward decides by the input, and")
    aten._assert_async.msg(torch.ones(3).sum() > 0, f"{MARK}forward decides by a constant, and")
    return x.to(torch.float64).float()


def dropped_paths(layer: nn.Module, x: Tensor) -> Tensor:
    branch = layer(x)
    kept = branch.new_empty((x.shape[0], 1)).bernoulli_(0.9)
    result: Tensor = x + branch * kept.div_(0.9)
    return result


def unread(layer: nn.Module, x: Tensor) -> Tensor:
    nn.functional.dropout(layer(x))
    return x.relu()


def softmax(layer: nn.Module, x: Tensor) -> Tensor:
    powers = (scores := torch.einsum("bqd,bkd->bqk", x, x)).sub(scores.amax(-1, True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def written_into(layer: nn.Module, x: Tensor) -> Tensor:
    mask = torch.zeros(4) + 1
    mask.add_(layer(x).sum())
    return x * 2 + mask


def in_place(layer: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = layer(x)
    before = hidden.relu()
    hidden += before
    hidden *= 2.0
    part = hidden[:, :2]
    part += 1.0  # the whole is read afterwards, so this one stays
    return hidden


# The graph that each pass is shown on, with the passes before it run already.
BEFORE: dict[type[Pass], Callable[[], GraphModule]] = {
    InlineSubgraphs: lambda: computes(without_gradient),
    DropAssertions: lambda: computes(checked),
    PlainSignature: lambda: computes(
        lambda layer, x: {"point": Point(layer(x), x), "pair": [x.relu(), None]}
    ),
    TakeBakedInputs: lambda: raw_graph(
        seeded(lambda: Computes(lambda layer, x: x[:2])),
        x=features(),
        baked={"lengths": torch.tensor([2, 1])},
    ),
    StochasticDepth: lambda: computes(dropped_paths),
    LeafModules: lambda: raw_graph(seeded(Attends), x=torch.randn(2, 3, 4)),
    BufferWrites: lambda: raw_graph(seeded(Counts), x=features()),
    MergeTiedNames: lambda: raw_graph(seeded(Tied), ids=torch.arange(6).reshape(2, 3)),
    OneReadEach: lambda: computes(lambda layer, x: layer(x.relu()) + x),
    AssignRoles: lambda: computes(written_into),
    OutOfPlace: lambda: computes(in_place),
    Canonicalize: lambda: computes(softmax, torch.randn(2, 3, 4)),
}
MORE: tuple[tuple[type[Pass], Callable[[], GraphModule]], ...] = (
    (NameSizes, lambda: normalised(computes(lambda layer, x: x.new_ones(x.shape[0]) + layer(x).sum(-1)))),
    (DropDead, lambda: normalised(computes(unread))),
)


def before(one: type[Pass]) -> GraphModule:
    return normalised_up_to(BEFORE[one](), one)


def check(golden: Callable[[str, str], None], one: Pass, gm: GraphModule) -> None:
    old = ti_fx.dump(gm)
    Pipeline(one)(gm)
    golden(f"normalise_{one.name().replace('-', '_')}", ti_fx.diff(old, gm))
    assert not Pipeline(one)(gm).changed


def test_each_pass_is_shown() -> None:
    assert {type(one) for one in NORMALISE.passes} == {*BEFORE, EvaluateAnew}


@pytest.mark.parametrize("one", BEFORE, ids=lambda one: one.name())
def test_the_difference_a_pass_makes(one: type[Pass], golden: Callable[[str, str], None]) -> None:
    check(golden, one(), before(one))


@pytest.mark.parametrize(("one", "make"), MORE, ids=lambda value: getattr(value, "__name__", ""))
def test_the_difference_a_pass_makes_after_capture(
    one: type[Pass], make: Callable[[], GraphModule], golden: Callable[[str, str], None]
) -> None:
    check(golden, one(), make())


def test_strides_are_what_evaluating_gives(golden: Callable[[str, str], None]) -> None:
    gm = normalised_up_to(
        computes(lambda layer, x: layer(x.transpose(1, 2)), torch.randn(2, 4, 3)), EvaluateAnew
    )
    view = next(node for node in gm.graph.nodes if aten_name(node) == "transpose")
    with fake_mode(gm):
        view.meta["val"] = torch.empty(view.meta["val"].shape)

    def strides() -> str:
        tensors = (node for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor))
        return "\n".join(f"%{node.name}  strides {node.meta['val'].stride()}" for node in tensors)

    old, text = strides(), ti_fx.dump(gm)
    assert not Pipeline(EvaluateAnew())(gm).changed
    assert ti_fx.dump(gm) == text
    golden("normalise_evaluate_anew", ti_fx.diff(old, strides()))


def test_all_of_them_compute_what_the_model_does() -> None:
    model = seeded(lambda: Computes(without_gradient))
    gm = normalised(raw_graph(model, x=features()))
    assert input_names(gm) == ("x",)
    torch.testing.assert_close(gm(x=features()), model(features()), rtol=0, atol=0)
    assert dict(gm.named_parameters())["layer.weight"] is model.layer.weight
    gm(x=features()).sum().backward()


def test_dropout_of_a_trace_in_eval_mode_stays() -> None:
    model = seeded(Attends).eval()
    gm = normalised_up_to(raw_graph(model, x=torch.randn(2, 3, 4)), LeafModules)
    Pipeline(LeafModules())(gm)
    found = [module for module in gm.modules() if isinstance(module, nn.Dropout)]
    assert [module.training for module in found] == [False, False]


def test_random_numbers_of_a_trace_in_eval_mode_stay() -> None:
    gm = raw_graph(seeded(lambda: Computes(dropped_paths)).eval(), x=features())
    assert not Pipeline(StochasticDepth())(normalised_up_to(gm, StochasticDepth)).changed


# ---- refusals


def test_a_branch_of_tensors_is_refused() -> None:
    def branches(layer: nn.Module, x: Tensor) -> object:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with pytest.raises(CaptureError, match="%cond calls torch's operator cond") as caught:
        NORMALISE(computes(branches))
    assert "\n" not in str(caught.value)


def test_a_sub_graph_whose_result_is_read_whole_is_refused() -> None:
    gm = computes(without_gradient)
    item = next(node for node in gm.graph.nodes if node.target is operator.getitem)
    call(item, len, (item.args[0],), "whole")
    with pytest.raises(CaptureError, match="%whole reads the whole result of the sub-graph"):
        InlineSubgraphs().apply(gm)


@pytest.mark.parametrize(
    ("decided", "error", "says"),
    [
        (lambda layer, x: layer.weight.sum() > 0, CaptureError, "what the weights compute"),
        (lambda layer, x: torch.rand(3).sum() > 0, RandomnessError, "a random number decides"),
    ],
)
def test_a_check_that_no_input_decides_is_refused(
    decided: Callable[[nn.Module, Tensor], Tensor], error: type[Exception], says: str
) -> None:
    def function(layer: nn.Module, x: Tensor) -> Tensor:
        aten._assert_async.msg(decided(layer, x), f"{MARK}forward decides, and")
        return x * 2

    with pytest.raises(error, match=says) as caught:
        NORMALISE(computes(function))
    assert "forward decides" in str(caught.value)


def test_another_operator_that_follows_the_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"calls aten\.alpha_dropout, whose mode is frozen.*nn\.Dropout"):
        NORMALISE(computes(lambda layer, x: nn.functional.alpha_dropout(x, 0.5, True)))


def test_a_parameter_that_the_model_does_not_name_is_refused() -> None:
    model = seeded(lambda: Computes(lambda layer, x: layer(x)))
    program = torch.export.export(model, (), {"x": features()}, strict=False)
    with pytest.raises(CaptureError, match=r"reads a parameter layer\.weight that the model does not name"):
        exported_graph(program, nn.Linear(4, 4), {})


@pytest.mark.parametrize("one", [type(one) for one in NORMALISE.passes if type(one) is not Canonicalize])
def test_a_captured_graph_is_refused(one: type[Pass]) -> None:
    gm = normalised(computes(lambda layer, x: layer(x)))
    with pytest.raises(
        PreconditionError, match=f"{one.name()} takes a graph that is exported.*capture the model again"
    ):
        Pipeline(one())(gm)


@pytest.mark.parametrize("one", [NameSizes, DropDead])
def test_a_graph_that_is_not_captured_is_refused(one: type[Pass]) -> None:
    with pytest.raises(
        PreconditionError, match=r"this one is exported; capture the model with ti_fx\.capture"
    ):
        Pipeline(one())(computes(lambda layer, x: layer(x)))
