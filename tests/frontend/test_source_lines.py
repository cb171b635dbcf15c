"""The line of a model's own code: while it runs, when it fails, and shortened."""

from __future__ import annotations

import random
import traceback
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import RandomnessError
from ti_fx.frontend.source_lines import caller, failing_line, short


def here(above: int = 1) -> str:
    """Return ``file:line`` of a line above the call."""
    frame = traceback.extract_stack()[-2]
    return f"{frame.filename}:{int(frame.lineno or 0) - above}"


class Calls(nn.Module):
    """Notes what calls it, from below torch's frames."""

    def forward(self, x: Tensor) -> Tensor:
        self.found = caller()
        self.line = here()
        return x


def test_the_caller_is_the_innermost_frame_that_is_neither_torchs_nor_ours() -> None:
    model = Calls()
    model(torch.ones(2))
    assert model.found == model.line
    found, line = torch.utils._pytree.tree_map(lambda _: (caller(), here(0)), [1])[0]
    assert found == line


def test_the_line_that_fails_is_the_models() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.utils._pytree.tree_map(lambda x: x @ x, [torch.ones(2, 3)])
    assert failing_line(raised.value) == here()
    assert failing_line(RuntimeError("raised nowhere")) == ""


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("/home/a/lib/site-packages/transformers/models/bert.py:7", "transformers/models/bert.py:7"),
        ("C:\\code\\site-packages\\transformers\\bert.py:7", "transformers/bert.py:7"),
        ("/home/a/model.py:12", "model.py:12"),
    ],
)
def test_a_place_is_shown_without_what_is_the_machines(where: str, shown: str) -> None:
    assert short(where) == shown


class Draws(nn.Module):
    """Draws by a generator that is not torch's."""

    def __init__(self, numpys: bool) -> None:
        super().__init__()
        self.numpys = numpys

    def forward(self, x: Tensor) -> Tensor:
        if self.numpys:
            return x * float(numpy.random.randint(3))
        return x * random.choice([1.0, 2.0])


@pytest.mark.parametrize("numpys", [True, False])
def test_the_line_that_draws_is_named(numpys: bool) -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    text = "float(numpy.random.randint(3))" if numpys else "random.choice([1.0, 2.0])"
    line = next(
        index for index, line in enumerate(lines, 1) if line.strip().startswith("return") and text in line
    )
    with pytest.raises(RandomnessError, match=rf"test_source_lines\.py:{line}\)"):
        ti_fx.capture(Draws(numpys), {"x": torch.ones(2, 3)})
