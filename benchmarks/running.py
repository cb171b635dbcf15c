"""A contender of the inference benchmark runs as a function of a feed that returns logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from subjects import Feed, Subject

from ti_fx.export import session

Kind = Literal["onnx", "openvino", "torch", "compiled"]
Run = Callable[[Feed], NDArray[Any]]


def load(kind: Kind, path: Path, subject: Subject, threads: int) -> Run:
    """Return a contender as a function of a feed that returns logits.

    PyTorch's number of threads is the caller's own.
    """
    if kind == "onnx":
        loaded = session(path, threads)
        names = [value.name for value in loaded.get_inputs()]
        return lambda feed: loaded.run(None, {name: feed[name] for name in names})[0]
    if kind == "openvino":
        return _load_openvino(path, threads)
    module: Any = subject.runnable(subject.load(path))
    if kind == "compiled":
        module = torch.compile(module)

    def run(feed: Feed) -> NDArray[Any]:
        with torch.inference_mode():
            logits: NDArray[Any] = module(*map(torch.from_numpy, feed.values()))[0].numpy()
        return logits

    return run


def _load_openvino(path: Path, threads: int) -> Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()
    names = [value.any_name for value in compiled.inputs]

    def run(feed: Feed) -> NDArray[Any]:
        given = {name: feed[name] for name in names}
        logits: NDArray[Any] = request.infer(given, share_inputs=True, share_outputs=True)[0]
        return logits

    return run
