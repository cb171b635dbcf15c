"""Weights of losses follow curves or are learned: formulas, recipes, resuming, compiling, and what the student has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import Tiny, bert_model, prepared, text_example
from tiny_training import NO_DROPOUT, different, history, trainer, weights
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import PreconditionError, RecipeError, VerificationError
from ti_fx.ir.edit import tensor
from ti_fx.ir.moved import set_weights
from ti_fx.numerics import losses
from ti_fx.passes import Distill, Strip, WeighLosses
from ti_fx.recipe import Curve, Phase

TWICE = {"gradient_accumulation_steps": 2}
S = "losses.scores.log_variance"


def recipe(distill: Distill | None = None, steps: float | None = None, **curves: Any) -> Recipe:
    phases = (Phase("moved", steps=steps, weights=curves), *((Phase("quantise"),) if steps else ()))
    return Recipe("moved", distill=distill or Distill(), schedule=phases)


def trained(folder: Path, one: Recipe, **options: Any) -> Any:
    settings = {"max_steps": 2, **options}
    made = trainer(folder, one, model=bert_model(1), arguments_options=settings, eval_dataset=None)
    made.train()
    return made


# --- scheduled ------------------------------------------------------------------------------------------------------


def test_a_constant_weight_is_a_fixed_one_bit_for_bit(bert_layer: Tiny) -> None:
    def step(gm: GraphModule) -> dict[str, torch.Tensor]:
        gm.eval()
        loss = gm(**bert_layer.example)["loss"]
        named = {name: value for name, value in gm.named_parameters() if value.requires_grad}
        found = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
        gradients = {name: one for name, one in zip(named, found, strict=True) if one is not None}
        return {"loss": loss.detach(), **gradients}

    fixed, moved = prepared(bert_layer), prepared(bert_layer)
    ti_fx.Pipeline(Distill(scores=2.0 * 0.3, layer_outputs=0.7))(fixed)
    ti_fx.Pipeline(Distill(scores=2), WeighLosses(("scores", "layer_outputs")))(moved)
    assert set_weights(moved, {"scores": 0.3, "layer_outputs": 0.7}) == {"scores": 0.6, "layer_outputs": 0.7}
    assert different(step(fixed), step(moved)) == []


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_constant_curve_trains_as_a_fixed_weight(accumulated: int, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": accumulated}
    fixed = Distill(scores=2.0 * 0.3, task=0.5 * 0.7)
    curves: dict[str, Any] = {
        "scores": Curve("constant", 0.3),
        "task": Curve("constant", 0.7),
        "logits": Curve("constant", 1.0),
    }
    one = trained(tmp_path, recipe(fixed), **options)
    other = trained(tmp_path, recipe(Distill(scores=2.0, task=0.5), **curves), **options)
    assert different(weights(one), weights(other)) == []
    assert [row["loss"] for row in history(one)] == [row["loss"] for row in history(other)]
    assert {row["weight_scores"] for row in history(other)} == {0.6}
    assert {row["share_task"] for row in history(other)} == {0.7}


@pytest.mark.slow
def test_a_curve_moves_a_weight_and_stops_with_its_phase(tmp_path: Path) -> None:
    moved = recipe(Distill(scores=2.0), 0.5, scores=Curve("linear", 0.0, 1.0))
    made = trained(tmp_path, moved, max_steps=4, **TWICE)
    assert [row.get("weight_scores") for row in history(made)] == [0.0, 1.0, None, None]
    terms = ("logits", "layer_outputs", "attention_outputs")
    row = history(made)[0]
    assert row["loss"] == pytest.approx(sum(row[f"loss_{term}"] for term in terms), rel=1e-5)
    row = history(made)[2]
    assert row["loss"] == pytest.approx(
        sum(row[f"loss_{term}"] for term in terms) + 2 * row["loss_scores"], rel=1e-5
    )


@pytest.mark.slow
def test_moving_and_learning_weights_never_recompiles(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.compiler.set_default_backend("eager")
    try:
        moved = recipe(Distill(learned=("scores",)), logits=Curve("cosine"))
        options = {"max_steps": 6}
        compiled = trainer(tmp_path, moved, model=bert_model(1, **NO_DROPOUT), compile="on", eval_dataset=None,
            arguments_options=options)  # fmt: skip
        before = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled.train()
        assert counters["stats"]["unique_graphs"] == before + 1
        plain = trainer(tmp_path, moved, model=bert_model(1, **NO_DROPOUT), eval_dataset=None,
            arguments_options=options)  # fmt: skip
        plain.train()
        for one, other in zip(history(compiled), history(plain), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["weight_logits"] == other["weight_logits"]
            assert one["log_variance_scores"] == pytest.approx(other["log_variance_scores"], rel=1e-4)
    finally:
        torch.compiler.set_default_backend(None)


# --- learned --------------------------------------------------------------------------------------------------------


def test_a_learned_weight_is_its_formula() -> None:
    value = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = losses.learned(value, s)
    assert float(found.detach()) == pytest.approx(math.exp(-0.7) * 3 + 0.7, abs=1e-15)
    found.backward()  # type: ignore[no-untyped-call]
    assert s.grad is not None
    assert value.grad is not None
    assert float(s.grad) == pytest.approx(1 - math.exp(-0.7) * 3, abs=1e-12)
    assert float(value.grad) == pytest.approx(math.exp(-0.7), abs=1e-12)
    assert torch.autograd.gradcheck(losses.learned, (value, s))


def test_the_gradient_of_a_learned_weight_in_a_graph() -> None:
    model = bert_model(1, **NO_DROPOUT).double()
    gm = ti_fx.capture(model, text_example())
    Recipe("learned", distill=Distill(scores=2.0, learned=("scores",))).prepare(gm)
    s = tensor(gm, S)
    assert s.dtype is torch.float64
    with torch.no_grad():
        s.fill_(0.3)
    result = gm(**text_example())
    raw = result["losses"]["scores"]
    others = sum(value for name, value in result["losses"].items() if name != "scores")
    torch.testing.assert_close(
        result["loss"], others + 2 * (math.exp(-0.3) * raw + 0.3), rtol=1e-12, atol=1e-12
    )
    result["loss"].backward()
    assert s.grad is not None
    torch.testing.assert_close(s.grad, 2 * (1 - math.exp(-0.3) * raw.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_micro_batches_learn_what_their_batch_does(tmp_path: Path) -> None:
    learned = recipe(Distill(learned=("scores", "logits")))
    options = {"max_steps": 2, "learning_rate": 1e-2}
    whole = trainer(tmp_path, learned, model=bert_model(1, **NO_DROPOUT), eval_dataset=None,
        arguments_options={**options, "per_device_train_batch_size": 4})  # fmt: skip
    parts = trainer(tmp_path, learned, model=bert_model(1, **NO_DROPOUT), eval_dataset=None,
        arguments_options={**options, "per_device_train_batch_size": 2, **TWICE})  # fmt: skip
    whole.train()
    parts.train()
    assert history(parts)[0]["loss"] == pytest.approx(history(whole)[0]["loss"], rel=1e-5)
    for term, value in whole.model.learned().items():
        assert value != 0
        assert parts.model.learned()[term] == pytest.approx(value, rel=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Recipe, Path]:
    folder = tmp_path_factory.mktemp("learned")
    both = recipe(Distill(learned=("scores", "logits")), layer_outputs=Curve("linear"))
    return (
        trained(folder, both, save_strategy="steps", save_steps=1, learning_rate=1e-2, **TWICE),
        both,
        folder,
    )


@pytest.mark.slow
def test_training_goes_on_with_the_same_bits(run: Any, tmp_path: Path) -> None:
    made, both, folder = run
    options = {"max_steps": 2, "learning_rate": 1e-2, **TWICE}
    resumed = trainer(tmp_path, both, model=bert_model(1), arguments_options=options, eval_dataset=None)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert different(weights(made), weights(resumed)) == []
    assert made.model.learned() == resumed.model.learned()
    assert all(value != 0 for value in made.model.learned().values())
    assert history(made) == history(resumed)


@pytest.mark.slow
def test_the_checkpoint_s_weights_and_the_student_hold_none_of_it(run: Any) -> None:
    made, _, folder = run
    assert S in made.model.state_dict()
    saved = safetensors.torch.load_file(folder / "checkpoint-2" / "model.safetensors")
    assert set(saved) == set(made.model.student_state())
    assert not [name for name in saved if name.startswith("loss")]
    for student in (made.student(), ti_fx.load(folder / "checkpoint-2", bert_model(1))):
        assert not [node for node in student.graph.nodes if "log_variance" in str(node.target)]
    assert not [name for name, _ in student.named_parameters() if name.startswith("loss")]


# --- the graph ------------------------------------------------------------------------------------------------------


def test_weights_are_put_back_and_variances_dropped(bert_layer: Tiny) -> None:
    gm = prepared(bert_layer)
    plain, names = ti_fx.dump(gm), set(gm.state_dict())
    ti_fx.Pipeline(WeighLosses(("scores", "logits")))(gm)
    assert ti_fx.Pipeline(WeighLosses(("scores", "logits")))(gm).changed is False
    assert set(gm.state_dict()) == names  # they follow from the step
    ti_fx.Pipeline(WeighLosses())(gm)
    assert ti_fx.dump(gm) == plain
    ti_fx.Pipeline(Distill(learned=("scores",)))(gm)
    with torch.no_grad():
        tensor(gm, S).fill_(0.5)
    ti_fx.Pipeline(Distill(learned=("logits", "scores")))(gm)
    assert float(tensor(gm, S).detach()) == 0.5  # it goes on from where it was
    ti_fx.Pipeline(Distill())(gm)
    assert ti_fx.dump(gm) == plain
    assert set(gm.state_dict()) == names
    ti_fx.Pipeline(Distill(learned=("scores",)), WeighLosses(("logits",)), Strip())(gm)
    assert not [name for name in gm.state_dict() if name.startswith("loss")]


def learned_graph(tiny: Tiny) -> GraphModule:
    gm = prepared(tiny)
    ti_fx.Pipeline(Distill(learned=("scores",)))(gm)
    return gm


def _weight_trained(gm: GraphModule) -> None:
    gm.get_submodule("loss_weights").get_buffer("logits").requires_grad_(True)


def _variance_frozen(gm: GraphModule) -> None:
    tensor(gm, S).requires_grad_(False)


@pytest.mark.parametrize("breaks", [_weight_trained, _variance_frozen])
def test_verify_knows_what_moves(breaks: Any, bert_layer: Tiny) -> None:
    gm = learned_graph(bert_layer)
    ti_fx.Pipeline(WeighLosses(("logits",)))(gm)
    ti_fx.verify(gm)
    breaks(gm)
    with pytest.raises(VerificationError, match="a weight that moves is a tensor of its own: %loss_"):
        ti_fx.verify(gm)
    assert isinstance(tensor(gm, S), nn.Parameter)


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_recipe_with_moved_weights_reads_back(suffix: str, tmp_path: Path) -> None:
    curves: dict[str, Any] = {"logits": Curve("cosine", 0.9, 0.1, 2, 0.5), "task": Curve("step", until=7)}
    written = recipe(Distill(task=0.5, learned=("scores",)), 0.5, **curves)
    written.save(tmp_path / f"recipe{suffix}")
    assert Recipe.load(tmp_path / f"recipe{suffix}") == written
    assert "weight of logits cosine 0.9 to 0.1 from 2 to 0.5" in str(written)
    assert ti_fx.Pass.parse("weigh-losses{terms=logits,scores}") == WeighLosses(("logits", "scores"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"schedule": [{"name": "a", "weights": []}]}, r"weights holds \[\]; it must hold a curve for each"),
        ({"schedule": [{"name": "a", "weights": {"logits": {"shap": 1}}}]}, "did you mean 'shape'"),
        ({"schedule": [{"name": "a", "weights": {"logit": {}}}]}, "no loss called 'logit'; did you mean 'logits'"),
        ({"schedule": [{"name": "a", "weights": {"logits": {"layers": [0]}}}]}, "weight of logits has no layers"),
        ({"schedule": [{"name": "a", "weights": {"maps": {}}}]}, "maps can't move, as it is 0; give distill: maps"),
        ({"schedule": [{"name": "a", "weights": {"task": {}}}]}, "task can't move, as it is 0"),
        ({"distill": {"learned": ["maps"]}}, "maps can't move, as it is 0"),
        ({"distill": {"learned": ["score"]}}, "can't learn the weight of 'score'; did you mean 'scores'"),
        ({"distill": {"task": 1, "learned": ["task"]}}, "can't learn the weight of 'task'"),
        ({"distill": {"learned": ["logits"]}, "schedule": [{"name": "a", "weights": {"logits": {}}}]},
            "logits is learned, and phase 'a' moves it"),
        ({"schedule": [{"name": "a", "steps": 1, "weights": {"logits": {}}}, {"name": "a"}]}, "two phases"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.from_dict({"name": "wrong", **values})
    assert "\n" not in str(caught.value)


def test_a_term_that_a_model_has_not_is_refused(bert_layer: Tiny) -> None:
    gm = prepared(bert_layer)
    for one, says in (
        (
            Distill(embeddings=1.0, learned=("embeddings",)),
            r"can't weigh 'embeddings', which is none of its terms",
        ),
        (WeighLosses(("maps",)), "finds no loss of the term 'maps'"),
    ):
        with pytest.raises(PreconditionError, match=says) as caught:
            ti_fx.Pipeline(one)(gm)
        assert "\n" not in str(caught.value)
