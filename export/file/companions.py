"""A file's companions (configuration, tokenizer, ...) lie beside it, and the file holds their digests.

So a file never answers with the labels or the tokenizer of another that was exported into its folder, and an export
replaces nothing that it did not write itself.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ti_fx.errors import InputError
from ti_fx.export.file.content import TENSORS_KEY
from ti_fx.export.file.external_data import metadata_in
from ti_fx.files import reported

COMPANIONS = "ti_fx.companions"
CONFIG = "config.json"
TOKENIZER, PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"
_ARGUMENTS = {
    CONFIG: "config=model.config",
    TOKENIZER: "tokenizer=tokenizer",
    PROCESSOR: "processor=image_processor",
}


class Saveable(Protocol):
    """A transformers configuration, tokenizer, image processor or feature extractor."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write its files into a folder."""


def contents_of(parts: Iterable[Saveable | None]) -> dict[str, bytes]:
    """Return the files that configuration, tokenizer and so on are saved as, by name.

    Raises:
        InputError: one can't be saved.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part is not None:
                with reported(folder):
                    part.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def entry_of(contents: Mapping[str, bytes]) -> str:
    """Return what a file's metadata says of its companions, as JSON: the SHA-256 of each by its name."""
    return json.dumps({name: _digest(content) for name, content in contents.items()})


def require_place(paths: Collection[Path], contents: Mapping[str, bytes]) -> None:
    """Refuse to replace a file that was not exported together with those that are replaced.

    Args:
        paths: the files to write, all in one folder.
        contents: their companions.

    Raises:
        InputError: something else is there under a companion's name.
    """
    folder = next(iter(paths)).parent
    for name, content in contents.items():
        place = folder / name
        if not place.is_file() or (found := _digest(place.read_bytes())) == _digest(content):
            continue
        owners = [file for file in _files(folder, paths) if (_recorded(file) or {}).get(name) == found]
        others = [file for file in owners if file not in paths]
        if others or not (owners or _are_alone(paths)):
            whose = (
                f"belongs to {others[0].name}"
                if others
                else f"was not exported with {next(iter(paths)).name}"
            )
            raise InputError(
                f"{place} {whose}, and the export would replace it by another; give the file a folder of its own"
            )


@contextmanager
def companions(path: Path) -> Iterator[Path]:
    """Yield a folder with what was exported together with a file, and nothing else.

    Of a file without a record, which an older ti_fx or another program wrote, it is the file's own folder.

    Raises:
        InputError: a companion is missing or another one; or there is no record, and the folder has other exported
            files.
    """
    recorded = _recorded(path)
    if recorded is None:
        if TENSORS_KEY in metadata_in(path) and not _are_alone((path,)):
            raise InputError(
                f"{path} does not say which files beside it are its own, as an older ti_fx wrote it, and other exports "
                "are there, too; export it again, or move it with its files into a folder of its own"
            )
        yield path.parent
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, digest in recorded.items():
            (Path(folder) / name).write_bytes(_content(path, name, digest))
        yield Path(folder)


def require_companion(path: Path, folder: Path, name: str) -> None:
    """Refuse a file without a companion of this name in ``folder``, which is what :func:`companions` gave.

    Raises:
        InputError: says with which argument the file is exported with it.
    """
    if not (folder / name).is_file():
        there = (path.parent / name).is_file()
        what = f"the {name} beside {path} was not exported with it" if there else _missing(path, name)
        raise InputError(f"{what}; export it with to_onnx(..., {_ARGUMENTS[name]})")


def _content(path: Path, name: str, digest: str) -> bytes:
    file = path.parent / name
    if name != Path(name).name or name in ("", ".", ".."):
        raise InputError(
            f"{path} names {name!r}, which is no file beside it: don't trust it, and export again"
        )
    if not file.is_file():
        raise InputError(
            f"{_missing(path, name)}; export it with to_onnx(..., {_ARGUMENTS.get(name, 'tokenizer=...')})"
        )
    content = file.read_bytes()
    if _digest(content) != digest:
        raise InputError(
            f"{name} beside {path} is not the one that was exported with it: it was changed, or is another model's; "
            "put it back, or export again into a folder of its own"
        )
    return content


def _missing(path: Path, name: str) -> str:
    return f"there is no {name} beside {path}"


def _recorded(path: Path) -> dict[str, str] | None:
    """Return the digests of a file's companions by name, None if it says nothing of them."""
    text = metadata_in(path).get(COMPANIONS) if path.is_file() else None
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise InputError(f"{path}: its metadata {COMPANIONS} is damaged; export it again")
    return found


def _are_alone(paths: Collection[Path]) -> bool:
    """Whether these files have no record, and are the only ones in their folder that ti_fx wrote."""
    folder = next(iter(paths)).parent
    written = {file for file in _files(folder, paths) if TENSORS_KEY in metadata_in(file)}
    return bool(written) and written <= set(paths) and all(_recorded(file) is None for file in written)


def _files(folder: Path, paths: Collection[Path]) -> list[Path]:
    """Return the models in a folder, with those of any name."""
    return sorted({file for file in (*folder.glob("*.onnx"), *paths) if file.is_file()})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
