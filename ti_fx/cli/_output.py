"""Prints results for people and for pipes: colours and boxes on a terminal, plain unwrapped columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_ROLE_COLOURS = {"student": "blue", "teacher": "yellow", "shared": "bright_black", "loss": "magenta"}
_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}

Cell = str | int | float | None


def console() -> Console:
    """Return where results go: standard output, without colours in a pipe."""
    from rich.console import Console

    return Console(highlight=False, no_color=not sys.stdout.isatty())


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "") -> None:
    """Print a table: with lines on a terminal, as aligned columns in a pipe. Numbers are aligned right."""
    if not sys.stdout.isatty():
        _plain_table(columns, rows, title)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if _is_numeric(rows, index) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    console().print(made)


def shown(cell: Cell) -> str:
    """Return a cell as text: thousands separated, two decimals, a dash for None."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def say(text: str, style: str = "") -> None:
    """Print a line as it is, on a terminal in a style."""
    if sys.stdout.isatty():
        from rich.text import Text

        console().print(Text(text, style=style))
    else:
        print(text)


def graph_text(dump: str) -> None:
    """Print a dump, each node in its role's colour."""
    for line in dump.splitlines():
        role = next((role for role in _ROLE_COLOURS if f"#{role}" in line), "")
        say(line, _ROLE_COLOURS.get(role, ""))


def diff_text(diff: str) -> None:
    """Print a diff, additions and removals in colour."""
    for line in diff.splitlines():
        say(line, _DIFF_COLOURS.get(line[:1], ""))


def _is_numeric(rows: Sequence[Sequence[Cell]], index: int) -> bool:
    return all(isinstance(row[index], int | float | None) for row in rows)


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str) -> None:
    cells = [list(columns), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    numeric = [_is_numeric(rows, index) for index in range(len(columns))]
    if title:
        print(title)
    for row in cells:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(aligned).rstrip())
    print()
