"""Passes that other distributions register are found by name, in recipes and by the command line, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Tiny

import ti_fx
from ti_fx import Pass, Recipe
from ti_fx.errors import RecipeError

PASSES = '''
from dataclasses import dataclass

from torch import ops

from ti_fx import Pass
from ti_fx.ir import roles

@dataclass(frozen=True)
class ScaleLoss(Pass):
    """The loss is multiplied by a number.

    before:  return {loss: %loss, ...}    after:  %scaled = mul(%loss, by)    return {loss: %scaled, ...}
    """

    by: float = 2.0

    def apply(self, gm):
        output = gm.graph.output_node()
        for loss in [node for node in output.all_input_nodes if node.name == "loss"]:
            with gm.graph.inserting_before(output):
                scaled = gm.graph.call_function(ops.aten.mul.Tensor, (loss, self.by))
            scaled._rename("scaled")
            roles.set_role(scaled, "loss")
            output.replace_input_with(loss, scaled)

    def explain(self, gm):
        return f"multiplied by {self.by:g}"

class NoPass:
    pass
'''
FACTORY = """
from models import bert_model, text_example

def make():
    return bert_model(layers=1), text_example()
"""


def distribution(folder: Path, name: str, entries: dict[str, str], source: str = PASSES) -> None:
    """Write an installed distribution: a module, and beside it what an installer notes down."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    notes = folder / f"{module}-1.0.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (notes / "entry_points.txt").write_text("\n".join(["[ti_fx.passes]", *lines, ""]))


def in_a_fresh_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", *command], capture_output=True, text=True, env=environment, cwd=folder
    )


def ti_fx_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_a_fresh_process(folder, "from ti_fx.cli import main; main()", *arguments)


@pytest.fixture
def own_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered pass whose module only this test has, so that other tests' passes stay as they are."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    distribution(tmp_path, name, {"scale-loss": f"{name}:ScaleLoss"})
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_registered_pass_is_imported_when_it_is_asked_for(own_distribution: str, bert_layer: Tiny) -> None:
    assert "scale-loss" in Pass.known()
    one = Pass.parse("scale-loss{by=4.0}")
    assert type(one).__module__ == own_distribution
    assert str(one) == "scale-loss{by=4.0}"
    gm = bert_layer.fork()
    Recipe("plain").prepare(gm)
    assert ti_fx.Pipeline(one)(gm).passes[0].explanation == "multiplied by 4"
    assert "%scaled" in ti_fx.dump(gm)


def test_nothing_of_others_is_imported_for_a_pass_of_ti_fx(tmp_path: Path) -> None:
    distribution(tmp_path, "broken", {"scale-loss": "broken:ScaleLoss"}, "raise ValueError('two\\nlines')")
    code = "from ti_fx import Pass, passes; print(Pass.parse('ternarize'))"
    assert in_a_fresh_process(tmp_path, code).stdout == "ternarize\n"


def test_a_recipe_holds_registered_passes(own_distribution: str, tmp_path: Path, bert_layer: Tiny) -> None:
    one = Pass.parse("scale-loss{by=4.0}")
    recipe = Recipe("own", extra_passes=(one,))
    assert recipe.to_dict()["extra_passes"] == ["scale-loss{by=4.0}"]
    for suffix in ("json", "yaml"):
        recipe.save(tmp_path / f"recipe.{suffix}")
        assert Recipe.load(tmp_path / f"recipe.{suffix}") == recipe
    assert recipe.passes()[-1] == one
    assert "\n  scale-loss{by=4.0}\n" in str(recipe)
    gm = bert_layer.fork()
    assert recipe.prepare(gm).passes[-1].name == "scale-loss{by=4.0}"
    assert "%scaled" in ti_fx.dump(gm)
    assert torch.isfinite(gm(**bert_layer.example)["loss"])


