"""``bench`` measures latency, loading, memory and size of ONNX files of one model, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ti_fx.errors import InputError
from ti_fx.export.file.external_data import data_file
from ti_fx.export.run.session import DTYPES, Runtime
from ti_fx.measure.footprint import Footprint, footprint
from ti_fx.measure.stopwatch import medians

Feed = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Timed:
    """Medians of one size.

    Attributes:
        batch: rows.
        length: tokens of a row; of a file with a cache, tokens in the cache, after which one more is run.
        milliseconds: of one run, by the file's label.
    """

    batch: int
    length: int
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        bytes: on disk, with the data file if there is one, by label.
        footprints: loading and memory, by label, measured at the first size.
        times: a row a size.
        decodes: whether one token after a cache was run.
    """

    bytes: dict[str, int]
    footprints: dict[str, Footprint]
    times: tuple[Timed, ...]
    decodes: bool


def bench(
    files: Mapping[str, Path],
    *,
    batches: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (128,),
    threads: int | None = None,
    rounds: int = 7,
) -> Bench:
    """Time files against each other, one run of each in turn, on made-up inputs: values don't change the cost.

    Args:
        files: by label; the first one's inputs say what is fed, and the others take some or all of them.
        batches: numbers of rows.
        lengths: numbers of tokens.
        threads: within a node; None is one per core.
        rounds: how often each is run at each size; the median counts.

    Raises:
        InputError: a file can't be loaded, can't run such a size, or takes an input that the first one does not.
    """
    loaded = {label: Runtime(path, threads) for label, path in files.items()}
    first, *others = loaded.items()
    for label, runtime in others:
        missing = sorted(runtime.inputs.keys() - first[1].inputs.keys())
        if missing:
            raise InputError(
                f"{label} takes {', '.join(missing)}, and {first[0]} does not; give files of one model"
            )
    times = []
    for batch in batches:
        for length in lengths:
            feed = made_up(first[1].inputs, batch, length)
            feeds = {label: {name: feed[name] for name in one.inputs} for label, one in loaded.items()}
            for label, runtime in loaded.items():
                runtime(feeds[label])  # says in a line what does not fit
            runs = {label: partial(one.session.run, None, feeds[label]) for label, one in loaded.items()}
            times.append(Timed(batch, length, medians(runs, rounds)))
    with TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, allow_pickle=False, **made_up(first[1].inputs, batches[0], lengths[0]))
        footprints = {label: footprint(path, inputs, threads) for label, path in files.items()}
    return Bench(
        {label: _bytes(path) for label, path in files.items()},
        footprints,
        tuple(times),
        _decodes(first[1].inputs),
    )


def made_up(inputs: Mapping[str, Any], batch: int, length: int) -> Feed:
    """Return arrays for the inputs of a file: token 0, nothing masked, random numbers.

    A dimension is the batch if it is the first or called so, else a length; with a cache there is one new token.
    """
    sizes = {"batch": batch}
    if _decodes(inputs):
        sizes |= {"sequence": 1, "total": length + 1}
    random = np.random.default_rng(0)
    feed: Feed = {}
    for name, value in inputs.items():
        if value.type not in DTYPES:
            raise InputError(f"input {name!r} is a {value.type}, for which nothing can be made up")
        shape = tuple(
            size if isinstance(size, int) else sizes.get(size, length if index else batch)
            for index, size in enumerate(value.shape)
        )
        dtype = np.dtype(DTYPES[value.type])
        if dtype.kind == "f":
            feed[name] = random.standard_normal(shape).astype(dtype)
        else:
            feed[name] = np.full(shape, "mask" in name, dtype)
    return feed


def _decodes(inputs: Mapping[str, Any]) -> bool:
    return any(name.startswith("past_") for name in inputs)


def _bytes(path: Path) -> int:
    data = data_file(path)
    return path.stat().st_size + (data.stat().st_size if data is not None else 0)
