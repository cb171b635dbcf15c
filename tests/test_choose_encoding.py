"""The choice of an encoding: the fastest on this machine that fits, with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from test_encodings import Model, example, prepared

import ti_fx
from ti_fx.errors import ExportError, InputError
from ti_fx.export import choose_encoding
from ti_fx.export.choose import Measured, _choice
from ti_fx.graph import state
from ti_fx.passes import QuantizeActivations


def measured(encoding: str, milliseconds: float, megabytes: float | None) -> Measured:
    return Measured(encoding, milliseconds, megabytes, 1.0)


def test_the_fastest_encoding_that_fits_is_chosen() -> None:
    rows = (measured("int8-tensor", 10, 140), measured("int8-token", 13, 140), measured("nbits2", 30, 80))
    assert _choice(rows, None).encoding == "int8-tensor"
    small = _choice(rows, 100)
    assert (small.encoding, small.reason) == ("nbits2", "the fastest, 30.00 ms, of 1 that run in 100 MB")
    with pytest.raises(ExportError, match="no encoding runs in 50 MB: nbits2 needs the least, 80 MB"):
        _choice(rows, 50)
    with pytest.raises(InputError, match="leave ram_megabytes out"):
        _choice((measured("float", 1, None),), 50)


def test_of_two_as_fast_the_one_whose_rows_stand_alone_is_chosen() -> None:
    rows = (measured("int8-tensor", 10, 140), measured("int8-token", 10.4, 140), measured("nbits2", 11, 80))
    found = _choice(rows, None)
    assert (found.encoding, found.reason.partition(",")[0]) == ("int8-token", "as fast as int8-tensor")


@pytest.mark.parametrize("prepared_before", [False, True])
def test_choosing_measures_every_candidate_and_leaves_the_graph(prepared_before: bool) -> None:
    gm = prepared(QuantizeActivations("nbits2")) if prepared_before else ti_fx.capture(Model(), example())
    before = ti_fx.dump(gm), state(gm).get("encodings")
    found = choose_encoding(gm, example(1, 2), candidates=("int8-tensor", "nbits2"), threads=1, rounds=3)
    assert (ti_fx.dump(gm), state(gm).get("encodings")) == before
    assert [row.encoding for row in found.measured] == ["int8-tensor", "nbits2"]
    assert all(row.milliseconds > 0 and row.on_disk > 0 for row in found.measured)
    assert found.encoding in ("int8-tensor", "nbits2")
    assert "one run" in str(found)


@pytest.mark.parametrize("options", [{"candidates": ()}, {"candidates": "float"}, {"rounds": 0}])
def test_a_choice_among_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give at least one encoding in a list, and one round"):
        choose_encoding(ti_fx.capture(Model(), example()), example(), **options)
