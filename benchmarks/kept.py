"""Built files that are kept between runs, and never reused under another key than they were built under."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ti_fx.errors import InputError
from ti_fx.files import atomic_write

RECORD = "built.json"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A folder with what was built in it, what was found on the way, and the digest of its key."""

    folder: Path
    facts: dict[str, Any]
    digest: str


class Store:
    """Entries by name, a folder each, with the key under which each was built.

    Args:
        folder: holds the entries; made if it is missing.
        console: is told what is built and why.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"can't keep files in {folder}: {error.strerror}; choose a folder you can write to"
            ) from error

    def get(self, name: str, key: Mapping[str, str], build: Callable[[Path], dict[str, Any]]) -> Entry:
        """Return an entry, built unless it is there under the same key and whole.

        Args:
            name: of the entry and its folder.
            key: everything that what is built depends on, as text.
            build: writes files into the empty folder it is given; returns facts that JSON can hold.
        """
        folder = self.folder / name
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        reason = _stale(folder, key)
        if reason is None:
            self.console.print(f"{name}: reused from {folder}", soft_wrap=True)
            return Entry(folder, json.loads((folder / RECORD).read_text())["facts"], digest)
        self.console.print(f"{name}: building ({reason}) ...", soft_wrap=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{name}."))
        try:
            facts = build(temporary)
            record = {"key": dict(key), "facts": facts, "files": _sizes(temporary)}
            atomic_write(temporary / RECORD, json.dumps(record, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Entry(folder, facts, digest)


def versions(*names: str) -> dict[str, str]:
    """Return the versions of installed distributions, for a key."""
    return {name: version(name) for name in names}


def sources(*names: str) -> str:
    """Return the digest of the Python files that these paths in the repository are or hold."""
    digest = hashlib.sha256()
    for path in sorted(_python_files(ROOT / name for name in names)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _python_files(paths: Iterable[Path]) -> set[Path]:
    return {
        file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]) if file.is_file()
    }


def _stale(folder: Path, key: Mapping[str, str]) -> str | None:
    """Return why an entry can't be reused, None if it can."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files, built_under = record["files"], record["key"]
    except FileNotFoundError:
        return "not built yet"
    except (ValueError, KeyError, TypeError):
        return f"{folder / RECORD} can't be read"
    changed = sorted(name for name in {*built_under, *key} if built_under.get(name) != key.get(name))
    if changed:
        return f"built under another {', '.join(changed)}"
    if files != _sizes(folder):
        return "files were changed since"
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
