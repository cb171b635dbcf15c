"""A file ends with the SHA-256 of what stands before it, so that one that was damaged is refused where it is loaded.

The digest is an entry of the model's metadata, written last: to a reader of ONNX it is as any other. A tool that writes
the model anew gives it another length, by which it is known to be no longer the file that was written.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import onnx

from ti_fx.errors import InputError

INTACT_KEY = "ti_fx.intact"
_ENTRY = re.compile(re.escape(INTACT_KEY.encode()) + rb"\x12.(\d{1,12}) ([0-9a-f]{64})\Z", re.DOTALL)
_LONGEST = 200  # bytes that an entry takes at most


def with_digest(content: bytes) -> bytes:
    """Return a serialised model with its length and its SHA-256 after it."""
    return content + _entry(len(content), hashlib.sha256(content).hexdigest())


def _entry(length: int, digest: str) -> bytes:
    entry = onnx.StringStringEntryProto(key=INTACT_KEY, value=f"{length} {digest}")
    content: bytes = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    return content


def require_intact(path: Path) -> None:
    """Check that a file that has the length that was written is what was written.

    Raises:
        InputError: it is not.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _LONGEST))
        found = _ENTRY.search(file.read())
        if found is None:
            return
        length, digest = int(found[1]), found[2].decode()
        if length + len(_entry(length, digest)) != size:
            return  # written anew by another tool
        file.seek(0)
        sha256 = hashlib.sha256()
        left = length
        while left and (part := file.read(min(left, 2**20))):
            sha256.update(part)
            left -= len(part)
    if sha256.hexdigest() != digest:
        raise InputError(
            f"{path} is not what was written (its SHA-256 is another): copy it again, or export it again; if you "
            f"changed it yourself, remove {INTACT_KEY} from its metadata"
        )
