"""The table of architectures is written from results, and so is the short file of results beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ti_fx.errors import InputError
from ti_fx.zoo.chain import Outcome
from ti_fx.zoo.results import Result, Run
from ti_fx.zoo.run import Job
from ti_fx.zoo.summary import BEGIN, END, main, markdown


def result(name: str, group: str = "encoder", **outcome: Any) -> Result:
    return Result(Job(name), Outcome(name, **outcome), "runtime", group)


def test_what_is_kept_short_gives_the_same_table_and_reads_back(tmp_path: Path) -> None:
    refused, numbers = ("CaptureError", "capture: x"), {"replaced": 1.26e-7, "float bytes": 10.0}
    unknown = {"replaced output": None}  # as a file has it: it was infinite or NaN
    run = Run.of(
        [
            result("a", stage="runtime", blocks=2, sites=2, numbers=numbers, seconds={"build": 1.0}),
            result("b", stage="count", blocks=1, refused=refused, numbers=unknown),
            result("c", stage="count", blocks=1, refused=("KeyError", "capture: x"), typed=False),
            result("mamba", stage="build", refused=("CoverageError", "count: none"), blocks=0),
            result("d", "", refused=("DataError", "build: d: needs the package x")),
        ]
    )
    run.write_short(tmp_path / "short.json")
    short = Run.read(tmp_path / "short.json")
    assert markdown(short) == markdown(run)
    assert [(one.title, one.verdict, one.reason) for one in short.results] == [
        (one.title, one.verdict, one.reason) for one in run.results
    ]
    assert json.loads((tmp_path / "short.json").read_text())["results"][0] == {
        "name": "a",
        "attention": "eager",
        "group": "encoder",
        "until": "runtime",
        "stage": "runtime",
        "verdict": "passed",
        "blocks": 2,
        "numbers": {"replaced": 1e-7},
    }
    short.write_short(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "short.json").read_bytes()


def test_the_summary_writes_the_table_and_what_it_shows(tmp_path: Path) -> None:
    run = Run.of([result("a", stage="runtime", blocks=2, sites=2, numbers={"captured": 0.5})])
    kept, page = tmp_path / "run.json", tmp_path / "docs" / "page.md"
    run.write(kept)
    page.parent.mkdir()
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    main([str(kept), str(page)])
    assert page.read_text() == f"above\n{BEGIN}\n\n{markdown(run)}\n\n{END}\nbelow\n"
    assert "captured" not in (page.parent / "zoo.json").read_text()
    for arguments, message in (
        ([], "give a file that ti-fx zoo --json wrote"),
        ([str(kept), str(tmp_path / "absent.md")], r"can.t read .*absent\.md: No such file"),
        ([str(kept), str(kept)], "has no place for the table"),
    ):
        with pytest.raises(InputError, match=message):
            main(arguments)
