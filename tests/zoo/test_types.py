"""Every architecture that passed the chain still does; a few of each kind here, all of them when slow."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from places import ZOO_RESULTS

from ti_fx.zoo.chain import STAGES, run_chain
from ti_fx.zoo.results import Run
from ti_fx.zoo.run import Job

# What no model of zoo_plain.py has: several score terms of a library, and experts that only some tokens reach.
EVERY_DAY = ("deberta-v2",)
PASSED = sorted(
    {
        (result.job.name, result.job.attention)
        for result in Run.read(ZOO_RESULTS).results
        if result.verdict == "passed" and result.job.file is None
    }
)

# How many passed when the results were last made. A model that has stopped passing leaves the results and with them
# the cases below, so fewer is a failure; raise the numbers when there are more.
AT_LEAST = {"eager": 497, "sdpa": 85}


def params() -> list[object]:
    slow = pytest.mark.slow
    rest = [
        pytest.param(*pair, marks=slow) for pair in PASSED if pair[0] not in EVERY_DAY or pair[1] != "eager"
    ]
    return [*(pytest.param(name, "eager") for name in EVERY_DAY), *rest]


@pytest.mark.parametrize("attention", AT_LEAST)
def test_no_architecture_has_left_the_results(attention: str) -> None:
    passed = sum(one == attention for _, one in PASSED)
    least = AT_LEAST[attention]
    assert passed >= least, f"{least - passed} types with {attention} attention no longer pass: {ZOO_RESULTS}"


@pytest.mark.parametrize(("name", "attention"), params())
def test_an_architecture_passes_the_chain(name: str, attention: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run_chain(name, Job(name, attention=attention).build, tmp_path, until="pack")
    assert outcome.refused is None
    assert outcome.stage == "pack"
    assert outcome.sites == outcome.blocks
    assert STAGES.index(outcome.stage) > STAGES.index("train")
