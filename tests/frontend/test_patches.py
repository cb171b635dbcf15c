"""Every internal of torch and transformers that a trace touches: known, named when it is not, and put back."""

from __future__ import annotations

import ast
import configparser
import os
import pkgutil
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel, PreTrainedModel
from transformers.utils.import_utils import torch_compilable_check

import ti_fx
from ti_fx.errors import CaptureError, InputError, VersionError
from ti_fx.frontend import patches
from ti_fx.frontend.internals import INTERNALS, KNOWN, Internal
from ti_fx.frontend.model_checks import kept_checks

ROOT = next(parent for parent in Path(__file__).parents if (parent / "setup.cfg").is_file())
INSTALLED = {library.__name__: library.__version__.partition("+")[0] for library in (torch, transformers)}
FAST_PATH = torch.backends.mha.get_fastpath_enabled
IN_A_CONFIGURATION = "transformers.configuration_utils.PreTrainedConfig."


class DecidingMixtral(MixtralModel):  # type: ignore[no-untyped-call]
    """Experts, attention masks, and Python that reads a value: a capture needs every row of the table."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if (input_ids > 90).all():
            input_ids = input_ids - 1
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return DecidingMixtral(
        MixtralConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def example() -> dict[str, Tensor]:
    ids = torch.arange(10).view(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def owner_of(row: Internal, model: PreTrainedModel) -> tuple[Any, str]:
    """Return what has the attribute, and its name there."""
    owner, _, attribute = row.name.rpartition(".")
    return model.config if row.name.startswith(IN_A_CONFIGURATION) else pkgutil.resolve_name(owner), attribute


def seen_by_all(model: PreTrainedModel) -> dict[str, Any]:
    """Return everything outside a graph that a capture may change, by name."""
    found: dict[str, Any] = {row.name: getattr(*owner_of(row, model), "missing") for row in INTERNALS}
    for module in (random, numpy.random):
        found |= {
            f"{module.__name__}.{name}": value for name, value in vars(module).items() if callable(value)
        }
    return found | {
        "fast path": FAST_PATH(),
        "environment": dict(os.environ),
        "forward": model.__dict__.get("forward"),
        "training": model.training,
    }


def test_after_a_capture_nothing_of_torch_or_transformers_differs(model: PreTrainedModel) -> None:
    before = seen_by_all(model)
    gm = ti_fx.capture(model, example())
    assert seen_by_all(model) == before
    assert ti_fx.capture_report(gm).attention == "eager"
    assert any("test_patches.py" in line for line in ti_fx.capture_report(gm).followed)


def use(row: Internal, model: PreTrainedModel) -> None:
    """Do what uses an internal."""
    if row.name.startswith("torch._inductor"):  # what is done once
        patches.no_guard_on_accumulation.cache_clear()
        patches.no_guard_on_accumulation()
    elif row.name.endswith("._non_vmap_expansion_sdpa"):  # transformers itself uses it before the trace
        with patches.broadcast_masks():
            pass
    elif row.name.startswith("torch.onnx"):
        with patches.decomposed_where_needed(lambda program, registry: True):
            pass
    else:
        ti_fx.capture(model, example())


def said(row: Internal, what: str) -> str:
    library = row.name.partition(".")[0]
    known = KNOWN[library]
    return (
        f"ti_fx knows {library} {', '.join(known)}, this is {INSTALLED[library]}: {what}; install {library} "
        f"{known[-1]} or report this"
    )


@pytest.mark.parametrize("row", INTERNALS, ids=lambda row: row.name)
def test_an_internal_that_is_gone_is_named(
    row: Internal, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = seen_by_all(model)
    with monkeypatch.context() as broken:
        broken.delattr(*owner_of(row, model))
        without = seen_by_all(model)
        with pytest.raises(VersionError) as raised:
            use(row, model)
        assert seen_by_all(model) == without
    assert str(raised.value) == said(row, f"{row.name}{row.parameters or ''} is not there")
    assert isinstance(raised.value, CaptureError)
    assert seen_by_all(model) == before


@pytest.mark.parametrize("row", [row for row in INTERNALS if row.parameters], ids=lambda row: row.name)
def test_an_internal_that_takes_other_parameters_is_named(
    row: Internal, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(*owner_of(row, model), lambda other, *, name=None: None)
        changed = seen_by_all(model)
        with pytest.raises(VersionError) as raised:
            use(row, model)
        assert seen_by_all(model) == changed
    assert str(raised.value) == said(row, f"{row.name} takes (other, *, name) instead of {row.parameters}")


def test_inductor_compiles_without_the_guard_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.cpp import CppKernel

    original = CppKernel.need_use_acc_helper
    monkeypatch.setattr(CppKernel, "need_use_acc_helper", original)
    patches.no_guard_on_accumulation.cache_clear()
    patches.no_guard_on_accumulation()
    patches.no_guard_on_accumulation()
    assert CppKernel.need_use_acc_helper.__wrapped__ is original  # type: ignore[attr-defined]


def test_an_internal_that_is_no_function_any_more_is_named(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "to", 1)
    with pytest.raises(VersionError, match=r"Module\.to takes what can't be told instead of \(self, "):
        ti_fx.capture(model, example())


@pytest.mark.parametrize(
    "patch",
    [
        patches.traceable,
        lambda model: patches.plain_torch_layers(),
        lambda model: patches.no_empty_selections(lambda: True),
        lambda model: kept_checks(),
        lambda model: patches.broadcast_masks(),
        lambda model: patches.modules_stay(),
    ],
    ids=["traceable", "layers", "selections", "checks", "masks", "modules"],
)
def test_a_patch_goes_when_its_body_fails(
    patch: Callable[[nn.Module], AbstractContextManager[Any]], model: PreTrainedModel
) -> None:
    before = seen_by_all(model)

    def run() -> None:
        with patch(model), patch(model):  # within itself, too
            assert seen_by_all(model) != before
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        run()
    assert seen_by_all(model) == before


def test_a_switched_off_check_of_transformers_stays_so(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    with kept_checks():
        torch_compilable_check(False, "off")
    torch_compilable_check(False, "off")


def test_a_failed_capture_leaves_nothing_changed(model: PreTrainedModel) -> None:
    before = seen_by_all(model)
    with pytest.raises(InputError, match="give inputs that it takes"):
        ti_fx.capture(model, {**example(), "input_ids": torch.full((2, 5), 1000)})
    assert seen_by_all(model) == before


def test_the_known_releases_are_those_that_setup_cfg_begins_with() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = [line for line in settings["options"]["install_requires"].splitlines() if line]
    ranges = {
        one.name: one.specifier
        for one in map(Requirement, (line.partition("#")[0] for line in lines if line[0] != "#"))
    }
    for library, releases in KNOWN.items():
        assert f">={releases[0]}" in str(ranges[library])
        assert all(release in ranges[library] for release in releases)
        assert INSTALLED[library].startswith(releases)


def assigned_in_a_library(path: Path) -> list[str]:
    """Return the assignments to attributes of what a file imports from torch or transformers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            kept = [alias.name.partition(".")[0] in KNOWN for alias in node.names]
            imported |= {name for name, keep in zip(names, kept, strict=True) if keep}
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in KNOWN:
            imported |= {alias.asname or alias.name for alias in node.names}
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += [part for target in node.targets for part in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets.append(ast.Attribute(node.args[0], "..."))
    found = []
    for target in targets:
        root = target
        while isinstance(root, ast.Attribute):
            root = root.value
        if root is not target and isinstance(root, ast.Name) and root.id in imported:
            found.append(f"{path.relative_to(ROOT)}: {ast.unparse(target)}")
    return found


def test_no_other_file_changes_a_library() -> None:
    files = [
        path
        for folder in ("ti_fx", "passes", "export", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 100
    assert [line for path in files for line in assigned_in_a_library(path)] == []


def test_a_change_of_a_library_is_seen(tmp_path: Path) -> None:
    path = ROOT / "tests" / "frontend" / "test_patches.py"
    assert assigned_in_a_library(path) == []
    changes = (
        "import torch.nn\nfrom torch import nn\nnn.Module.to = torch.x, y = 1, 2\nsetattr(torch.nn, 'a', 1)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        (tmp_path / "made.py").write_text(changes)
        found = assigned_in_a_library(tmp_path / "made.py")
    assert found == ["made.py: nn.Module.to", "made.py: torch.x", "made.py: torch.nn...."]
