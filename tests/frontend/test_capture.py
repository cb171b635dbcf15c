"""Capture: the graph equals the model in both modes and at other sizes, and what can't be captured is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import (
    PlainTransformer,
    Tiny,
    bert_model,
    gpt2_model,
    llama_model,
    seeded,
    t5_model,
    text_example,
    tokens,
    vit_model,
)
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import ti_fx
from ti_fx.errors import CaptureError, InputError, PreconditionError, SelectionError, TiFxError
from ti_fx.ir.facts import facts
from ti_fx.ir.shapes import evaluate, guard_count, signature
from ti_fx.passes import Distill, DuplicateTeacher, Intervene


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


# Captured and eager run the same ATen ops: they are equal but for the order of sums inside one op.
def same(expected: Any, actual: Any, rtol: float = 0.0, atol: float = 1e-6) -> None:
    assert type(actual) is type(expected)
    left, right = leaves(expected), leaves(actual)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)


def eager(source: nn.Module) -> nn.Module:
    """Return a copy that computes attention as the trace does."""
    model: Any = copy.deepcopy(source)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    made: nn.Module = model
    return made


def keywords(tiny: Tiny) -> dict[str, Any]:
    return {"use_cache": False} if tiny.name == "t5" else {}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_graph_equals_the_model(tiny: Tiny, training: bool) -> None:
    model, gm = eager(tiny.model).train(training), ti_fx.fork(tiny.graph).train(training)
    torch.manual_seed(3)
    expected = model(**tiny.example, **keywords(tiny))
    torch.manual_seed(3)
    actual = gm(**tiny.example)
    same(expected, actual)
    if training and tiny.name not in ("llama", "vit"):  # these have no dropout by default
        torch.manual_seed(4)
        assert not torch.equal(leaves(gm.train()(**tiny.example))[0], leaves(actual)[0])


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (4, 1), (2, 2), (5, 12)])
@pytest.mark.parametrize("name", ["bert", "llama", *slow("gpt2", "t5")])
def test_other_sizes(name: str, batch: int, length: int, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    example = text_example(batch, length)
    example["attention_mask"][:, 0] = 1
    if name == "t5":
        example["decoder_input_ids"] = tokens(batch, length + 2)
    model, gm = eager(tiny.model).eval(), ti_fx.fork(tiny.graph).eval()
    same(model(**example, **keywords(tiny)), gm(**example))


def test_other_batches_of_images(vit: Tiny) -> None:
    model, gm = eager(vit.model).eval(), ti_fx.fork(vit.graph).eval()
    for batch in (1, 3):
        example = {"pixel_values": torch.randn(batch, 3, 8, 8)}
        same(model(**example), gm(**example))
    assert ti_fx.capture_report(vit.graph).dims == {"pixel_values": ("batch", 3, 8, 8)}
    assert "fixes it at" in ti_fx.capture_report(vit.graph).static["pixel_values.2"]


def test_an_example_of_one_row_has_a_dynamic_batch() -> None:
    gm = ti_fx.capture(bert_model(1), text_example(1, 4))
    assert ti_fx.capture_report(gm).dims["input_ids"] == ("batch", "sequence")
    assert gm(**text_example(3, 5)).logits.shape == (3, 3)


def test_nothing_is_dynamic_on_request() -> None:
    gm = ti_fx.capture(bert_model(1), text_example(1, 4), dynamic="none")
    assert ti_fx.capture_report(gm).dims == {"input_ids": (1, 4), "attention_mask": (1, 4)}
    with pytest.raises(InputError, match="captured for 4"):
        gm(**text_example(1, 5))


def test_only_the_batch_is_dynamic_on_request() -> None:
    report = ti_fx.capture_report(ti_fx.capture(bert_model(1), text_example(), dynamic="batch"))
    assert report.dims["input_ids"] == ("batch", 7)
    assert "dynamic='batch'" in report.static["input_ids.1"]


def test_a_default_model_keeps_its_own_attention() -> None:
    model: Any = bert_model(1)
    assert model.config._attn_implementation == "sdpa"
    gm = ti_fx.capture(model, text_example())
    assert model.config._attn_implementation == "sdpa"
    assert ti_fx.capture_report(gm).attention == "eager"
    assert ti_fx.find_attention(gm)[0].map is not None
    same(model.eval()(**text_example()), gm.eval()(**text_example()), rtol=0, atol=1e-5)


def test_a_failed_capture_restores_the_model() -> None:
    model: Any = bert_model(1)
    model.eval()
    with pytest.raises(InputError):
        ti_fx.capture(model, {"input_ids": tokens().float()})
    assert model.config._attn_implementation == "sdpa"
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float64)])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model: Any = bert_model(1)
    model.to(dtype)
    gm = ti_fx.capture(model, text_example())
    result = gm.eval()(**text_example()).logits
    assert result.dtype == dtype
    # bfloat16 has 8 bits: two units in the last place at the logits' size of about 0.1
    same(
        eager(model).eval()(**text_example()).logits,
        result,
        rtol=0,
        atol=2e-3 if dtype == torch.bfloat16 else 1e-12,
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_mode_stays(training: bool) -> None:
    model = bert_model(1).train(training)
    model.classifier.eval()
    modes = {name: part.training for name, part in model.named_modules()}
    gm = ti_fx.capture(model, text_example())
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert gm.training == training
    assert all(part.training == training for part in gm.modules())


def test_train_and_eval_change_no_graph(bert: Tiny) -> None:
    gm = ti_fx.fork(bert.graph)
    text, code = ti_fx.dump(gm), gm.code
    for _ in range(2):
        first, second = gm.train()(**bert.example).logits, gm(**bert.example).logits
        assert not torch.equal(first, second)
        first, second = gm.eval()(**bert.example).logits, gm(**bert.example).logits
        assert torch.equal(first, second)
    assert ti_fx.dump(gm) == text
    assert gm.code == code
    gm.train()


def test_positional_inputs() -> None:
    model = seeded(PlainTransformer)
    gm = ti_fx.capture(model, (tokens(), tokens()))
    assert list(ti_fx.capture_report(gm).dims) == ["tokens", "keep"]
    expected = model.eval()(tokens(), tokens())
    same(expected, gm.eval()(tokens(), tokens()), rtol=0, atol=1e-6)
    same(expected, gm(keep=tokens(), tokens=tokens()), rtol=0, atol=1e-6)


def test_constants_are_baked() -> None:
    model: Any = bert_model(2)
    model.eval()
    gm = ti_fx.capture(model, {**text_example(), "output_hidden_states": True, "output_attentions": True})
    assert ti_fx.capture_report(gm).constants == {"output_hidden_states": True, "output_attentions": True}
    expected = eager(model)(**text_example(), output_hidden_states=True, output_attentions=True)
    actual = gm(**text_example())
    assert list(actual) == ["logits", "hidden_states", "attentions"]
    same(expected, actual)


def test_a_model_that_returns_a_tuple_or_a_dict() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            return {"a": y, "rest": (y + 1, [y + 2, None])}

    gm = ti_fx.capture(Both(), {"x": torch.ones(3, 4)})
    result = gm(x=torch.ones(2, 4))
    assert torch.equal(result["rest"][1][0], result["a"] + 2)
    assert result["rest"][1][1] is None


def test_parameters_are_the_models_own(tiny: Tiny) -> None:
    own = dict(tiny.model.named_parameters())
    captured = dict(tiny.graph.named_parameters())
    assert captured.keys() <= own.keys()
    assert all(captured[name] is own[name] for name in captured)
    assert set(tiny.graph.state_dict()) <= set(tiny.model.state_dict())


def test_tied_weights_are_one_parameter(gpt2: Tiny) -> None:
    names = [name for name, _ in gpt2.graph.named_parameters(remove_duplicate=False)]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert [node.target for node in gpt2.graph.graph.find_nodes(op="get_attr")].count(
        "transformer.wte.weight"
    ) == 1
    assert facts(gpt2.graph).tied == {"transformer.wte.weight": ("lm_head.weight",)}


def test_non_persistent_buffers_stay_out_of_the_state_dict(bert: Tiny) -> None:
    assert "bert.embeddings.position_ids" in dict(bert.graph.named_buffers())
    assert "bert.embeddings.position_ids" not in bert.graph.state_dict()


def test_buffers_that_training_updates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gm = ti_fx.capture(model, {"input": x})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"capture changed {name}"
    reference = copy.deepcopy(model)
    expected, actual = reference.train()(x), gm.train()(input=x)
    same(expected, actual)
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)
    same(reference.eval()(x), gm.eval()(input=x))


def test_gradients_are_the_models(bert: Tiny) -> None:
    model, gm = eager(bert.model).train(), copy.deepcopy(bert.graph).train()
    torch.manual_seed(5)
    model(**bert.example).logits.square().sum().backward()
    torch.manual_seed(5)
    gm(**bert.example).logits.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in gm.named_parameters():
        assert parameter.grad is not None
        reference = expected[name]
        assert reference is not None
        assert torch.equal(parameter.grad, reference), name


def test_deepcopy_keeps_graph_and_facts(tiny: Tiny) -> None:
    gm = copy.deepcopy(tiny.graph)
    assert ti_fx.dump(gm) == ti_fx.dump(tiny.graph)
    assert ti_fx.capture_report(gm) == ti_fx.capture_report(tiny.graph)
    with pytest.raises(InputError):
        gm()


def test_capture_leaves_the_random_state() -> None:
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    ti_fx.capture(bert_model(1), text_example())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(numpy.random.get_state()) == before[2]


def test_recorded_shapes_are_what_the_nodes_give(tiny: Tiny) -> None:
    gm = tiny.graph
    guards = guard_count(gm)
    for node in gm.graph.nodes:
        if node.op != "output":
            assert signature(evaluate(gm, node)) == signature(node.meta["val"]), node
    assert guard_count(gm) == guards == facts(gm).guards


def test_the_report(bert: Tiny) -> None:
    report = ti_fx.capture_report(bert.graph)
    assert report.dims == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert report.nodes == len(bert.graph.graph.nodes)
    assert report.parameters == sum(parameter.numel() for parameter in bert.model.parameters())
    assert report.checked == {"eval": 0.0, "train": 0.0}
    assert "input_ids: [batch, sequence]" in str(report)
    with pytest.raises(InputError, match=r"ti_fx\.capture"):
        ti_fx.capture_report(torch.fx.symbolic_trace(nn.Linear(2, 2)))


# ---- what can't be captured


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class DataDependent(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if y.sum() > 0:
            y = y + 1
        return y


class LayerDrop(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        y: Tensor = self.linear(x)
        return y


class NumpyMask(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * float(numpy.random.uniform())
        return y


class TorchDecision(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]).item() < 0.5:
            return x
        y: Tensor = self.linear(x)
        return y


class ModeDependent(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if self.training else y


class DrawsInTraining(Plain):
    """What is drawn changes nothing on this example, so the graph of training equals the model in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + (torch.rand_like(y) > 1) if self.training else y


