"""``ti-fx train --pass`` runs a pass after the recipe's, and what it has trained is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from classifier import Train, ti_fx_command
from torch.fx import GraphModule

import ti_fx
from ti_fx import Pass, Recipe
from ti_fx.ir import roles
from ti_fx.ir.edit import call, supersede

aten = torch.ops.aten


@dataclass(frozen=True)
class SiluForGelu(Pass):
    """The student's GELU becomes SiLU; the teacher keeps its own."""

    runs: int = 1

    def apply(self, gm: GraphModule) -> None:
        for old in gm.graph.find_nodes(op="call_function", target=aten.gelu.default):
            if roles.is_student(old):
                new = call(old, aten.silu.default, old.args[:1])
                ti_fx.stands_for(new, old)
                supersede(old, new)


@pytest.mark.slow
def test_a_pass_of_ones_own(tmp_path: Path, train_command: Train) -> None:
    run, file = tmp_path / "run", tmp_path / "student.onnx"
    ran = train_command(run, "--pass", "silu-for-gelu{runs=2}")
    assert (ran.code, ran.err) == (0, "")
    assert "\n  silu-for-gelu{runs=2}\n" in ran.out
    assert Recipe.load(run / "recipe.json").extra_passes == (SiluForGelu(2),)
    assert "silu(" in ti_fx.dump(ti_fx.load(run))
    exported = ti_fx_command("export", run, "--out", file)
    assert (exported.code, exported.err) == (0, "")


def test_a_pass_that_nobody_knows(tmp_path: Path, train_command: Train) -> None:
    ran = train_command(tmp_path / "run", "--pass", "silu-for-relu")
    assert ran.code == 2
    assert ran.err.startswith("ti-fx: no pass is called 'silu-for-relu'; did you mean 'silu-for-gelu'")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
