"""Files are written so that a reader sees the old content or the new one, never half of either."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ti_fx.errors import InputError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

    Raises:
        InputError: the folder is missing, read-only or full, or the path is no file's. The file that was at ``path`` is
            left as it was.
    """
    target = Path(path)
    _require_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"can't write {target}: {error.strerror or error}; choose a folder you can write to"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            f"can't write {target}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the new file is there and whole; some file systems can't sync a folder
        _sync_folder(target.parent)


@contextmanager
def atomic_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success the files in it take their places, else none does.

    They are fsynced and renamed, the one called as ``path`` last; if that fails, the others are put back. Names of what
    it can't do without must depend on what they hold: so one that is replaced was equal, and a process that is killed
    before the last rename leaves the old file with what it names. What it left of its temporary folder is removed.

    Raises:
        InputError: the folder is missing, read-only or full, or the path is no file's. What was there is left as it
            was.
    """
    target = Path(path)
    _require_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            if (owner := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(owner)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    except OSError as error:
        raise InputError(
            f"can't write {target}: {error.strerror or error}; choose a folder you can write to"
        ) from error
    lock: int | None = None
    try:
        lock = _lock(folder)
        yield folder
        _put_beside(folder, target)
    except OSError as error:
        raise InputError(
            f"can't write {target}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _require_replaceable(target: Path) -> None:
    """Refuse a device, a pipe or a socket: renaming would put a file in its place (/dev/null)."""
    try:
        special = target.exists() and not target.is_file() and not target.is_dir()
    except OSError:
        return  # whatever it is, it can't be written either, which is said there
    if special:
        raise InputError(
            f"{target} is a device, a pipe or a socket, which no file may replace; choose another path"
        )


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends; None if another process has it."""
    if fcntl is None or not folder.is_dir():
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def alone_in(folder: Path, seconds: float = 600) -> Iterator[None]:
    """Wait until no other process that asks for it, too, writes into a folder, and keep the next one waiting.

    Raises:
        InputError: another one still writes there after that many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    end = time.monotonic() + seconds
    try:
        while descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(
                        f"another process writes into {folder}; give each run a folder of its own"
                    ) from None
                time.sleep(0.05)
            except OSError:  # some file systems have no locks
                break
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _put_beside(folder: Path, target: Path) -> None:
    last = folder / target.name
    others = sorted(file for file in folder.iterdir() if file != last)
    for file in (*others, last):
        with open(file, "rb+") as content:
            os.fsync(content.fileno())
        os.chmod(file, 0o644)
    new: list[Path] = []
    replaced: dict[Path, Path] = {}
    try:
        for file in others:
            place = target.parent / file.name
            if place.is_dir():
                raise IsADirectoryError(None, f"{place} is a folder")
            if place.exists():
                replaced[place] = folder / f"{file.name}.replaced"
                _link(place, replaced[place])
            else:
                new.append(place)
            os.replace(file, place)
        with suppress(OSError):  # some file systems can't sync a folder
            _sync_folder(target.parent)
        os.replace(last, target)
    finally:
        if last.exists():  # not renamed: nothing names the new ones
            for place in new:
                place.unlink(missing_ok=True)
            for place, old in replaced.items():
                os.replace(old, place)
    with suppress(OSError):  # the new files are there and whole; some file systems can't sync a folder
        _sync_folder(target.parent)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def reported(target: str) -> Iterator[None]:
    """Turn whatever a library raises when it can't write into one line.

    Raises:
        InputError: names ``target``, what was to be written and where.
    """
    try:
        yield
    except Exception as error:
        # torch raises RuntimeError, safetensors its own error, and tokenizers a bare Exception.
        if not (isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception):
            raise
        raise InputError(
            f"can't write {target}: {first_line(error)}; free some space or choose another folder"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal; it is read in parts.

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` through a temporary file, fsync and rename.

    Raises:
        InputError: the folder is missing, read-only or full.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
