"""A checkpoint is written beside its place and moved there whole, so that a killed run leaves the old one or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ti_fx.files import alone_in, reported
from ti_fx.train.intact import record


@contextmanager
def finished_folder(
    target: Path, *, owner: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a folder to write to; on success it replaces ``target`` whole, else it is removed.

    It is ``.<name>.tmp/<name>`` beside the target, so that what a killed run left there is replaced by the next one.
    Another process that saves beside it waits meanwhile.

    Args:
        target: the folder that is wanted.
        owner: whether this is the one of several processes that makes and moves the folder.
        barrier: waits for the other processes.

    Raises:
        InputError: nothing can be written there, or the disk is full.
    """
    outer = target.with_name(f".{target.name}.tmp")
    temporary, old = outer / target.name, outer / "old"
    with reported(f"checkpoint {target}"), alone_in(target.parent) if owner else nullcontext():
        try:
            if owner:
                shutil.rmtree(outer, ignore_errors=True)
                temporary.mkdir(parents=True)
            barrier()
            yield temporary
            barrier()
            if owner:
                record(temporary)
                _sync(temporary)
                if target.exists():
                    os.replace(target, old)
                os.replace(temporary, target)
            barrier()
        except BaseException:
            if owner and old.exists() and not target.exists():
                os.replace(old, target)
            raise
        finally:
            if owner:
                shutil.rmtree(outer, ignore_errors=True)


@contextmanager
def finished_files(target: Path, last: str) -> Iterator[Path]:
    """Yield a folder to write to; on success its files replace those in ``target``, else ``target`` stays as it is.

    Other files in ``target`` are left alone. The file called ``last`` leaves first and comes last, so that a run killed
    in between leaves a folder that is seen to be unfinished. Another process that saves into it waits meanwhile.

    Raises:
        InputError: nothing can be written there, or the disk is full.
    """
    outer = target / ".saving"
    new, old = outer / "new", outer / "old"
    placed: list[Path] = []
    with reported(f"checkpoint {target}"), alone_in(target):
        try:
            shutil.rmtree(outer, ignore_errors=True)
            new.mkdir(parents=True)
            old.mkdir()
            yield new
            record(new)
            _sync(new)
            names = sorted((path.name for path in new.iterdir()), key=lambda name: name != last)
            for name in names:
                if (target / name).exists():
                    os.replace(target / name, old / name)
            for name in reversed(names):
                os.replace(new / name, target / name)
                placed.append(target / name)
        except BaseException:
            for path in placed:
                path.unlink()
            for path in sorted(old.glob("*"), key=lambda path: path.name == last):
                os.replace(path, target / path.name)
            raise
        finally:
            shutil.rmtree(outer, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
