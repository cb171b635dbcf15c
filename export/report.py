"""A report says what an export did: where the bytes are, and how closely ONNX Runtime and PyTorch agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LISTED = 4


@dataclass(frozen=True)
class OutputDifference:
    """One output of one comparison, ONNX Runtime against PyTorch.

    Attributes:
        output: exported name.
        case: which inputs, such as ``batch=3, sequence=19``.
        maximum, p99, mean: of the absolute difference.
        span: largest minus smallest PyTorch value.
        allowed: the largest difference that is accepted, of the p99 or of the maximum as the tolerance says.
    """

    output: str
    case: str
    maximum: float
    p99: float
    mean: float
    span: float
    allowed: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """Everything measured, in the order of the table's columns."""
        return self.maximum, self.p99, self.mean, self.span, self.allowed


@dataclass(frozen=True)
class NodeReport:
    """What the comparison of single nodes found.

    Attributes:
        nodes: how many nodes of the file were compared.
        worst: the largest relative L2 distance of a node without quantised activations. worst_node: its name.
        steps: the largest distance of a product of quantised activations, in steps of its quantiser; above 0.01 where
            a value beside a rounding boundary fell on the other side. steps_node: its name.
    """

    nodes: int
    worst: float
    worst_node: str
    steps: float
    steps_node: str

    def __str__(self) -> str:
        text = f"{self.nodes} nodes were compared one by one on PyTorch's own inputs: relative at most {self.worst:.1e}"
        if self.worst_node:
            text += f" (%{self.worst_node})"
        if self.steps_node:
            text += f"; products of quantised activations within {self.steps:.2g} steps (%{self.steps_node})"
        return text


@dataclass(frozen=True)
class ParityReport:
    """ONNX Runtime against the packed graph in PyTorch.

    Attributes:
        differences: one row per output and case.
        tolerance: what was allowed, and why.
        tensors: how many stored tensors of the file were compared with the graph's, byte by byte.
        nodes: the comparison of single nodes.
        skipped: cases in which outputs were not compared, and why: the model does not take them, so the example itself
            was compared instead, or a last bit moves an output by much of its range.
    """

    differences: tuple[OutputDifference, ...]
    tolerance: str
    tensors: int = 0
    nodes: NodeReport | None = None
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("output", "case", "max", "p99", "mean", "range", "allowed")] + [
            (row.output, row.case, *(f"{value:.2e}" for value in row.numbers)) for row in self.differences
        ]
        lines = [_columns(rows)] if self.differences else []
        lines.append(f"allowed: {self.tolerance}")
        if self.tensors:
            lines.append(f"{self.tensors} stored tensors are equal byte for byte")
        if self.nodes is not None:
            lines.append(str(self.nodes))
        lines += [f"not compared at {case}" for case in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in the file.

    Attributes:
        name: the tensor's name in the packed graph, or in the file where it has none there.
        kind: ``codes``, ``scale`` or ``other``.
        shape: as the weight's codes, not bytes, are counted.
        bytes: on disk.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class ExportReport:
    """An exported file.

    Attributes:
        path: where it is.
        bytes: its size on disk.
        opset: ONNX opset.
        encoding: name in ``ti_fx.numerics.encodings.ENCODINGS``, and after it each weight of another one.
        tensors: every stored tensor, largest first.
        ternary_weights: how many weights are stored as codes.
        parity: the comparison that the file passed.
        requantized: relative L2 distance between the outputs before and after the encoding was changed, by output;
            None where it was not.
        sidecars: files written beside it.
        batch_dependent: the weights whose activation has one range for the whole batch, so that a row's result depends
            on what else is in it; ``attention`` stands for the products of attention.
        attention_blocks: how many blocks of attention were found.
        unfused: why one of them is not ONNX's ``Attention``, by its place: ``stack 0, layer 3 (self)``.
    """

    path: Path
    bytes: int
    opset: int
    encoding: str
    tensors: tuple[StoredTensor, ...]
    ternary_weights: int
    parity: ParityReport
    requantized: dict[str, float] | None = None
    sidecars: tuple[Path, ...] = ()
    batch_dependent: tuple[str, ...] = ()
    attention_blocks: int = 0
    unfused: Mapping[str, str] = field(default_factory=dict)

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is independent of what else is in its batch."""
        return not self.batch_dependent

    def bytes_of(self, *kinds: str) -> int:
        """Return the bytes of all tensors of these kinds."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.kind in kinds)

    @property
    def code_bits(self) -> float:
        """Bits on disk per ternary weight, codes only."""
        return 8 * self.bytes_of("codes") / self.ternary_weights

    @property
    def code_and_scale_bits(self) -> float:
        """Bits on disk per ternary weight, codes and scales."""
        return 8 * self.bytes_of("codes", "scale") / self.ternary_weights

    def __str__(self) -> str:
        stored = sum(tensor.bytes for tensor in self.tensors)
        rows = [("part", "tensors", "bytes", "share")]
        for label, kind in (("ternary codes", "codes"), ("scales", "scale"), ("other tensors", "other")):
            rows.append(
                self._row(label, len([t for t in self.tensors if t.kind == kind]), self.bytes_of(kind))
            )
        rows.append(self._row("graph", 0, self.bytes - stored))
        rows.append(self._row("file", len(self.tensors), self.bytes))
        largest = [("largest tensors", "kind", "shape", "bytes")] + [
            (tensor.name, tensor.kind, "x".join(map(str, tensor.shape)) or "scalar", f"{tensor.bytes:,}")
            for tensor in self.tensors[:8]
        ]
        lines = [
            f"{self.path}: {self.bytes / 1e6:.2f} MB, encoding {self.encoding}, opset {self.opset}",
            _columns(rows),
            f"{self.ternary_weights:,} ternary weights: {self.code_bits:.3f} bits each, "
            f"{self.code_and_scale_bits:.3f} with scales",
            _columns(largest),
            batch_text(self.batch_dependent),
            *self._attention_lines(),
            str(self.parity),
        ]
        if self.requantized is not None:
            cost = ", ".join(f"{name} {value:.2%}" for name, value in self.requantized.items())
            lines.append(f"requantised after training; relative L2 distance from the trained student: {cost}")
        if self.sidecars:
            lines.append("beside it: " + ", ".join(path.name for path in self.sidecars))
        return "\n".join(lines)

    def _attention_lines(self) -> list[str]:
        """Say how many blocks became one node, and why others did not."""
        if not self.attention_blocks:
            return []
        fused = self.attention_blocks - len(self.unfused)
        lines = [f"{fused} of {self.attention_blocks} attention blocks became ONNX's Attention"]
        for reason in dict.fromkeys(self.unfused.values()):
            places = [place for place, why in self.unfused.items() if why == reason]
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"  not that of {places[0]}{more}: {reason}")
        return lines

    def _row(self, label: str, count: int, size: int) -> tuple[str, str, str, str]:
        return label, str(count) if count else "", f"{size:,}", f"{size / self.bytes:.1%}"


def batch_text(dependent: Sequence[str]) -> str:
    """Say whether a row's result depends on its batch, and through which weights."""
    if not dependent:
        return "a row's result does not depend on what else is in its batch"
    more = len(dependent) - _LISTED
    listed = ", ".join(dependent[:_LISTED]) + (f" and {more} more" if more > 0 else "")
    return f"a row's result depends on what else is in its batch: one range of activations for all, before {listed}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