def test_a_recipe_without_them_is_written_as_before() -> None:
    assert "extra_passes" not in Recipe.preset("ti-g").to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("strip", "recipe.extra_passes holds 'strip'; it must be a list of passes as text"),
        ([{}], r"recipe.extra_passes holds \[{}\]; it must be a list of passes as text"),
        (["strpi"], r"recipe.extra_passes: no pass is called 'strpi'; did you mean 'strip' or 'distill'\?"),
    ],
)
def test_what_is_no_list_of_passes_is_refused(value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        Recipe.from_dict({"name": "own", "extra_passes": value})


@pytest.mark.parametrize(
    ("entries", "source", "message"),
    [
        (
            {"scale-loss": "theirs:ScaleLoss"},
            "raise ValueError('two\\nlines')",
            "entry point 'scale-loss' of distribution theirs 1.0 can't be imported (ValueError: two lines); "
            "mend or uninstall it",
        ),
        (
            {"scale-loss": "theirs:NoPass"},
            PASSES,
            "entry point 'scale-loss' of distribution theirs 1.0 is theirs:NoPass, no subclass of Pass; mend it",
        ),
        (
            {"scale-loss": "theirs:Pass"},
            PASSES,
            "entry point 'scale-loss' of distribution theirs 1.0 is a pass that is called 'pass'; "
            "register it by that name",
        ),
        (
            {"strip": "theirs:ScaleLoss"},
            PASSES,
            "entry point 'strip' of distribution theirs 1.0 takes the name of a pass of ti_fx; "
            "give it another, or uninstall it",
        ),
    ],
    ids=["broken", "no pass", "another name", "a name of ti_fx"],
)
def test_a_bad_entry_point_is_refused_in_a_line(
    tmp_path: Path, entries: dict[str, str], source: str, message: str
) -> None:
    distribution(tmp_path, "theirs", entries, source)
    ran = ti_fx_command(tmp_path, "inspect", "--passes")
    assert (ran.returncode, ran.stderr) == (2, f"ti-fx: {message}\n")


@pytest.mark.slow
def test_one_name_of_two_distributions_is_refused(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        distribution(tmp_path, name, {"scale-loss": f"{name}:ScaleLoss"})
    ran = ti_fx_command(tmp_path, "inspect", "--passes")
    assert ran.returncode == 2
    for name in ("mine", "theirs"):
        assert f"entry point 'scale-loss' of distribution {name} 1.0" in ran.stderr
    assert ran.stderr.endswith(": uninstall one\n")
    assert ran.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_line_lists_and_runs_them(tmp_path: Path) -> None:
    distribution(tmp_path, "mine", {"scale-loss": "mine:ScaleLoss"})
    (tmp_path / "tiny.py").write_text(FACTORY)
    ran = ti_fx_command(tmp_path, "inspect", "--passes")
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = [" ".join(line.split()) for line in ran.stdout.splitlines()]
    assert "scale-loss The loss is multiplied by a number. mine" in rows
    assert any(
        row.startswith("ternarize ") and row.endswith(" ti_fx.passes.prepare.ternarize") for row in rows
    )
    ran = ti_fx_command(tmp_path, "inspect", "tiny:make", "--diff", "scale-loss{by=4.0}")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("first ran: decompose-attention, duplicate-teacher, ternarize, ")
    assert "\nscale-loss{by=4.0}: 1 added, 0 removed, 1 rewired\n" in ran.stdout
    assert "\nmultiplied by 4\n" in ran.stdout
    assert "\n+%scaled = " in ran.stdout
    (tmp_path / "own.json").write_text(json.dumps({"name": "own", "extra_passes": ["scale-loss"]}))
    ran = ti_fx_command(tmp_path, "inspect", "tiny:make", "--recipe", "own.json", "--dump", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    facts = json.loads(ran.stdout)
    assert [step["name"] for step in facts["passes"]][-2:] == ["scale-loss", "intervene"]
    assert "%scaled" in facts["dump"]
