"""A quantised file is compared with PyTorch by what noise in the last bits does to PyTorch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CoverageError
from ti_fx.zoo import chain as chains
from ti_fx.zoo.models import Entry


def test_a_quantised_file_may_differ_by_what_noise_does_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), {"input": torch.ones(2, 4)}
    gm = ti_fx.capture(model, inputs)

    def runtime(path: Path) -> Any:
        return lambda given: {"output_0": (1.05 * model(**given)).detach().numpy()}

    def noisy(gm: object, given: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        return {"output_0": (1 + seed / 100) * model(**given).detach()}

    monkeypatch.setattr(chains, "Runtime", runtime)
    entry = Entry("linear", model, inputs, inputs, "", "Linear")
    chain = chains.Chain(lambda: entry, tmp_path, chains.Outcome("linear"))
    chain.build()
    with pytest.raises(CoverageError, match=r"in int8-tensor \(relative 5.0e-02, at most 3.0e-02\)"):
        chain.compare_file("int8-tensor", tmp_path, gm)
    monkeypatch.setattr(chains, "nudged_outputs", noisy)
    chain.compare_file("int8-tensor", tmp_path, gm)
    assert chain.outcome.numbers["int8-tensor noise median"] == pytest.approx(0.07, rel=1e-4)
    assert "noise in the last bits" in chain.outcome.notes[-1]
    with pytest.raises(CoverageError, match="in float"):
        chain.compare_file("float", tmp_path, gm)
