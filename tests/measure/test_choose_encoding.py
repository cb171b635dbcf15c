"""The choice of an encoding: the fastest on this machine that fits, with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoded_model import Model, example, prepared

import ti_fx
from ti_fx.errors import ExportError, InputError
from ti_fx.export import to_onnx
from ti_fx.ir.facts import facts, record_facts
from ti_fx.measure import choose, choose_encoding
from ti_fx.measure.choose import Measured, fastest_that_fits, resolve
from ti_fx.passes import Pack, QuantizeActivations, Strip


def measured(encoding: str, milliseconds: float, megabytes: float | None) -> Measured:
    return Measured(encoding, milliseconds, megabytes, 1.0)


def test_the_fastest_encoding_that_fits_is_chosen() -> None:
    rows = (measured("int8-tensor", 10, 140), measured("int8-token", 13, 140), measured("nbits2", 30, 80))
    assert fastest_that_fits(rows, None).encoding == "int8-tensor"
    small = fastest_that_fits(rows, 100)
    assert (small.encoding, small.reason) == ("nbits2", "the fastest, 30.00 ms, of 1 that run in 100 MB")
    with pytest.raises(ExportError, match="no encoding runs in 50 MB: nbits2 needs the least, 80 MB"):
        fastest_that_fits(rows, 50)
    with pytest.raises(InputError, match="leave ram_megabytes out"):
        fastest_that_fits((measured("float", 1, None),), 50)


def test_of_two_as_fast_the_one_whose_rows_stand_alone_is_chosen() -> None:
    rows = (measured("int8-tensor", 10, 140), measured("int8-token", 10.4, 140), measured("nbits2", 11, 80))
    found = fastest_that_fits(rows, None)
    assert (found.encoding, found.reason.partition(",")[0]) == ("int8-token", "as fast as int8-tensor")


@pytest.mark.slow
@pytest.mark.parametrize("prepared_before", [False, True])
def test_choosing_measures_every_candidate_and_leaves_the_graph(prepared_before: bool) -> None:
    gm = prepared(QuantizeActivations("nbits2")) if prepared_before else ti_fx.capture(Model(), example())
    before = ti_fx.dump(gm), facts(gm).encodings
    found = choose_encoding(gm, example(1, 2), candidates=("int8-tensor", "nbits2"), threads=1, rounds=3)
    assert (ti_fx.dump(gm), facts(gm).encodings) == before
    assert [row.encoding for row in found.measured] == ["int8-tensor", "nbits2"]
    assert all(row.milliseconds > 0 and row.on_disk > 0 for row in found.measured)
    assert found.encoding in ("int8-tensor", "nbits2")
    assert "one run" in str(found)


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let one encoding be tried, and say which graphs were measured."""
    calls: list[str] = []
    measure = choose.choose_encoding

    def once(gm: Any, given: Any, **options: Any) -> Any:
        calls.append(str(options["activations"]))
        return measure(gm, given, candidates=("nbits2",), rounds=1, **options)

    monkeypatch.setattr(choose, "choose_encoding", once)
    return calls


def test_auto_is_resolved_to_a_name_by_one_measurement(auto: list[str]) -> None:
    one = QuantizeActivations("auto", encodings={"second": "int8-token"})
    recipe = ti_fx.Recipe("own", activations=one)
    assert ti_fx.Recipe.from_dict(recipe.to_dict()) == recipe
    gm = ti_fx.capture(Model(), example())
    before = ti_fx.dump(gm)
    named, choice = resolve(recipe, gm)
    assert ti_fx.dump(gm) == before
    assert auto == [str(one)]
    assert choice is not None
    assert "nbits2: the fastest" in str(choice)
    assert named == replace(recipe, activations=replace(one, encoding="nbits2"))
    assert resolve(named, gm) == (named, None)


@pytest.mark.slow
def test_auto_measures_several_on_the_machine() -> None:
    named, choice = resolve(
        ti_fx.Recipe("own", activations=QuantizeActivations("auto")), ti_fx.capture(Model(), example())
    )
    assert choice is not None
    assert [row.encoding for row in choice.measured] == list(choose.CANDIDATES)
    assert named.activations.encoding == choice.encoding


def test_auto_needs_the_example_and_is_no_encoding_of_a_pass_or_file(tmp_path: Path) -> None:
    recipe = ti_fx.Recipe("own", activations=QuantizeActivations("auto"))
    gm = ti_fx.capture(Model(), example())
    with pytest.raises(InputError, match="'auto' is measured before training"):
        recipe.prepare(gm)
    gm = ti_fx.capture(Model(), example())
    record_facts(gm, example=None)
    with pytest.raises(InputError, match="keeps no example to measure it on"):
        resolve(recipe, gm)
    gm = prepared(QuantizeActivations("float"))
    ti_fx.Pipeline(Strip(), Pack())(gm)
    with pytest.raises(InputError, match="'auto' is measured before training"):
        to_onnx(gm, tmp_path / "x.onnx", example(), encoding="auto")
    for one in (QuantizeActivations("auto"), QuantizeActivations(encodings={"first": "auto"})):
        with pytest.raises(InputError, match="'auto' is measured before training"):
            prepared(one)


@pytest.mark.parametrize("options", [{"candidates": ()}, {"candidates": "float"}, {"rounds": 0}])
def test_a_choice_among_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"give (at least one encoding in a list|a whole number, at least 1)"
    ):
        choose_encoding(ti_fx.capture(Model(), example()), example(), **options)
