"""The choice of an encoding: the fastest on this machine that fits, with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_encodings import Model, example, prepared
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import ExportError, InputError
from ti_fx.export import choose, choose_encoding, to_onnx
from ti_fx.export.choose import Measured, _choice
from ti_fx.graph import state
from ti_fx.passes import Distill, DuplicateTeacher, Pack, QuantizeActivations, Strip, Ternarize


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


def test_auto_measures_the_model_once_and_records_what_it_chose(auto: list[str]) -> None:
    gm = ti_fx.capture(Model(), example())
    one = QuantizeActivations("auto", encodings={"second": "int8-token"})
    report = ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), one)(gm)
    assert auto == [str(one)]
    assert "nbits2: the fastest" in str(report)
    assert str(report).count("on disk") == 1
    assert state(gm)["encoding"] == "nbits2"
    assert state(gm)["encodings"] == {
        **dict.fromkeys(("table.weight", "first.weight", "transposed"), "nbits2"),
        "second.weight": "int8-token",
    }
    expected = prepared_by(QuantizeActivations("nbits2", encodings={"second": "int8-token"}))
    before = ti_fx.dump(gm)
    assert before == ti_fx.dump(expected)
    ti_fx.Pipeline(one)(gm)
    assert (ti_fx.dump(gm), len(auto)) == (before, 1)


def prepared_by(one: QuantizeActivations) -> GraphModule:
    gm = ti_fx.capture(Model(), example())
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), one)(gm)
    return gm


def test_auto_measures_several_on_the_machine() -> None:
    gm = ti_fx.capture(Model(), example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations("auto"))(gm)
    assert [row.encoding for row in state(gm)["choice"].measured] == list(choose.CANDIDATES)
    assert state(gm)["encoding"] == state(gm)["choice"].encoding


def test_a_recipe_with_auto_records_the_name(auto: list[str]) -> None:
    logits = Distill(layer_outputs=0, scores=0, attention_outputs=0)
    recipe = ti_fx.Recipe("own", activations=QuantizeActivations("auto"), distill=logits)
    assert ti_fx.Recipe.from_dict(recipe.to_dict()) == recipe
    gm = ti_fx.capture(Model(), example())
    recipe.prepare(gm)
    named = replace(recipe, activations=QuantizeActivations("nbits2"))
    assert state(gm)["recipe"] == named.to_dict()
    assert recipe.resolved(gm) == named
    assert named.resolved(gm) == named


def test_auto_needs_the_example_and_is_no_encoding_of_a_file(tmp_path: Path) -> None:
    gm = prepared(QuantizeActivations("float"))
    del state(gm)["example"]
    with pytest.raises(InputError, match="keeps no example to measure it on"):
        ti_fx.Pipeline(QuantizeActivations("auto"))(gm)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    with pytest.raises(InputError, match="'auto' is measured before training"):
        to_onnx(gm, tmp_path / "x.onnx", example(), encoding="auto")
    with pytest.raises(InputError, match="'auto' is measured before training"):
        prepared(QuantizeActivations(encodings={"first": "auto"}))


@pytest.mark.parametrize("options", [{"candidates": ()}, {"candidates": "float"}, {"rounds": 0}])
def test_a_choice_among_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"give (at least one encoding in a list|a whole number, at least 1)"
    ):
        choose_encoding(ti_fx.capture(Model(), example()), example(), **options)
