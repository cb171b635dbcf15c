"""Imports point one way: a module imports from its own layer or a lower one, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# DESIGN: "Dependencies point one way". Lowest first; a package's name stands for everything in it.
LAYERS = (
    "errors files layout leaves numerics roles",
    "assertions comparison concrete dataflow decisions encodings feed_forward graph losses metadata normalise options "
    "pipeline program randomness selection sites steering stochastic_depth structure text tracing verify",
    "passes",
    "capture export",
    "recipe",
    "analysis train view",
    "__init__",  # the public names: what lies above them may use them
    "demo zoo",
    "cli",
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
# What a function imports from above its layer, and why: a pass measures the file that it would lead to.
ALLOWED = {("ti_fx.passes.quantize_activations", "ti_fx.export.choose")}
# Set before anything is imported, so any module may read it.
NAMES_FOR_ALL = {"__version__"}


def source_files(root: Path) -> dict[str, Path]:
    """Map the full name of each module (``ti_fx.passes.pack``; ``ti_fx.passes`` for its __init__) to its file."""
    modules = {}
    for folder, prefix in (("ti_fx", "ti_fx"), ("passes", "ti_fx.passes"), ("export", "ti_fx.export")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            linked = folder == "ti_fx" and parts[0] in ("passes", "export")
            if not linked:
                modules[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return modules


def layer_name(module: str) -> str:
    """Return the part of a module's name that LAYERS lists: ``ti_fx.passes.pack`` -> ``passes``."""
    return module.split(".")[1] if "." in module else "__init__"


def rank_of(module: str) -> int:
    return RANKS[layer_name(module)]


def imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int, bool]]:
    """Yield each ti_fx module that ``module`` imports, the line, and whether importing it runs that line."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, runs in walk(tree, runs=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *filter(None, [node.module])])
            names = [alias.name for alias in node.names]
            if base == "ti_fx":
                names = [name for name in names if name not in NAMES_FOR_ALL]
            # `from package import module` names a module; `from module import name` names what is in it.
            targets = [f"{base}.{name}" if f"{base}.{name}" in modules else base for name in names]
        else:
            continue
        for target in targets:
            if target == "ti_fx" or target.startswith("ti_fx."):
                yield target, node.lineno, runs


def walk(node: ast.AST, runs: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below ``node``, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        skipped = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types_only(child)
        yield child, runs
        yield from walk(child, runs and not skipped)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def check_layers(root: Path) -> list[str]:
    """Return one line for each import that points upwards."""
    modules = source_files(root)
    unknown = sorted({layer_name(module) for module in modules} - RANKS.keys())
    assert not unknown, f"in no layer: {', '.join(unknown)}; add each to LAYERS in tests/test_layers.py"
    wrong = []
    for module, path in modules.items():
        rank = rank_of(module)
        for target, line, _ in imports(module, path, modules):
            if rank_of(target) > rank and (module, target) not in ALLOWED:
                wrong.append(f"{path.relative_to(root)}:{line} imports {target}, which lies above it")
    return wrong


def check_circles(root: Path) -> None:
    """Raise CycleError if importing modules one after the other runs in a circle."""
    modules = source_files(root)
    graph = {
        module: {target for target, _, runs in imports(module, path, modules) if runs and target in modules}
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
        ("ti_fx/pipeline.py", "from ti_fx.passes.pack import Pack\n", "ti_fx.passes.pack"),
        ("ti_fx/pipeline.py", "def late():\n    from .passes import Pack\n", "ti_fx.passes"),
        ("passes/pack.py", "from ti_fx import capture\n", "ti_fx.capture"),
        ("passes/strip.py", "from .. import dump\n", "ti_fx"),
        ("export/onnx.py", "import ti_fx.train.trainer\n", "ti_fx.train.trainer"),
    ],
)
def test_an_import_that_points_upwards_is_found(tmp_path: Path, file: str, text: str, target: str) -> None:
    root = tree(tmp_path, {"ti_fx/__init__.py": "", "ti_fx/capture.py": "", "passes/pack.py": "", file: text})
    (line,) = check_layers(root)
    assert line.startswith(file)
    assert f"imports {target}," in line


def test_the_version_may_be_read_from_anywhere(tmp_path: Path) -> None:
    assert check_layers(tree(tmp_path, {"ti_fx/files.py": "from ti_fx import __version__\n"})) == []


def test_a_module_without_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="in no layer: news; add each to LAYERS"):
        check_layers(tree(tmp_path, {"ti_fx/news.py": ""}))


def test_a_circle_is_found(tmp_path: Path) -> None:
    circle = {"ti_fx/text.py": "import ti_fx.graph\n", "ti_fx/graph.py": "from ti_fx.text import dump\n"}
    with pytest.raises(CycleError):
        check_circles(tree(tmp_path, circle))
