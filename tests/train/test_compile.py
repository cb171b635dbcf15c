"""Compiled training: every phase equals eager, is compiled once, and nothing recompiles it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model, text_example
from tiny_training import different, history, rows, trainer, weights
from torch._dynamo.utils import counters

from ti_fx import Recipe
from ti_fx.passes import Intervene
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer

STEPS = 8
PHASES = ["output", "context", "map", "quantise"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES = [(batch, length) for batch in (2, 3, 5, 8) for length in (2, 3, 7, 16, 31)]


def ti_g(folder: Path, compile: str) -> TernaryTrainer:
    """Evaluates at every second step, so that training and evaluation alternate."""
    made = trainer(
        folder,
        model=bert_model(layers=1, **NO_DROPOUT),
        arguments_options={"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 2},
        compile=compile,
    )
    made.train()
    return made


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TernaryTrainer]:
    """A run of every phase; what is compiled, and how often, is mostly decided before a backend makes code of it."""
    torch._dynamo.reset()
    torch.compiler.set_default_backend(request.param)
    yield ti_g(tmp_path_factory.mktemp("compiled"), "on")
    torch.compiler.set_default_backend(None)


@contextmanager
def no_recompile() -> Iterator[None]:
    """Any recompilation is an error, and so is any new graph."""
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == before


def step(made: TernaryTrainer, batch: int, length: int) -> float:
    made.model.zero_grad()
    loss: Any = made.model.train()(**text_example(batch, length))["loss"]
    loss.backward()
    return float(loss.detach())


def test_compiled_losses_equal_eager_in_every_phase(compiled: TernaryTrainer, tmp_path: Path) -> None:
    eager = ti_g(tmp_path, "off")
    found, expected = history(compiled), history(eager)
    assert [entry["phase"] for entry in found] == ["output", "context", *["map"] * 4, *["quantise"] * 2]
    for one, other in zip(found, expected, strict=True):
        for name in other:
            if name.startswith("loss"):
                # Inductor fuses and reorders float32 sums; a value at a rounding edge of int8 or at a ternary
                # threshold may fall to the other side: one step in 255 of one activation, one weight of a thousand.
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-6), (one["step"], name)


@pytest.mark.slow
def test_the_default_backend_computes_the_same_losses_at_every_shape(tmp_path: Path) -> None:
    """In the phase with the most in its graph: student, teacher, what it intervenes with, and every loss."""

    def trained(compile: str) -> TernaryTrainer:
        made = trainer(
            tmp_path,
            Recipe("one", schedule=(Phase("map", Intervene("map")),)),
            model=bert_model(layers=1, **NO_DROPOUT),
            arguments_options={"max_steps": 2},
            eval_dataset=None,
            compile=compile,
        )
        made.train()
        return made

    def losses(made: TernaryTrainer) -> list[float]:
        return [entry[name] for entry in history(made) for name in entry if name.startswith("loss")]

    torch._dynamo.reset()
    found, expected = trained("on"), trained("off")
    assert len(losses(found)) == 10
    # as above: float32 sums in another order, and rounding edges
    assert losses(found) == pytest.approx(losses(expected), rel=2e-3, abs=1e-6)
    with no_recompile():
        for batch, length in SHAPES:
            step(found, batch, length)


def test_each_phase_is_one_graph(compiled: TernaryTrainer) -> None:
    records = compiled.model.compile_records()
    assert list(records) == PHASES
    assert {name: record.graphs for name, record in records.items()} == dict.fromkeys(PHASES, 1)
    assert [record.calls for record in records.values()] == [1, 1, 4, 2]
    assert all(record.seconds > 0 for record in records.values())


def test_phases_shapes_and_evaluation_never_recompile(compiled: TernaryTrainer) -> None:
    model = compiled.model
    with no_recompile():
        for batch, length in SHAPES:
            for phase in compiled.recipe.phases():
                model.enter(phase)
                step(compiled, batch, length)
            with torch.no_grad():
                model.eval()(**text_example(batch, length))
    assert {record.graphs for record in model.compile_records().values()} == {1}


def test_the_same_losses_at_other_shapes(compiled: TernaryTrainer) -> None:
    model = compiled.model
    for phase in compiled.recipe.phases():
        model.enter(phase)
        graph = model.runners()[1].train()
        for batch, length in SHAPES[::6]:
            expected = float(graph(**text_example(batch, length))["loss"].detach())
            # as above: float32 sums in another order, and rounding edges
            assert step(compiled, batch, length) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_compiled_training_resumes_bit_equal_with_dropout(tmp_path: Path) -> None:
    """The lengths differ, so the two runs would compile at different ones if a checkpoint did not say which."""
    data = [
        {name: row[name][: sum(row["attention_mask"])] for name in ("input_ids", "attention_mask")}
        for row in rows(16)
    ]
    data = sorted(data, key=lambda row: len(row["input_ids"]))

    def made(folder: Path) -> TernaryTrainer:
        options = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            "train_sampling_strategy": "sequential",
        }
        return trainer(
            folder,
            Recipe("plain", schedule=(Phase("quantise"),)),
            model=bert_model(layers=1),
            arguments_options=options,
            train_dataset=data,
            eval_dataset=None,
            compile="on",
        )

    whole = made(tmp_path / "whole")
    whole.train()
    first = [{"input_ids": [4, 5], "attention_mask": [4, 5]}]
    assert whole.model.compiled_shapes() == {"quantise": first}
    resumed = made(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.model.compiled_shapes() == {"quantise": first}
    assert different(weights(whole), weights(resumed)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 1)])
def test_size_one_adds_at_most_one_graph_each(batch: int, length: int, compiled: TernaryTrainer) -> None:
    model = compiled.model
    for phase in compiled.recipe.phases():
        model.enter(phase)
        graph = model.runners()[1].train()
        before = model.compile_records()[phase.name].graphs
        expected = float(graph(**text_example(batch, length))["loss"].detach())
        assert step(compiled, batch, length) == pytest.approx(expected, rel=2e-3)
        assert model.compile_records()[phase.name].graphs <= before + 1
        with no_recompile():
            step(compiled, batch, length)
            step(compiled, batch + (batch > 1), length + (length > 1))
            step(compiled, 4, 9)
