"""Runs the passes that are missing before a pass that a user asks for, as the pass's own ``requires`` names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ti_fx.errors import PreconditionError
from ti_fx.ir.pipeline import Pass

Ran = TypeVar("Ran")


def run_after_missing(one: Pass, run: Callable[[Pass], Ran]) -> list[Ran]:
    """Run ``one``, and before it what it says is missing, with default options; return what each run returned.

    Args:
        one: the pass.
        run: runs a pass on the graph, which it leaves as it is where the pass refuses it.

    Raises:
        PreconditionError: no pass is named as missing, or running it did not help.
    """
    ran: list[Ran] = []
    to_run, named = [one], set[str]()
    while to_run:
        try:
            ran.append(run(to_run[-1]))
        except PreconditionError as error:
            if error.missing is None or error.missing in named:
                raise
            named.add(error.missing)
            to_run.append(Pass.parse(error.missing))
        else:
            to_run.pop()
    return ran
