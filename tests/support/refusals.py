"""What every refusal of a user's mistake must be, and what a folder held before and after."""

from __future__ import annotations

from pathlib import Path

import torch
from classifier import ti_fx_command
from torch import Tensor, nn

from ti_fx.errors import TiFxError


def assert_one_line(error: BaseException, *words: str) -> None:
    assert isinstance(error, TiFxError)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def refused(*arguments: object) -> str:
    """Run ti-fx, which must refuse in one line with exit code 2, and return that line."""
    ran = ti_fx_command(*arguments)
    assert ran.code == 2, ran.out + ran.err
    assert ran.err.startswith("ti-fx: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.out + ran.err
    return ran.err


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path: also hidden and temporary ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class NoAttention(nn.Module):
    """Two layers and nothing to intervene in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.first(x)))
        return logits


def without_attention() -> tuple[nn.Module, dict[str, Tensor]]:
    return NoAttention(), {"x": torch.randn(3, 8)}
