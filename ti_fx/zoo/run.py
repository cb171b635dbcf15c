"""The chain runs over many models in a process each, with a time limit, so that one that hangs or dies ends alone."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ti_fx.errors import DataError, InputError, did_you_mean
from ti_fx.zoo.chain import STAGES, Outcome, run_chain
from ti_fx.zoo.models import Entry, build, entry_of, model_types

TIMED_OUT, DIED = (
    "TimeoutError",
    "ProcessError",
)  # what an outcome's refusal is called when nothing was raised

# Loaded once and inherited by every process.
_PRELOADED = ["torch", "transformers", "onnxruntime", "torch.onnx", "ti_fx.zoo.chain"]
_STARTING = 120.0  # seconds for a process to come up; its time limit begins with its first stage
_ENDING = 10.0  # seconds for a process that has nothing left to do


@dataclass(frozen=True)
class Job:
    """One model to run.

    Attributes:
        name: the model type, or the function's name. file: the Python file that has the function, None for a type.
        attention: for a model type, ``eager`` or ``sdpa``; empty for a function, which builds what it wants.
    """

    name: str
    file: str | None = None
    attention: str = "eager"

    def build(self) -> Entry:
        """Make the model and its inputs.

        Raises:
            DataError: they can't be made.
        """
        if self.file is None:
            return build(self.name, self.attention)
        factory = factories(self.file)[self.name]
        try:
            made = factory()
        except Exception as error:
            raise DataError(
                f"{self.name}() raised {type(error).__name__}: {error}; call it in Python"
            ) from error
        return entry_of(self.name, made)


def jobs(source: str, attention: Sequence[str] = ("eager",)) -> list[Job]:
    """Return what to run for a model type, once for each attention, or for each factory of a Python file.

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
        return [Job(factory, path, attention="") for factory in ([name] if name else known)]
    if source not in model_types():
        raise InputError(
            f"{source!r} is no model type and no Python file{did_you_mean(source, model_types())}"
        )
    return [Job(source, attention=choice) for choice in attention]


def factories(path: str) -> dict[str, Callable[[], Any]]:
    """Return the factories of a Python file by name, in the order written.

    The file is run as a module, and finds what lies beside it as a script does.

    Raises:
        InputError: there is no such file, or it can't be imported.
    """
    location = Path(path).absolute()
    if not location.is_file():
        raise InputError(f"there is no file {path}; give a model type or a Python file with factories")
    if str(location.parent) not in sys.path:
        sys.path.insert(0, str(location.parent))
    # A name of its own, so that a file named like a package shadows nothing.
    spec = importlib.util.spec_from_file_location(f"ti_fx_zoo_file_{location.stem}", location)
    assert spec is not None  # for every path that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{path} can't be imported: {type(error).__name__}: {error}; run it with Python to see where"
        ) from error
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
) -> Generator[tuple[Job, Outcome]]:
    """Run each job in a process of its own; yield outcomes as they come. Closing the iterator ends the processes.

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
    waiting, running = list(work), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Running(context, waiting.pop(0), until, limit))
            soonest = min(one.deadline for one in running)
            wait([one.receiver for one in running], timeout=max(0.0, soonest - time.monotonic()))
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                yield one.job, one.finish()
    finally:
        for one in running:
            one.end()


class _Running:
    """A job, the process that runs it, and the last that was heard from there."""

    def __init__(self, context: Any, job: Job, until: str, limit: float) -> None:
        self.job = job
        self.until = until
        self.limit = limit
        self.outcome = Outcome(job.name, attention=job.attention)
        self.heard, self.done, self.ended = False, False, False
        # Made here: a process that is killed can't remove its files.
        self.folder = tempfile.TemporaryDirectory(prefix="ti-fx-zoo-")
        self.receiver: Connection
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(job, until, self.folder.name, sender), daemon=True)
        self.process.start()
        sender.close()
        self.last_heard = time.monotonic()
        self.deadline = self.last_heard + _STARTING + limit

    def is_over(self) -> bool:
        """Take the messages that have come; return whether the process is done, has ended or has used up its time."""
        try:
            while not self.done and self.receiver.poll():
                self.outcome, self.done = self.receiver.recv()
                self.last_heard = time.monotonic()
                if not self.heard:
                    self.heard, self.deadline = True, self.last_heard + self.limit
        except EOFError:
            self.ended = True
        return self.done or self.ended or time.monotonic() >= self.deadline

    def finish(self) -> Outcome:
        """End the process and return the outcome, which says so if it had not come to an end by itself."""
        outcome = self.outcome
        if self.done or self.ended:
            self.process.join(_ENDING)
        if not self.done and outcome.passed and outcome.stage != self.until:
            stage = STAGES[STAGES.index(outcome.stage) + 1] if outcome.stage else STAGES[0]
            outcome.typed = False
            outcome.seconds[stage] = round(time.monotonic() - self.last_heard, 3)
            outcome.refused = (
                (DIED, f"{stage}: the process {_ending(self.process.exitcode)}")
                if self.ended
                else (TIMED_OUT, f"{stage}: not done after {self.limit:g} s")
            )
        outcome.attention = self.job.attention
        self.end()
        return outcome

    def end(self) -> None:
        """Kill the process if it still runs, and remove its files."""
        self.process.kill()
        self.process.join()
        self.receiver.close()
        self.folder.cleanup()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        reason = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{reason}"
    return f"ended with code {code}"


def _work(job: Job, until: str, folder: str, sender: Connection) -> None:
    """Run one job in this process; what it prints goes nowhere, what it finds goes through the pipe."""
    import warnings

    import torch
    import transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us, too; who started us ends us
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.filterwarnings("ignore")
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcome = run_chain(
        job.name, job.build, Path(folder), until, started=lambda now: sender.send((now, False))
    )
    sender.send((outcome, True))
    sender.close()
