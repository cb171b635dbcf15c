"""Output for people and for pipes: colours and boxes on a terminal, plain unwrapped columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ROLE_COLOURS = {"student": "blue", "teacher": "yellow", "shared": "bright_black", "loss": "magenta"}
_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
_UNWRAPPED = 100_000

Cell = str | int | float | None


def console() -> Console:
    """Return where results go: standard output, never wrapped in a pipe."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_UNWRAPPED, no_color=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "") -> None:
    """Print a table: with lines on a terminal, as aligned columns in a pipe. Numbers are aligned right."""
    out = console()
    if not out.is_terminal:
        _plain_table(columns, rows, title)
        return
    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for index, name in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in rows)
        made.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    out.print(made)


def shown(cell: Cell) -> str:
    """Return a cell as text: thousands separated, two decimals, a dash for None."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def say(text: str) -> None:
    """Print a line as it is."""
    console().print(Text(text))


def graph_text(dump: str) -> None:
    """Print a dump, each node in its role's colour."""
    out = console()
    for line in dump.splitlines():
        role = next((role for role in _ROLE_COLOURS if f"#{role}" in line), "")
        out.print(Text(line, style=_ROLE_COLOURS.get(role, "")))


def diff_text(diff: str) -> None:
    """Print a diff, additions and removals in colour."""
    out = console()
    for line in diff.splitlines():
        out.print(Text(line, style=_DIFF_COLOURS.get(line[:1], "")))


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str) -> None:
    cells = [list(columns), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    if title:
        print(title)
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
