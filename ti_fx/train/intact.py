"""The files of a checkpoint are recorded by their SHA-256, and one that has changed since is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ti_fx.errors import CheckpointError
from ti_fx.files import atomic_write, sha256_of

DIGESTS = "digests.json"


def record(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into its ``digests.json``.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    atomic_write(folder / DIGESTS, json.dumps(digests, indent=1) + "\n")


def require_training_state(folder: Path) -> None:
    """Check the files that training goes on from.

    Raises:
        ValueError: one is not what was saved.
    """
    if name := changed(folder, _is_training_state):
        raise ValueError(f"{name} is not what was saved")


def require_model(folder: Path) -> None:
    """Check the files that a model is loaded from, and those that lie beside it.

    Raises:
        CheckpointError: one is not what was saved.
    """
    if name := changed(folder, lambda name: not _is_training_state(name)):
        raise CheckpointError(
            f"{folder / name} is not what was saved; use another checkpoint, or, if you changed it yourself, remove "
            f"its line from {DIGESTS}"
        )


def changed(folder: Path, which: Callable[[str], bool] = lambda name: True) -> str | None:
    """Return a file that is not what was recorded, None if all are; one not recorded, or missing, isn't looked at.

    Args:
        folder: with its ``digests.json``; without one, nothing is recorded.
        which: says of a file's path in the folder whether it counts.
    """
    records = folder / DIGESTS
    if not records.is_file():
        return None
    try:
        digests = json.loads(records.read_text(encoding="utf-8"))
    except ValueError:
        return DIGESTS
    if not isinstance(digests, dict):
        return DIGESTS
    # only what lies in the folder is looked up, so that no record can name another
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if which(name) and name in digests and digests[name] != sha256_of(path):
            return name
    return None


def _is_training_state(name: str) -> bool:
    return name.startswith(("trainer_state", "optimizer", "scheduler", "scaler", "rng_state", "global_step"))
