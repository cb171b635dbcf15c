"""What a quantiser of weights learns is trained with them, saved with them, and taken from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_attention import SmallAttention, example, small_attention

import ti_fx
from ti_fx import Recipe
from ti_fx.passes import Pack, Ternarize
from ti_fx.train import checkpoint
from ti_fx.train.model import TernaryModel

RECIPE = Recipe("lsq", ternarize=Ternarize(method="lsq", weights="row", min_rows=32))
STEP = "weight_quant.up.weight.step"


def prepared() -> TernaryModel:
    gm = small_attention()
    RECIPE.prepare(gm)
    return TernaryModel(gm, RECIPE)


@pytest.fixture(scope="module")
def trained() -> TernaryModel:
    """A model after three steps."""
    model = prepared().train()
    optimiser = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        model(**example())["loss"].backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(trained: TernaryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(
        path,
        trained,
        example=example(),
        source=checkpoint.source_facts(SmallAttention()),
        position={"step": 3},
    )
    return path


def test_the_optimiser_moves_what_is_learned(trained: TernaryModel) -> None:
    state = trained.state_dict()
    learned = [name for name in state if name.startswith("weight_quant.")]
    assert len(learned) == 7
    weight = SmallAttention().up.weight  # only its shape
    assert state[STEP].shape == (len(weight), 1)
    start = 2 * trained.get_parameter("teacher.up.weight").abs().mean(1, keepdim=True)
    assert not torch.isclose(state[STEP], start).any()


def test_a_checkpoint_has_it_once_and_gives_the_same_student(trained: TernaryModel, folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / checkpoint.WEIGHTS)
    assert torch.equal(stored[STEP], trained.state_dict()[STEP])
    student = ti_fx.load(folder, model=SmallAttention())
    with torch.no_grad():
        expected = trained(**example())
        assert torch.equal(student(**example()), expected)
        ti_fx.Pipeline(Pack())(student)
        assert torch.equal(student(**example()), expected)


def test_the_latent_weights_still_load_into_the_source_model(folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / checkpoint.WEIGHTS)
    missing, unexpected = SmallAttention().load_state_dict(stored, strict=False)
    assert not missing
    assert all(name.startswith("weight_quant.") for name in unexpected)


def test_training_goes_on_from_it(trained: TernaryModel, folder: Path) -> None:
    model = prepared()
    checkpoint.restore(model, folder, checkpoint.read_facts(folder))
    assert torch.equal(model.state_dict()[STEP], trained.state_dict()[STEP])


def test_a_step_is_no_weight_that_never_trains(trained: TernaryModel) -> None:
    assert not any(row.name.startswith("weight_quant.") for row in RECIPE.untrained(trained.prepared()))
