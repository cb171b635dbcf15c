"""A node comes into a graph through ti_fx.ir.edit alone, which gives it a role and a place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

INSERTERS = {"inserting_before", "inserting_after", "create_node", "call_function"}
# ti_fx.ir.edit is that way; a graph's outputs are built where torch.export's are taken apart.
ALLOWED = {"ti_fx/ir/edit.py", "ti_fx/ir/outputs.py"}


def insertions(text: str) -> list[str]:
    """Return the calls of torch.fx that insert a node."""
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in INSERTERS]


def sources() -> list[Path]:
    return [path for room in ("ti_fx", "passes", "export") for path in sorted((ROOT / room).rglob("*.py"))]


def test_nodes_are_inserted_in_one_way() -> None:
    found = {
        name: calls
        for path in sources()
        if (calls := insertions(path.read_text(encoding="utf-8")))
        and (name := path.relative_to(ROOT).as_posix()) not in ALLOWED
    }
    assert not found


@pytest.mark.parametrize(
    "text", ["graph.call_function(f, ())", "with graph.inserting_before(node):\n    pass\n"]
)
def test_an_insertion_is_seen(text: str) -> None:
    assert insertions(text)
