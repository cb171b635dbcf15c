"""``slow`` marks cases of a parametrised test that ``make test`` leaves out and ``make test-full`` runs."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Return the cases, a tuple for several arguments, each marked slow."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def slow_but(quick: Any, cases: Any) -> list[Any]:
    """Return the cases in their order, those marked slow that are not among ``quick``."""
    return [case if case in quick else slow(case)[0] for case in cases]
