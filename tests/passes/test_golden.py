"""Golden texts: the difference each pass makes to a one-layer model; one flag updates them, never under CI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import PlainTransformer, Tiny, seeded, tokens
from torch.fx import GraphModule

import ti_fx
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    KeepLayers,
    Pack,
    PhaseIn,
    QuantizeActivations,
    Requantize,
    Strip,
    SubNorms,
    Ternarize,
    WeighLosses,
)
from ti_fx.passes.prepare.look_up_first import LookUpFirst
from ti_fx.passes.prepare.return_parts import ReturnParts

PLUGIN = Path(__file__).parents[1] / "support" / "golden_text.py"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with our golden fixture and one golden test."""
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "golden_text.py").write_text(PLUGIN.read_text())
    (tmp_path / "conftest.py").write_text("pytest_plugins = ['support.golden_text']\n")
    (tmp_path / "test_one.py").write_text("def test_one(golden):\n    golden('one', 'hello')\n")
    return tmp_path


def run(suite: Path, *options: str, ci: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    if ci is not None:
        environment["CI"] = ci
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)


def test_the_update_flag_is_refused_under_ci(suite: Path) -> None:
    result = run(suite, "--update-golden", ci="true")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--update-golden is refused where CI is set" in result.stderr
    assert not (suite / "golden").exists()


@pytest.mark.slow
def test_a_golden_text_is_written_by_the_flag_and_then_compared(suite: Path) -> None:
    missing = run(suite, ci="true")
    assert missing.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no golden text golden/one.txt" in missing.stdout

    assert run(suite, "--update-golden").returncode == pytest.ExitCode.OK
    assert (suite / "golden" / "one.txt").read_text() == "hello\n"
    assert run(suite, ci="true").returncode == pytest.ExitCode.OK

    (suite / "golden" / "one.txt").write_text("goodbye\n")
    changed = run(suite)
    assert changed.returncode == pytest.ExitCode.TESTS_FAILED
    assert "hello" in changed.stdout
    assert "goodbye" in changed.stdout


# What runs before the pass whose difference is compared. Prepare passes are shown where they come in a recipe.
GOLDEN: dict[str, tuple[tuple[Pass, ...], Pass]] = {
    "duplicate_teacher": ((), DuplicateTeacher()),
    "ternarize": ((), Ternarize()),
    "quantize_activations": ((Ternarize(),), QuantizeActivations()),
    "quantize_activations_attention": ((Ternarize(),), QuantizeActivations(attention=True)),
    "distill": ((DuplicateTeacher(),), Distill()),
    "distill_learned": ((DuplicateTeacher(), Distill()), Distill(learned=("scores",))),
    "sub_norms": ((DuplicateTeacher(), Ternarize()), SubNorms()),
    "phase_in": ((DuplicateTeacher(), Ternarize()), PhaseIn()),
    "weigh_losses": ((DuplicateTeacher(), Distill(scores=2.0)), WeighLosses(("logits", "scores"))),
    "intervene_map": ((DuplicateTeacher(),), Intervene(at="map")),
    "intervene_context": ((DuplicateTeacher(),), Intervene(at="context")),
    "intervene_output": ((DuplicateTeacher(),), Intervene(at="output")),
    "intervene_layer": ((DuplicateTeacher(),), Intervene(at="layer")),
    "intervene_ffn": ((DuplicateTeacher(),), Intervene(at="ffn")),
    "intervene_layer_blend": ((DuplicateTeacher(),), Intervene(at="layer", blend=True)),
    "intervene_output_tokens": ((DuplicateTeacher(),), Intervene(at="output", blend="tokens")),
    "strip": ((DuplicateTeacher(), Ternarize(), Distill(), Intervene(at="output")), Strip()),
    "pack": ((Ternarize(),), Pack()),
    "requantize": ((Ternarize(), QuantizeActivations(), Pack()), Requantize("int8-token")),
    "requantize_to_float": ((Ternarize(), QuantizeActivations(), Pack()), Requantize("float")),
    "requantize_from_float": ((Ternarize(), Pack()), Requantize("int8-token")),
    "look_up_first": ((Ternarize(),), LookUpFirst()),
    "return_parts": ((DuplicateTeacher(), Distill()), ReturnParts()),
}


def difference(gm: GraphModule, before: tuple[Pass, ...], one: Pass) -> str:
    ti_fx.Pipeline(*before)(gm)
    old = ti_fx.dump(gm)
    ti_fx.Pipeline(one)(gm)
    return ti_fx.diff(old, gm)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_difference_a_pass_makes(name: str, bert_layer: Tiny, golden: Callable[[str, str], None]) -> None:
    golden(name, difference(bert_layer.fork(), *GOLDEN[name]))


def test_the_difference_decompose_attention_makes(golden: Callable[[str, str], None]) -> None:
    gm = ti_fx.capture(seeded(lambda: PlainTransformer(layers=1)), {"tokens": tokens(), "keep": tokens()})
    golden("decompose_attention", difference(gm, (), DecomposeAttention()))


def test_the_difference_of_a_fused_projection_at_map(gpt2: Tiny, golden: Callable[[str, str], None]) -> None:
    golden(
        "intervene_map_fused", difference(gpt2.fork(), (DuplicateTeacher(),), Intervene("map", layers=(0,)))
    )
    blended = Intervene("map", layers=(0,), blend=True)
    golden("intervene_map_fused_blend", difference(gpt2.fork(), (DuplicateTeacher(),), blended))


def test_the_difference_keep_layers_makes(bert: Tiny, golden: Callable[[str, str], None]) -> None:
    golden("keep_layers", difference(bert.fork(), (DuplicateTeacher(),), KeepLayers(layers=(1,))))


def test_the_captured_layer(bert_layer: Tiny, golden: Callable[[str, str], None]) -> None:
    golden("capture", ti_fx.dump(bert_layer.graph))
