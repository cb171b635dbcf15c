"""Captures in several threads: one after another, each as it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import bert_model, seeded, text_example
from slow import slow_but
from torch import Tensor, nn

import ti_fx
from ti_fx.frontend.patches import one_at_a_time, plain_torch_layers, traceable

TIMES = 3
Found = tuple[str, bool, list[Tensor]]  # the dump, whether the model trains, the graph's outputs


class Encoder(nn.Module):
    """torch.nn's own layers, and a decision by values."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            x = x.nan_to_num()
        result: Tensor = self.layers(x)
        return result


def makers() -> list[Callable[[], tuple[nn.Module, dict[str, Tensor]]]]:
    return [
        lambda: (bert_model(1), text_example()),
        lambda: (seeded(Encoder), {"x": torch.arange(2 * 5 * 8).view(2, 5, 8) / 80}),
    ]


def captured(made: tuple[nn.Module, dict[str, Tensor]]) -> Found:
    model, example = made
    training = model.training
    gm = ti_fx.capture(model, example)
    assert model.training is training
    with torch.no_grad():
        outputs: Any = gm.eval()(**example)
    return ti_fx.dump(gm), training, [outputs] if isinstance(outputs, Tensor) else [*outputs.values()]


@pytest.fixture(scope="module")
def alone() -> list[Found]:
    return [captured(make()) for make in makers()]


@pytest.mark.slow
@pytest.mark.parametrize("_", slow_but([0], range(TIMES)))
def test_two_threads_capture_two_models_at_once(_: int, alone: list[Found]) -> None:
    models = [make() for make in makers()]
    together = threading.Barrier(len(models))

    def run(made: tuple[nn.Module, dict[str, Tensor]]) -> Found:
        together.wait()
        return captured(made)

    with ThreadPoolExecutor(len(models)) as threads:
        found = list(threads.map(run, models))
    for one, other in zip(alone, found, strict=True):
        assert one[:2] == other[:2]
        assert all(map(torch.equal, one[2], other[2]))


@pytest.mark.slow
def test_two_threads_capture_one_model_at_once() -> None:
    made = (bert_model(1), text_example())
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(captured, [made, made])
    assert first[:2] == second[:2]


def test_a_capture_waits_for_another_threads_patches() -> None:
    model, example = makers()[1]()
    with ThreadPoolExecutor(1) as threads:
        with plain_torch_layers():
            waiting = threads.submit(captured, (model, example))
            assert not threading.Event().wait(1)
            assert not waiting.done()
        assert waiting.result(timeout=120)[0]


def test_a_capture_within_a_captures_patches_goes_on(alone: list[Found]) -> None:
    model, example = makers()[0]()
    with one_at_a_time(), traceable(model):
        assert captured((model, example))[0] == alone[0][0]
