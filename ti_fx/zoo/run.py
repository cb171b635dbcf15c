"""Run the chain over many models: a process each, with a time limit, so that one that hangs or crashes costs only itself."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ti_fx.errors import InputError, did_you_mean
from ti_fx.zoo.chain import STAGES, Outcome, run_chain
from ti_fx.zoo.models import Entry, build, entry_of, model_types

# Loaded once and inherited by every process.
_PRELOADED = ["torch", "transformers", "onnxruntime", "torch.onnx", "ti_fx.zoo.chain"]


@dataclass(frozen=True)
class Job:
    """One model to run.

    Attributes:
        name: the model type, or the function's name. file: the Python file that has the function, None for a type.
        attention: for a model type, ``eager`` or ``sdpa``.
    """

    name: str
    file: str | None = None
    attention: str = "eager"

    def build(self) -> Entry:
        """Make the model and its inputs."""
        if self.file is None:
            return build(self.name, self.attention)
        return entry_of(self.name, factories(self.file)[self.name]())


def jobs(source: str, attention: Sequence[str] = ("eager",)) -> list[Job]:
    """Return what to run for a model type, or for each factory of a Python file.

    A factory is a public function of the file itself that takes no argument and returns ``(model, example)`` or
    ``(model, example, other)``, dicts of keyword tensors; ``other`` has another batch and sequence size. Of
    ``file.py:name`` only that function is run.

    Raises:
        InputError: the file can't be imported or has no such factory; the type is unknown.
    """
    path, _, name = source.partition(":")
    if path.endswith(".py"):
        known = factories(path)
        if name and name not in known:
            raise InputError(f"{path} has no factory {name!r}{did_you_mean(name, known)}")
        if not known:
            raise InputError(
                f"{path} has no factory; write a function without arguments that returns (model, example)"
            )
        return [Job(factory, path) for factory in ([name] if name else known)]
    if source not in model_types():
        raise InputError(
            f"{source!r} is no model type and no Python file{did_you_mean(source, model_types())}"
        )
    return [Job(source, attention=choice) for choice in attention]


def factories(path: str) -> dict[str, Callable[[], Any]]:
    """Return the factories of a Python file by name, in the order written."""
    location = Path(path)
    if not location.is_file():
        raise InputError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(location.stem, location)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} can't be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[location.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(value).parameters
    }


def run_all(
    work: Sequence[Job], limit: float, workers: int, until: str = STAGES[-1]
) -> Iterator[tuple[Job, Outcome]]:
    """Run each job in a process of its own; yield outcomes as they come.

    Args:
        work: what to run.
        limit: seconds that one may take; it is killed then, and its outcome says at which stage.
        workers: processes at a time.
        until: the last stage to run.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_PRELOADED)
    waiting, running = list(work), {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, until, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = _Running(
                job, process, time.monotonic() + limit, Outcome(job.name, attention=job.attention)
            )
        ready = wait(list(running), timeout=0.2)
        for receiver, one in list(running.items()):
            if receiver in ready and one.receive(receiver):
                continue
            if one.process.is_alive() and time.monotonic() < one.deadline:
                continue
            yield one.job, one.finish(limit)
            receiver.close()
            del running[receiver]


@dataclass
class _Running:
    job: Job
    process: Any
    deadline: float
    outcome: Outcome
    done: bool = False

    def receive(self, receiver: Connection) -> bool:
        """Take one message; return whether more may come."""
        try:
            self.outcome, self.done = receiver.recv()
        except EOFError:
            return False
        return not self.done

    def finish(self, limit: float) -> Outcome:
        if not self.done:
            stage = STAGES[STAGES.index(self.outcome.stage) + 1] if self.outcome.stage else STAGES[0]
            self.outcome.typed = False
            if self.process.is_alive():
                self.outcome.refused = ("TimeoutError", f"{stage}: not done after {limit:g} s")
            else:
                self.process.join()
                self.outcome.refused = (
                    "ProcessError",
                    f"{stage}: the process ended with code {self.process.exitcode}",
                )
        self.process.kill() if not self.done else None
        self.process.join()
        return self.outcome


def _work(job: Job, until: str, sender: Connection) -> None:
    """Run one job in this process; what it prints goes nowhere, what it finds goes through the pipe."""
    import warnings

    import torch
    import transformers

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.filterwarnings("ignore")
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_chain(
            job.name, job.build, Path(folder), until, started=lambda now: sender.send((now, False))
        )
    outcome.attention = job.attention
    sender.send((outcome, True))
    sender.close()
