"""A quantiser is in one file: it is found there, by its function, and an encoding names it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from ti_fx import numerics
from ti_fx.errors import InputError
from ti_fx.ir.inserted import is_ours, quantiser_of
from ti_fx.numerics.encodings import ENCODINGS, WeightEncodings, encoding_with
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.numerics.quantisers import QUANTISERS

OF_A_VALUE = [name for name, quantiser in QUANTISERS.items() if quantiser.start is None]


def test_each_file_holds_quantisers_that_are_found() -> None:
    folder = Path(importlib.import_module("ti_fx.numerics.quantisers").__path__[0])
    files = {file.stem for file in folder.glob("[!_]*.py")}
    assert {quantiser.function.__module__.rpartition(".")[2] for quantiser in QUANTISERS.values()} == files


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_function_is_imported_by_its_name(name: str) -> None:
    """As the code of a graph that is read from a file does."""
    function = QUANTISERS[name].function
    assert getattr(importlib.import_module(function.__module__), name) is function


def test_a_node_is_asked_for_its_quantiser() -> None:
    graph = Graph()
    value = graph.placeholder("value")
    quantised = graph.call_function(numerics.int8_token, (value,))
    detached = graph.call_function(numerics.detach, (quantised,))
    assert quantiser_of(quantised) is QUANTISERS["int8_token"]
    assert [quantiser_of(other) for other in (value, detached, None, 3)] == [None] * 4
    assert [is_ours(node) for node in (value, quantised, detached)] == [False, True, True]


@pytest.mark.parametrize("name", OF_A_VALUE)
@pytest.mark.parametrize("size", [7, 128, 200])
def test_no_value_moves_by_more_than_half_a_step(name: str, size: int) -> None:
    """Per token where a row is independent of its batch, else of the whole tensor."""
    quantiser = QUANTISERS[name]
    value = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value[0] *= 100  # which moves the steps of the other rows where they share a range
    found = quantiser.function(value)
    step = quantiser.step(found)
    assert step.dtype == torch.float64
    assert step.shape == ((3, 5, 1) if quantiser.batch_invariant else ())
    rounding = 1 + 1e-9
    assert bool(((found - value).abs() <= step / 2 * rounding).all())


@pytest.mark.parametrize("name", OF_A_VALUE)
def test_rows_of_a_batch_invariant_quantiser_are_independent(name: str) -> None:
    quantiser = QUANTISERS[name]
    value = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    value[1] *= 50
    alone = torch.cat([quantiser.function(row) for row in (value[:1], value[1:])])
    assert torch.equal(quantiser.function(value), alone) == quantiser.batch_invariant


def test_a_quantiser_has_a_form_in_onnx() -> None:
    def halved(value: Tensor) -> Tensor:
        return value / 2

    with pytest.raises(ValueError, match="halved has no form in ONNX"):
        Quantiser(halved, True, torch.abs, codes=None, value=None, opset=18)


def test_every_encoding_names_a_quantiser_and_every_quantiser_has_one() -> None:
    used = {encoding.numerics for encoding in ENCODINGS.values()}
    assert used == {*QUANTISERS, None}
    for quantiser in QUANTISERS.values():
        assert encoding_with(quantiser).quantiser is quantiser
    assert encoding_with(QUANTISERS["int8_tensor"]).name == "int8-tensor"  # the first of three


def test_a_quantiser_without_an_encoding_is_named() -> None:
    def halved(value: Tensor) -> Tensor:
        return value / 2

    alone = Quantiser(halved, True, torch.abs, codes=None, value=halved, opset=18)
    with pytest.raises(InputError, match="no encoding computes by halved; add one to"):
        encoding_with(alone)


def test_encodings_of_weights_are_written_for_people() -> None:
    mixed = WeightEncodings("int8-token", {"fc": "nbits2", "head": "float"})
    assert str(mixed) == "int8-token, fc=nbits2, head=float"
    assert [mixed.of(name) for name in ("fc", "other")] == ["nbits2", "int8-token"]
    assert str(WeightEncodings("base3")) == "base3"


def test_the_table_of_encodings_is_read_without_torch() -> None:
    code = "import sys, ti_fx.numerics.encodings as e; list(e.ENCODINGS.values()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_of_numerics_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'int9_tensor'"):
        numerics.int9_tensor  # noqa: B018
    assert {*numerics.__all__} <= {*dir(numerics)}
    assert all(getattr(numerics, name) is not None for name in numerics.__all__)
