"""The study of convergence goes on where it was stopped, and its page is made of every run that it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import convergence
import pytest
import torch
from models import bert_model
from study.arms import all_arms
from study.one_run import Key
from study.page import best_rate, page, paired_p
from study.page import rows as table_rows
from study.rows import Data, Yardstick
from study.settings import Setting, all_settings
from study.store import Store
from tiny_training import rows
from torch import nn
from transformers.data.data_collator import default_data_collator

from ti_fx.errors import DataError

pytestmark = pytest.mark.seconds


def load(folder: Path) -> nn.Module:
    return bert_model(layers=1)


def setting() -> Setting:
    def make(folder: Path) -> None:
        bert_model(layers=1).save_pretrained(folder)

    def data(folder: Path) -> Data:
        held_out = [default_data_collator(rows(12))]
        return Data(rows(16), default_data_collator, held_out, held_out)

    return Setting("tiny", "a tiny BERT", 8, 4, make, load, data, rates=(1e-3, 5e-3), seeds=2)


@pytest.mark.slow
def test_a_study_goes_on_and_its_page_has_every_arm(tmp_path: Path) -> None:
    results, tiny = tmp_path / "results.json", setting()
    arms = [all_arms()[name] for name in ("ternarybert", "ti-m")]
    store = Store(results)
    assert not convergence.run(tiny, arms, store, tmp_path, until=0.0)
    assert not results.exists()
    while (key := next(convergence.missing(tiny, arms, store), None)) is not None and len(store.runs) < 2:
        store.add(made(key, tiny))
    assert [key.rate for key in Store(results).runs] == [1e-3, 5e-3]
    store = Store(results)
    assert convergence.run(tiny, arms, store, tmp_path, until=float("inf"))
    assert len(store.runs) == 2 * 2 + 2  # every rate with seed 0, then the best with seed 1
    found = table_rows(tiny, store.runs)
    assert [row.arm for row in found] == ["ternarybert", "ti-m"]
    assert all(len(row.kl) == 2 for row in found)
    assert "| ti-m |" in page([tiny], store.runs)
    curve = json.loads(results.read_text())["runs"][-1]["curve"]
    assert [row["step"] for row in curve] == list(range(9))
    assert curve[-1]["seconds"] > 0


def made(key: Key, tiny: Setting) -> dict[str, Any]:
    end = {"kl": key.rate, "loss": 1.0, "accuracy": 0.5}
    curve = [{"step": step, "seconds": 0.1, **end} for step in (0, 8)]
    return {**vars(key), "steps": tiny.steps, "curve": curve, "test": end}


def test_the_best_rate_is_of_all_and_never_one_that_diverged() -> None:
    ends = {1e-3: 0.2, 5e-3: float("nan")}
    runs = [{"rate": rate, "seed": 0, "curve": [{"kl": kl}]} for rate, kl in ends.items()]
    assert best_rate(runs, (1e-3, 5e-3)) == 1e-3
    assert best_rate(runs[:1], (1e-3, 5e-3)) is None


def test_the_yardstick_is_the_divergence_of_the_rows() -> None:
    batches = [default_data_collator(rows(6)), default_data_collator(rows(3))]
    teacher, student = bert_model(layers=1), bert_model(layers=1, hidden_act="relu")
    found = Yardstick(teacher, batches, False).measure(student.train(False))
    with torch.no_grad():
        pairs = [
            [model.train(False)(**batch).logits.double().log_softmax(-1) for model in (teacher, student)]
            for batch in batches
        ]
    kl = torch.cat([(known.exp() * (known - own)).sum(-1) for known, own in pairs])
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    labels = torch.cat([batch["labels"] for batch in batches])
    own = torch.cat([pair[1] for pair in pairs])
    assert found.accuracy == pytest.approx(float((own.argmax(-1) == labels).double().mean()))


def test_missing_data_is_named(tmp_path: Path) -> None:
    settings = all_settings({"images": tmp_path, "text": tmp_path})
    for name, says in (("vit-12", "--images"), ("decoder-24", "--text")):
        with pytest.raises(DataError, match=says) as caught:
            settings[name].make(tmp_path / "teacher")
        assert "\n" not in str(caught.value)


def test_the_paired_test_is_students() -> None:
    # from tables of Student's distribution: t of 2.776 with 4 degrees of freedom, of 4.303 with 2
    for t, count in ((2.776, 5), (4.303, 3)):
        gaps = [index - (count - 1) / 2 for index in range(count)]
        spread = (sum(gap**2 for gap in gaps) / (count - 1)) ** 0.5
        shift = t * spread / count**0.5
        assert paired_p([gap + shift for gap in gaps], [0.0] * count) == pytest.approx(0.05, abs=2e-4)
