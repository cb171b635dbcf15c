"""A table says which ONNX Runtime is the oldest to compute a file, as ``benchmarks/runtimes.py`` measured it.

That script cuts files of every encoding at each of their nodes, runs them in other versions, and compares every node
with the installed one's on the same inputs. What it found on 2026-11-22, on an x86 CPU, in the last patch of each
version from 1.15, the oldest that the registry still has, to 1.31 (1.19 was left out):

* Where a version loads a file, every node agrees with 1.31.1's to 2e-7 (relative L2), but for MatMulNBits.
* MatMulNBits of two bits loads from 1.24 on, and computes something else until 1.27: 0.4% to 1% apart. So files name
  its attribute ``weight_prepacked``, with its default: 1.28 was the first to know it, and older ones refuse the file.
* GatherBlockQuantized of two bits, which looks rows of a table up that a product reads, too, loads from 1.27 on.
* Up to 1.29 the norms round otherwise in the last bit. A value beside a rounding boundary of an 8-bit
  quantiser may then fall on the other side, as it may on another CPU, and a deep network may amplify that. In
  ``portable`` the logits of a BERT-base with random weights were 0.9% (relative L2) apart between 1.17.3 or 1.22.1 and
  1.31.1, though on the same inputs all other nodes were equal in every bit; PyTorch's own logits move by 3.8% if its
  products change in the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ti_fx.errors import InputError

MINIMUM_RUNTIME = "ti_fx.minimum_onnxruntime"
Version = tuple[int, int]

# Since when a version runs a standard opset with the operators that the encodings use.
_OPSETS: dict[int, Version] = {
    18: (1, 15),
    19: (1, 16),
    20: (1, 17),
    21: (1, 18),
    22: (1, 21),
    23: (1, 24),  # 1.23 lacks quantisation by blocks
    24: (1, 24),
    25: (1, 24),
}
# Since when it computes what the newest does.
_CONTRIBUTED: dict[str, Version] = {"GatherBlockQuantized": (1, 27), "MatMulNBits": (1, 28)}
_BLOCKS: Version = (1, 20)  # QuantizeLinear with a scale for each block


def minimum_runtime(model: ir.Model) -> str:
    """Return the oldest version of ONNX Runtime that was seen to compute a model as the installed one does.

    A model with an operator that was not measured has the installed version.
    """
    installed = _version(onnxruntime.__version__)
    found = [_OPSETS.get(model.opset_imports[""], installed)]
    for node in model.graph.all_nodes():
        if node.domain:
            found.append(_CONTRIBUTED.get(node.op_type, installed))
        elif node.op_type == "QuantizeLinear" and "block_size" in node.attributes:
            found.append(_BLOCKS)
    return ".".join(map(str, max(found)))


def require_runtime(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file that the installed ONNX Runtime may compute otherwise, or not at all.

    Args:
        path: what an error names.
        metadata: of the file; one that does not say which version it needs is not refused.

    Raises:
        InputError: the installed version is older than the file's oldest.
    """
    wanted = metadata.get(MINIMUM_RUNTIME)
    if wanted is None:
        return
    try:
        oldest = _version(wanted)
    except ValueError:
        raise InputError(f"{path}: its metadata {MINIMUM_RUNTIME} is damaged; export it again") from None
    if _version(onnxruntime.__version__) < oldest:
        raise InputError(
            f"{path} needs ONNX Runtime {wanted} or newer, and {onnxruntime.__version__} is installed, which computes "
            f"something else or can't load it: pip install 'onnxruntime>={wanted}', or export it with "
            "encoding='portable', which 1.15 runs"
        )


def _version(text: str) -> Version:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)
