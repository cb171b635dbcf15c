"""Imports point one way: a module imports from its own layer or a lower one, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

# Lowest first, a room a row; a room's name stands for everything in it that has no row of its own.
LAYERS = (
    "errors _version _checkout",
    "files",
    "numerics",
    "ir",
    "find",
    "passes",
    "frontend",
    "export.core_operators export.arguments export.report export.inputs export.student",
    "export.file",
    "export.cached",
    "export.run",
    "export.compare",
    "export.lowered export.writer export.pack_from",
    "export",
    "phases",
    "presets",
    "recipe",
    "example_inputs",
    "measure",
    "analysis",
    "view",
    "train",
    "__init__",  # the public names: what lies above them may use them
    "zoo",
    "demo",
    "cli",
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def source_files(root: Path) -> dict[str, Path]:
    """Map each module's full name (``ti_fx.passes.deploy.pack``; ``ti_fx.passes`` for its __init__) to its file."""
    modules = {}
    for folder, prefix in (("ti_fx", "ti_fx"), ("passes", "ti_fx.passes"), ("export", "ti_fx.export")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            linked = folder == "ti_fx" and parts[0] in ("passes", "export")
            if not linked:
                modules[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return modules


def layer_name(module: str) -> str:
    """Return the part of a module's name that LAYERS lists, such as ``export.file``."""
    parts = module.split(".")[1:3]
    longest = ".".join(parts)
    return longest if longest in RANKS else parts[0] if parts else "__init__"


def rank_of(module: str) -> int:
    return RANKS[layer_name(module)]


def imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield each ti_fx module that ``module`` imports, and the line; what only types need is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *filter(None, [node.module])])
            names = [alias.name for alias in node.names]
            # `from package import module` names a module; `from module import name` names what is in it.
            targets = [f"{base}.{name}" if f"{base}.{name}" in modules else base for name in names]
        else:
            continue
        for target in targets:
            if target == "ti_fx" or target.startswith("ti_fx."):
                yield target, node.lineno


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node below ``node`` but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not is_for_types_only(child):
            yield child
            yield from walk(child)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def check_layers(root: Path) -> list[str]:
    """Return one line for each import that points upwards."""
    modules = source_files(root)
    unknown = sorted({layer_name(module) for module in modules} - RANKS.keys())
    assert not unknown, (
        f"in no layer: {', '.join(unknown)}; add each to LAYERS in tests/repository/test_layers.py"
    )
    wrong = []
    for module, path in modules.items():
        rank = rank_of(module)
        for target, line in imports(module, path, modules):
            if rank_of(target) > rank:
                wrong.append(f"{path.relative_to(root)}:{line} imports {target}, which lies above it")
    return wrong


def check_circles(root: Path) -> None:
    """Raise CycleError if modules import each other in a circle, be it within functions."""
    modules = source_files(root)
    graph = {
        module: {target for target, _ in imports(module, path, modules) if target in modules}
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()


def test_imports_point_one_way() -> None:
    assert check_layers(ROOT) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    check_circles(ROOT)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("ti_fx/ir/pipeline.py", "from ti_fx.passes.deploy.pack import Pack\n", "ti_fx.passes.deploy.pack"),
        ("ti_fx/ir/pipeline.py", "def late():\n    from ..passes import deploy\n", "ti_fx.passes"),
        ("passes/deploy/strip.py", "from ti_fx import capture\n", "ti_fx"),
        ("export/writer.py", "import ti_fx.train.trainer\n", "ti_fx.train.trainer"),
        ("export/file/names.py", "from ti_fx.export.writer import to_onnx\n", "ti_fx.export.writer"),
    ],
)
def test_an_import_that_points_upwards_is_found(tmp_path: Path, file: str, text: str, target: str) -> None:
    root = tree(
        tmp_path, {"ti_fx/__init__.py": "", "passes/deploy/pack.py": "", "export/writer.py": "", file: text}
    )
    (line,) = check_layers(root)
    assert line.startswith(file)
    assert f"imports {target}," in line


def test_a_module_without_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="in no layer: news; add each to LAYERS"):
        check_layers(tree(tmp_path, {"ti_fx/news.py": ""}))


@pytest.mark.parametrize(
    "late", ["from ti_fx.ir.text import dump\n", "def dumped():\n    from ti_fx.ir.text import dump\n"]
)
def test_a_circle_is_found_also_where_a_function_hides_it(tmp_path: Path, late: str) -> None:
    circle = {"ti_fx/ir/text.py": "import ti_fx.ir.edit\n", "ti_fx/ir/edit.py": late}
    with pytest.raises(CycleError):
        check_circles(tree(tmp_path, circle))
