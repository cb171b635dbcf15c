"""The demo keeps what a stage made by the hash of everything that went into it, code and processor included."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ti_fx
from ti_fx.demo.circumstances import circumstances
from ti_fx.train.finished import finished_folder
from ti_fx.train.intact import changed

RESULT = "result.json"
VERSIONS = ("torch", "transformers", "accelerate", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Stage:
    """A stage that has run: its folder, what it returned, whether it was reused, and the seconds it took then."""

    name: str
    folder: Path
    result: dict[str, Any]
    reused: bool
    seconds: float


class Stages:
    """Run stages below one folder; a stage whose inputs, code and files are unchanged is taken from there."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.done: list[Stage] = []

    def run(
        self, name: str, facts: Mapping[str, Any], code: Iterable[str], make: Callable[[Path], dict[str, Any]]
    ) -> Stage:
        """Return the stage's result, from an earlier run if nothing that goes into it has changed.

        Args:
            name: of the stage and its folder.
            facts: JSON values that the result depends on: settings, hashes of data and of earlier stages.
            code: the parts of ti_fx that the result depends on (``"passes"``, ``"train"``, ...).
            make: writes files into the folder it is given, and returns JSON values.
        """
        key = _hash(
            {
                "facts": facts,
                "code": {part: code_hash(part) for part in code},
                "versions": _versions(),
                "circumstances": circumstances(),
            }
        )
        folder = self.folder / f"{name}-{key[:12]}"
        found = _finished(folder)
        if found is not None:
            self.say(f"{name}: reused ({found['seconds']:.0f} s when it ran)")
            stage = Stage(name, folder, found["result"], True, found["seconds"])
        else:
            self.say(f"{name}: running")
            start = time.perf_counter()
            with finished_folder(folder) as temporary:
                result = make(temporary)
                seconds = time.perf_counter() - start
                content = json.dumps({"result": result, "seconds": seconds}, indent=1)
                (temporary / RESULT).write_text(content, encoding="utf-8")
            self.say(f"{name}: {seconds:.0f} s")
            stage = Stage(name, folder, result, False, seconds)
        self.done.append(stage)
        return stage


def code_hash(part: str) -> str:
    """Return a hash of the Python files of a subpackage or module of ti_fx, by its dotted name.

    Raises:
        FileNotFoundError: ti_fx has no such part.
    """
    root = Path(ti_fx.__file__).parent
    place = root.joinpath(*part.split("."))
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    content = hashlib.sha256()
    for file in files:
        content.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return what a stage left, None if it has not run to its end or one of its files is not what it wrote."""
    if not (folder / RESULT).is_file() or changed(folder) is not None:
        return None
    value: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return value