class Positional(Plain):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


class Nested(Plain):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(index for index, line in enumerate(lines, 1) if line.strip() == text)


X = {"x": torch.ones(3, 4)}
FAILS = ["fails on the example", "modeling_bert.py"]
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, type[TiFxError], list[str]]] = {
    "data-dependent control flow": (
        DataDependent, X, CaptureError, [f"test_capture.py:{line_of('if y.sum() > 0:')}"],
    ),
    "layerdrop": (
        LayerDrop, X, CaptureError,
        [f"test_capture.py:{line_of('if self.training and random.random() < 0.5:')}", "layerdrop=0"],
    ),
    "numpy": (
        NumpyMask, X, CaptureError,
        [f"test_capture.py:{line_of('y: Tensor = self.linear(x) * float(numpy.random.uniform())')}"],
    ),
    "a random number read into Python": (
        TorchDecision, X, CaptureError,
        [f"test_capture.py:{line_of('if self.training and torch.rand([]).item() < 0.5:')}"],
    ),
    "a mode decided in Python": (ModeDependent, X, CaptureError, ["differs from the model in eval mode"]),
    "a number drawn in training alone": (DrawsInTraining, X, CaptureError, ["draws random numbers in eval mode"]),
    "positional arguments": (Positional, (torch.ones(2, 2),), InputError, ["*args", "named inputs"]),
    "nested tensors": (Nested, {"pair": (torch.ones(2), torch.ones(2))}, InputError, ["'pair'", "keyword"]),
    "an unknown input": (DataDependent, {"x": X["x"], "y": X["x"]}, InputError, ["DataDependent.forward(x)", "'y'"]),
    "a missing input": (DataDependent, {}, InputError, ["DataDependent.forward(x)", "'x'"]),
    "no tensor": (DataDependent, {"x": 1}, InputError, ["no tensor"]),
    "another device": (DataDependent, {"x": torch.ones(3, 4, device="meta")}, InputError, ["cpu", "meta"]),
    "a wrong shape": (lambda: bert_model(1), {"input_ids": tokens()[:, :, None]}, InputError, FAILS),
    "a wrong dtype": (lambda: bert_model(1), {"input_ids": torch.zeros(2, 3)}, InputError, FAILS),
    "a sequence too long": (lambda: bert_model(1), text_example(2, 64), InputError, FAILS),
    "no module": (lambda: object(), X, InputError, ["nn.Module"]),  # type: ignore[dict-item, return-value]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_captured_is_refused_in_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, example, error, says = REFUSED[name]
    model = make()
    with pytest.raises(error) as caught:
        ti_fx.capture(model, example)
    assert "forward" not in getattr(model, "__dict__", {})
    assert "".join(capfd.readouterr()) == ""
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(InputError, match="'auto', 'all', 'batch', 'none'"):
        ti_fx.capture(nn.Linear(2, 2), {"input": torch.ones(2, 2)}, dynamic="some")  # type: ignore[arg-type]


# ---- wrong inputs of a captured graph

GOOD = text_example()
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a missing input": ({"input_ids": GOOD["input_ids"]}, ["takes the inputs input_ids, attention_mask"]),
    "an unknown input": ({**GOOD, "labels": tokens()}, ["got input_ids, attention_mask, labels"]),
    "a wrong dtype": ({**GOOD, "input_ids": GOOD["input_ids"].float()}, ["'input_ids' is torch.float32", "int64"]),
    "a wrong rank": ({**GOOD, "input_ids": GOOD["input_ids"][0]}, ["'input_ids' has 1 dimensions", "takes 2"]),
    "unequal sizes": ({**GOOD, "input_ids": tokens(3, 6)}, ["size 7 in dimension 1", "must be equal"]),
    "a sequence too long": (text_example(2, 40), ["size 40 in dimension 1", "at most 32"]),
    "no tensor": ({**GOOD, "input_ids": [[1, 2]]}, ["'input_ids' is a list", "give a tensor"]),
    "another device": ({name: value.to("meta") for name, value in GOOD.items()}, ["'input_ids'", "meta", "cpu"]),
    "an empty batch": (text_example(0, 7), ["size 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_of_a_graph_are_refused_in_one_line(name: str, bert: Tiny) -> None:
    inputs, says = WRONG[name]
    for gm in (bert.graph, ti_fx.fork(bert.graph), copy.deepcopy(bert.graph)):
        with pytest.raises(InputError) as caught:
            gm(**inputs)
        assert "\n" not in str(caught.value)
        for words in says:
            assert words in str(caught.value)


def test_too_many_positional_inputs_are_refused(bert: Tiny) -> None:
    with pytest.raises(InputError, match="takes the inputs"):
        bert.graph(tokens(), tokens(), tokens())
    with pytest.raises(InputError, match="twice"):
        bert.graph(tokens(), input_ids=tokens(), attention_mask=tokens())


def test_a_model_without_attention() -> None:
    gm = ti_fx.capture(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"input": torch.ones(3, 4)}
    )
    assert ti_fx.find_attention(gm) == []
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    with pytest.raises(PreconditionError, match="no attention block") as distil:
        ti_fx.Pipeline(Distill())(gm)
    with pytest.raises(SelectionError, match="none of the graph's 0 attention blocks") as intervene:
        ti_fx.Pipeline(Intervene("map"))(gm)
    assert "\n" not in str(distil.value) + str(intervene.value)
    ti_fx.Pipeline(Distill(layer_outputs=0, scores=0, attention_outputs=0))(gm)
    assert gm(input=torch.ones(3, 4))["loss"].shape == ()


@pytest.mark.parametrize(
    "make",
    [bert_model, *slow(gpt2_model, llama_model, t5_model), vit_model],
    ids=lambda make: str(make.__name__),
)
def test_dynamic_names(make: Callable[[], nn.Module], request: pytest.FixtureRequest) -> None:
    name = make.__name__.removesuffix("_model")
    gm: GraphModule = request.getfixturevalue(name).graph
    assert "batch" in ti_fx.dump(gm).splitlines()[0]
    assert not any(
        f"s{digit}" in line.split("  ")[1]
        for line in ti_fx.dump(gm).splitlines()[:-1]
        for digit in "0123456789"
    )
