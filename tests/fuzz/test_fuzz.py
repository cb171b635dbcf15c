"""Random transformers go through the whole chain: each is right or refused in one line, and few are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fuzz import chain
from fuzz.case import Case
from fuzz.chain import Wrong, check
from fuzz.modules import build
from fuzz.run import Tally, drawn, run, run_one, shrunk, write_down
from regressions import REGRESSIONS

FEW, MANY, BLOCK = 60, 1000, 20
REFUSED_AT_MOST = 0.15  # a fuzzer that is refused everywhere proves nothing


def blocks() -> list[object]:
    """`make test` runs the first three blocks, `make test-full` fifty; each has seeds of its own."""
    starts = range(0, MANY, BLOCK)
    return [
        pytest.param(start, marks=[pytest.mark.slow] if start >= FEW else [], id=str(start))
        for start in starts
    ]


@pytest.mark.parametrize("start", blocks())
def test_random_transformers_are_right_or_refused(
    start: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tally = run(BLOCK, 1000 * start, tmp_path_factory.mktemp("failures"), cheap=start < FEW)
    print(tally.summary())
    assert not tally.failures, tally.summary()
    assert tally.refused <= REFUSED_AT_MOST * tally.cases + 2, tally.summary()


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_once_wrong_is_right(name: str) -> None:
    outcome = check(REGRESSIONS[name])
    assert outcome.refused is None, outcome


def test_draws_are_the_same_in_each_run_and_differ_by_seed() -> None:
    assert drawn(12, 5) == drawn(12, 5)
    assert not set(drawn(12, 5)) & set(drawn(12, 900))


def test_a_case_is_its_text_and_its_json() -> None:
    for case in drawn(12, 7):
        assert Case.from_json(case.json()) == case
        assert eval(case.text(), {"Case": Case}) == case


def test_a_wrong_answer_is_seen_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(until="capture", activation="relu", layers=2)
    right = build(case)

    def other(case: Case, spelled: bool = False) -> object:
        model = build(case, spelled)
        model.head.weight.data.mul_(1.001)
        return model

    made = iter([right])
    monkeypatch.setattr(chain, "build", lambda case, spelled=False: next(made, None) or other(case, spelled))
    tally = Tally()
    run_one(case, tally, tmp_path)
    ((why, path),) = tally.failures
    assert "output 0 is off by" in why
    assert case.text() in path.read_text()
    assert "1 wrong" in tally.summary()


def test_a_failing_case_is_made_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with_relu(case: Case) -> None:
        if case.activation == "relu":
            raise Wrong("graph at 2x8: output 0 is off by 1.0e+00")

    monkeypatch.setattr("fuzz.run.check", fails_with_relu)
    case = Case(activation="relu", layers=2, norm="pre", seed=7, heads=4, key_heads=4, head_width=4)
    assert shrunk(case, "graph at 2x8: output 0 is off by 2.0e+00")[0] == Case(activation="relu")


def test_a_written_case_runs_alone(tmp_path: Path) -> None:
    path = write_down(Case(until="capture"), "why", tmp_path)
    scope: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    assert dataclasses.is_dataclass(scope["Case"])
