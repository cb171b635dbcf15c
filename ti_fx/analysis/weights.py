"""What Ternarize would do with every stored tensor of a model, and why it leaves some alone."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx import encodings, numerics, roles
from ti_fx.graph import aten_name, parameter_nodes, tensor
from ti_fx.passes import Ternarize
from ti_fx.selection import heads

SCALE_BYTES = 4  # a scale is stored in float32
_NORMS = ("layer_norm", "rms_norm", "group_norm")


@dataclass(frozen=True)
class StoredWeight:
    """One Parameter that the graph reads (a tied one once), and what becomes of it.

    Attributes:
        name: in the source model's own names.
        shape: numbers. dtype: ``float32``.
        encoding: ``ternary, a scale per tensor``, ``ternary, a scale per row``, or ``kept``.
        reason: what it is, or why it is kept.
        bytes_before: as it is now. bytes_after: packed at two bits a code, scales included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def is_ternary(self) -> bool:
        """Whether the weight becomes ternary."""
        return self.encoding != "kept"


def stored_weights(gm: GraphModule, ternarize: Ternarize | None = None) -> list[StoredWeight]:
    """Return every Parameter of the student, in the order in which the graph reads them.

    Args:
        gm: a captured graph.
        ternarize: the pass with its options; None: its defaults.

    Raises:
        SelectionError: one of the pass's skip globs matches nothing.
    """
    ternarize = ternarize or Ternarize()
    chosen = {str(node.target): granularity for node, granularity in ternarize.select(gm).items()}
    kept_heads = heads(gm)
    rows: list[StoredWeight] = []
    for name, reads in parameter_nodes(gm.graph).items():
        value = tensor(gm, name)
        if not roles.is_student(reads[0]) or not isinstance(value, nn.Parameter):
            continue
        readers = [reader for read in reads for reader in _readers(read)]
        size = value.numel() * value.element_size()
        if name in chosen:
            encoding = f"ternary, a scale per {chosen[name]}"
            is_table = any(aten_name(reader) == "embedding" for reader in readers)
            reason = "word embedding" if is_table else "linear projection"
            after = _packed_bytes(value, chosen[name])
        else:
            encoding, reason, after = "kept", _reason(name, value, readers, kept_heads, ternarize), size
        dtype = str(value.dtype).removeprefix("torch.")
        rows.append(StoredWeight(name, tuple(value.shape), dtype, encoding, reason, size, after))
    return rows


def _packed_bytes(value: Tensor, granularity: str) -> int:
    scales = value.shape[0] if granularity == "row" else 1
    return -(-value.numel() // encodings.CODES_PER_BYTE) + SCALE_BYTES * scales


def _readers(node: Node) -> list[Node]:
    """Return who computes with a stored tensor, past its transpose and its quantiser."""
    found: list[Node] = []
    for user in node.users:
        transparent = user.target is numerics.ternary or aten_name(user) in ("t", "transpose")
        found += _readers(user) if transparent else [user]
    return [user for user in found if user.op != "output"]


def _reason(
    name: str, value: Tensor, readers: list[Node], kept_heads: set[Node], ternarize: Ternarize
) -> str:
    """1. skip  2. norms and biases  3. tables  4. heads  5. convolutions  6. left out by options  7. the rest."""
    operations = {aten_name(reader) for reader in readers}
    if any(
        fnmatch.fnmatchcase(part, glob) for glob in ternarize.skip for part in (name, name.rpartition(".")[0])
    ):
        return "skip"
    if value.dim() == 1:
        if operations & set(_NORMS):
            return "norm"
        return (
            "bias" if operations & {"linear", "addmm", "add", "conv2d", "conv1d"} else "vector: norm or scale"
        )
    if "embedding" in operations:
        if value.shape[0] < ternarize.min_rows:
            return f"table of {value.shape[0]} rows; a word embedding has {ternarize.min_rows} or more"
        return (
            "embeddings=none"
            if ternarize.embeddings is None
            else "table not indexed by an input of the graph"
        )
    if any(reader in kept_heads for reader in readers) and not ternarize.head:
        return "head: no parametric operation follows it"
    if any(operation.startswith("conv") for operation in operations):
        return "convolution, not a linear projection"
    if operations & {"linear", "addmm", "mm", "matmul"} and ternarize.weights is None:
        return "weights=none"
    return f"no linear projection (read by {', '.join(sorted(filter(None, operations))) or 'a module'})"
