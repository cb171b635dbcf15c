"""One byte of a file is another: it is found, and said in one line, or what comes out is the same."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import bert_model, text_example
from tiny_training import different, trainer, weights
from torch.fx import GraphModule
from transformers import AutoTokenizer

import ti_fx
from ti_fx import Pipeline
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, to_onnx
from ti_fx.export.file.content import open_file
from ti_fx.passes import Pack, QuantizeActivations, Ternarize
from ti_fx.train import TernaryTrainer


def flipped(folder: Path, seed: int, answer: Callable[[], Any], same: Callable[[Any], bool]) -> str | None:
    """Change one byte of one file, ask, and put it back; return what was said, None if nothing was.

    Args:
        folder: whose files are drawn from, each as often as its size's root says.
        seed: of what is drawn.
        answer: loads and runs what lies in the folder.
        same: whether an answer is right.
    """
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    (path,) = draw.choices(files, [path.stat().st_size ** 0.5 for path in files])
    content = path.read_bytes()
    place, change = (
        draw.randrange(len(content)),
        draw.choice([1, 2, 4, 8, 16, 32, 64, 128, draw.randrange(1, 256)]),
    )
    path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
    try:
        found = answer()
    except TiFxError as error:
        said = str(error)
        if "\n" in said:
            raise AssertionError(f"{path.name}: byte {place} changed by {change}: {said}") from error
        return said
    except Exception as error:
        raise AssertionError(f"{path.name}: byte {place} changed by {change}: a raw {error!r}") from error
    finally:
        path.write_bytes(content)
    assert same(found), f"{path.name}: byte {place} changed by {change}: another answer, and nothing said"
    return None


def seeds(few: int, many: int) -> list[Any]:
    """Return blocks of seeds: one in `make test`, the others in `make test-full`."""
    blocks = [range(few), *(range(start, min(start + 50, many)) for start in range(few, many, 50))]
    return [
        pytest.param(block, marks=[pytest.mark.slow] if block.start else [], id=f"{block.start}-{block.stop}")
        for block in blocks
    ]


# --- ONNX files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed() -> GraphModule:
    gm = ti_fx.capture(bert_model(layers=1), text_example())
    Pipeline(Ternarize(), QuantizeActivations(), Pack())(gm)
    return gm


@pytest.fixture(scope="module", params=[False, True], ids=["one file", "two files"])
def exported(
    request: pytest.FixtureRequest, packed: GraphModule, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    to_onnx(packed, path, text_example(), external_data=request.param)
    return path


@pytest.mark.parametrize("block", seeds(10, 250))
def test_a_flipped_byte_of_a_file_is_found_or_harmless(exported: Path, block: range) -> None:
    inputs = text_example()
    right = Runtime(exported, threads=1)(inputs)

    def same(found: dict[str, Any]) -> bool:
        return all(np.array_equal(found[name], value) for name, value in right.items())

    said = [
        flipped(exported.parent, seed, lambda: Runtime(exported, threads=1)(inputs), same) for seed in block
    ]
    assert sum(line is not None for line in said) > 0.9 * len(said)


def test_a_file_that_a_tool_wrote_anew_is_run(exported: Path, tmp_path: Path) -> None:
    for part in exported.parent.iterdir():
        shutil.copy(part, tmp_path)
    path = tmp_path / exported.name
    model = open_file(path).model
    model.doc_string = "written by another tool"
    path.write_bytes(model.SerializeToString())
    inputs = text_example()
    expected = Runtime(exported, threads=1)(inputs)
    assert all(
        np.array_equal(expected[name], value) for name, value in Runtime(path, threads=1)(inputs).items()
    )


# --- checkpoints ----------------------------------------------------------------------------------------------------

STEPS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TernaryTrainer:
    """A short run of a tiny classifier that left a checkpoint after its first step."""
    folder = tmp_path_factory.mktemp("run")
    made = trainer(
        folder,
        "ternarybert",
        model=bert_model(layers=1),
        arguments_options={"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1},
    )
    made.train()
    return made


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that a run of the command left, with its tokenizer and labels."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return Path(shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*")))


@pytest.mark.parametrize("block", seeds(3, 150))
def test_a_flipped_byte_of_a_checkpoint_is_found_or_harmless(saved: Path, block: range) -> None:
    inputs = text_example()

    def answer() -> Any:
        student = ti_fx.load(saved)
        tokens = AutoTokenizer.from_pretrained(saved)("how many w1")["input_ids"]
        with torch.no_grad():
            return student(**inputs).logits, tokens

    logits, tokens = answer()
    for seed in block:
        flipped(saved, seed, answer, lambda found: torch.equal(found[0], logits) and found[1] == tokens)


@pytest.mark.parametrize("block", seeds(4, 150))
def test_a_flipped_byte_of_a_training_state_is_found_or_harmless(
    run: TernaryTrainer, block: range, tmp_path: Path
) -> None:
    first = Path(str(run.args.output_dir)) / "checkpoint-1"
    resuming = trainer(
        tmp_path, "ternarybert", model=bert_model(layers=1), arguments_options={"max_steps": STEPS}
    )

    def answer() -> Any:
        resuming.train(resume_from_checkpoint=str(first))
        return weights(resuming)

    right = answer()
    assert different(right, weights(run)) == []
    said = [flipped(first, seed, answer, lambda found: different(found, right) == []) for seed in block]
    assert any(line is not None for line in said)
