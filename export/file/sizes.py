"""Each stored tensor takes up a part of a file's bytes: a row for each, largest first."""

from __future__ import annotations

from ti_fx.export.file.content import FileContent
from ti_fx.export.report import StoredTensor
from ti_fx.numerics.layouts import LAYOUTS


def tensor_sizes(file: FileContent) -> tuple[StoredTensor, ...]:
    """Return the file's tensors, those of the packed graph by its names."""
    known = {item.initializer: item for item in reversed(file.tensors)}
    rows = []
    for name, one in file.stored.items():
        item = known.get(name)
        kind = "other" if item is None else "codes" if item.kind in LAYOUTS else "scale"
        label = name if item is None else item.target
        rows.append(StoredTensor(label, kind, one.shape, one.nbytes))
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.name)))
