"""Which passes lower a graph, and the graph's text after one of them, for ``ti-fx export --print-after``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ti_fx.cli import _output as output
from ti_fx.errors import InputError, did_you_mean

EVERY = "all"


def require_pass(name: str) -> None:
    """Refuse a name that no pass of the lowering has.

    Raises:
        InputError: near names are listed.
    """
    from ti_fx.ir.pipeline import name_of
    from ti_fx.passes.lower import LOWER

    names = [EVERY, *map(name_of, LOWER.passes)]
    if name not in names:
        raise InputError(f"--print-after: no lowering pass is called {name!r}{did_you_mean(name, names)}")


@contextmanager
def printed_after(name: str | None) -> Iterator[Path | None]:
    """Give a folder for the texts of a lowering, and print the one after a pass, or all of them, in the end.

    They are printed where the lowering fails, too. Without a name there is no folder.
    """
    if name is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            for file in sorted(Path(folder).rglob("*.txt")):
                position, _, written = file.stem.partition("-")
                if written == name or (name == EVERY and int(position) > 0):
                    output.say(f"after {written}:")
                    output.graph_text(file.read_text(encoding="utf-8"))
