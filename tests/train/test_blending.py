"""Curves move the shares of blends: their formulas, recipes, steps, resuming, compiling, and what is exported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny, bert_model, llama_model, text_example, vit_model
from tiny_training import NO_DROPOUT, At, different, history, rows, trainer, weights
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import RecipeError
from ti_fx.export import Runtime, to_onnx
from ti_fx.ir.blends import shares
from ti_fx.passes import Distill, Intervene, Pack
from ti_fx.recipe import Curve, Phase
from ti_fx.train import TernaryTrainer
from ti_fx.train.blending import move_shares, shares_at

LAYER = Intervene("layer", blend=True)


def recipe(*curves: Curve, intervene: Intervene = LAYER, steps: float | None = None) -> Recipe:
    last = () if steps is None else (Phase("quantise"),)
    return Recipe("blended", schedule=(Phase("blend", intervene, steps, curves=curves), *last))


@pytest.fixture
def blended(prepared_bert: GraphModule) -> GraphModule:
    """BERT whose two layers read a blend."""
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(LAYER)(gm)
    return gm


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (Curve(), [1.0, 0.75, 0.5, 0.25]),
        (Curve("constant", 0.3), [0.3] * 4),
        (Curve("step", until=0.5), [1.0, 1.0, 0.0, 0.0]),
        (Curve("step", until=3), [1.0, 1.0, 1.0, 0.0]),
        (Curve("linear", 0.0, 1.0, begin=1, until=3), [0.0, 0.0, 0.5, 1.0]),
        (Curve("cosine"), [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        (Curve("linear", 0.8, 0.2, begin=0.5), [0.8, 0.8, 0.8, 0.5]),
        (Curve("step", begin=2, until=2), [1.0, 1.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_a_curve_is_its_formula(curve: Curve, expected: list[float]) -> None:
    assert [curve.share(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-12)


def test_layers_are_released_one_after_the_other() -> None:
    front, back = Curve("step", order="front-to-back"), Curve("linear", order="back-to-front")
    assert [[front.share(step, 6, place, 3) for place in range(3)] for step in (0, 2, 4, 5)] == [
        [1, 1, 1],
        [0, 1, 1],
        [0, 0, 1],
        [0, 0, 1],
    ]
    assert [back.share(1, 6, place, 3) for place in range(3)] == [1, 1, 0.5]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_recipe_with_curves_reads_back(suffix: str, tmp_path: Path) -> None:
    written = recipe(
        Curve("cosine", 0.9, 0.1, 2, 0.5, "back-to-front", "layer", (0, 1), 0),
        Curve("step", until=7),
        intervene=Intervene("layer+ffn", blend="tokens"),
        steps=0.5,
    )
    written.save(tmp_path / f"recipe{suffix}")
    read = Recipe.load(tmp_path / f"recipe{suffix}")
    assert read == written
    assert isinstance(read.phases()[0].curves[0].begin, int)
    assert isinstance(read.phases()[0].curves[0].until, float)


def test_published_recipes_are_written_as_before() -> None:
    phase = Recipe.preset("ti-m").to_dict()["schedule"][0]
    assert phase == {
        "name": "map",
        "intervene": {
            "at": "map", "layers": None, "stack": None, "kind": None, "keep_encoder_gradient": False,
        },
        "steps": 60,
        "restart": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"intervene": {"at": "layer", "blend": True}}, "blends, and no curve moves its shares"),
        ({"intervene": {"at": "layer"}, "curves": [{}]}, "has curves and blends nothing"),
        ({"intervene": {"blend": True}, "curves": [{}]}, "blends at no point"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": {}}, r"curves holds \{\}; it must be a list"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": ["linear"]}, r"curves\[0\] holds 'linear'"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"shap": "step"}]}, "did you mean 'shape'"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"shape": "square"}]}, "'square' does not fit"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"start": 2}]}, "start is 2.0; a share is from 0"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"until": 1.5}]}, "until is 1.5; give a whole"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"at": "fnn"}]}, "can't move 'fnn'; did you mean"),
        ({"intervene": {"at": "layer", "blend": True}, "curves": [{"at": "ffn"}]}, "a curve for 'ffn', and intervenes"),
        ({"intervene": {"at": "layer", "blend": "words"}, "curves": [{}]}, "blend='words' does not fit"),
    ],
)  # fmt: skip
def test_a_phase_that_blends_wrongly_is_refused_in_one_line(phase: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.from_dict({"name": "wrong", "schedule": [{"name": "blend", **phase}]})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TernaryTrainer, list[list[float]], Path]:
    """The recipe layer-blend over 8 steps of two micro-batches, the shares in each step, and its checkpoints."""
    folder = tmp_path_factory.mktemp("blend")
    made = trainer(folder, "layer-blend", arguments_options={
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None,
    })  # fmt: skip
    seen: list[list[float]] = []
    made.add_callback(At(end=lambda step: seen.append([*made.model.shares().values()])))
    made.train()
    return made, seen, folder


def test_the_share_falls_over_half_of_training_and_is_logged(run: Any) -> None:
    made, seen, _ = run
    assert [set(values) for values in seen] == [{1.0}, {0.75}, {0.5}, {0.25}, set(), set(), set(), set()]
    assert [len(values) for values in seen[:4]] == [2] * 4
    logged = history(made)
    assert [entry.get("blend_layer") for entry in logged] == [1.0, 0.75, 0.5, 0.25, None, None, None, None]
    assert [entry["phase"] for entry in logged] == ["blend"] * 4 + ["quantise"] * 4


def test_training_goes_on_in_the_middle_of_a_curve_with_the_same_bits(run: Any, tmp_path: Path) -> None:
    made, _, folder = run
    resumed = trainer(tmp_path, "layer-blend", arguments_options={"gradient_accumulation_steps": 2})
    seen: list[set[float]] = []
    resumed.add_callback(At(begin=lambda step: seen.append({*resumed.model.shares().values()})))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert seen[:2] == [{0.75}, {0.5}]  # as the checkpoint left them, and as the next step set them
    assert different(weights(made), weights(resumed)) == []
    assert [entry["loss"] for entry in history(resumed)] == [entry["loss"] for entry in history(made)]


@pytest.mark.slow
def test_the_checkpoint_and_the_student_hold_no_share(run: Any) -> None:
    made, _, folder = run
    assert not [name for name in made.model.state_dict() if "blend" in name]
    student = ti_fx.load(folder / "checkpoint-2", bert_model())
    assert not [name for name, _ in student.named_buffers() if "blend" in name]


@pytest.mark.slow
def test_a_share_of_one_trains_as_the_intervention_and_zero_as_none(tmp_path: Path) -> None:
    """Without weight decay: a gradient of zeros moves no weight, as none does."""

    def trained(schedule: Phase) -> dict[str, torch.Tensor]:
        options = {"max_steps": 3, "weight_decay": 0.0}
        made = trainer(tmp_path, Recipe("one", schedule=(schedule,)), arguments_options=options)
        made.train()
        return weights(made)

    for share, same in ((1.0, Intervene("layer+map")), (0.0, Intervene())):
        blended = Phase("blend", Intervene("layer+map", blend=True), curves=(Curve("constant", share),))
        assert different(trained(blended), trained(Phase("plain", same))) == []


@pytest.mark.slow
def test_moving_shares_never_recompile(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.compiler.set_default_backend("eager")
    try:
        blended = recipe(
            Curve(at="layer", order="front-to-back"),
            Curve("cosine"),
            intervene=Intervene("layer+map", blend=True),
        )
        made = trainer(tmp_path, blended, model=bert_model(2, **NO_DROPOUT), compile="on", eval_dataset=None)
        before = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            made.train()
        assert counters["stats"]["unique_graphs"] == before + 1
        assert made.model.compile_records()["blend"].graphs == 1
        plain = trainer(tmp_path, blended, model=bert_model(2, **NO_DROPOUT), eval_dataset=None)
        plain.train()
        for one, other in zip(history(made), history(plain), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["blend_layer"] == other["blend_layer"]
            assert one["blend_map"] == other["blend_map"]
    finally:
        torch.compiler.set_default_backend(None)


@pytest.mark.slow
@pytest.mark.parametrize("each", [pytest.param("rows", marks=pytest.mark.slow), "tokens"])
def test_rows_and_tokens_are_drawn_in_training_alone(each: Any, tmp_path: Path) -> None:
    intervene = Intervene("layer+map", blend=each)
    made = trainer(
        tmp_path, recipe(Curve("constant", 0.5), intervene=intervene), model=bert_model(2, **NO_DROPOUT)
    )
    made.train()
    made.evaluate()  # and back
    gm = made.model.runners()[1]
    drawn = [module for module in gm.modules() if type(module).__name__ == "DrawnShare"]
    assert len(drawn) == 4
    made.model.eval()
    assert not any(module.training for module in drawn)
    made.model.train()
    assert all(module.training for module in drawn)
    torch.manual_seed(0)
    losses = {float(gm(**text_example())["loss"].detach()) for _ in range(3)}
    assert len(losses) == 3


def test_a_curve_that_moves_nothing_and_a_site_without_one_are_refused(blended: GraphModule) -> None:
    for curves, says in (
        ((Curve(layers=(0,)),), r"has no curve for %\w+ \(layer, stack 0, layer 1\)"),
        ((Curve(), Curve(layers=(9,))), "has a curve that moves nothing"),
    ):
        with pytest.raises(RecipeError, match=says):
            shares_at(recipe(*curves).phases()[0], shares(blended), 0, 8)


def test_shares_are_a_function_of_the_step(blended: GraphModule) -> None:
    phase = recipe(Curve(), steps=0.5).phases()[0]
    assert {*shares_at(phase, shares(blended), 3, 12).values()} == {0.75}
    assert move_shares(blended, phase, 6, 12) == {"layer": 0.5}
    assert {float(one.value) for one in shares(blended)} == {0.5}


def test_what_never_trains_under_a_share_of_one(bert: Tiny) -> None:
    """Without losses at the layers, only the last layer is trained by what it computes."""
    distill = Distill(layer_outputs=0.0, scores=0.0, attention_outputs=0.0)

    def left(*curves: Curve) -> set[str]:
        gm = bert.fork()
        phase = Phase("blend", LAYER, curves=curves)
        made = Recipe("one", distill=distill, schedule=(phase,))
        made.prepare(gm)
        return {row.name for row in made.untrained(gm) if row.cause == "intervened"}

    assert left(Curve()) == set()
    still = left(Curve("constant", 1.0))
    assert "bert.encoder.layer.0.output.dense.weight" in still
    assert not any(".layer.1." in name for name in still)


def images(count: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator)} for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "data", "example"),
    [
        (bert_model, rows, text_example()),
        (llama_model, lambda count: rows(count, labels=False), text_example()),
        (vit_model, images, {"pixel_values": torch.randn(2, 3, 8, 8)}),
    ],
    ids=["bert", "llama", "vit"],
)
def test_layer_blend_trains_and_exports(
    make: Callable[[], Any], data: Callable[[int], Any], example: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    made = trainer(tmp_path, "layer-blend", model=make(), train_dataset=data(16), eval_dataset=None,
        arguments_options={"max_steps": 4})  # fmt: skip
    made.train()
    assert [entry.get("blend_layer") for entry in history(made)] == [1.0, 0.5, None, None]
    student = made.student()
    Pack()(student)
    report = to_onnx(student, tmp_path / "student.onnx", example)
    assert report.bytes > 0
    Runtime(tmp_path / "student.onnx")
