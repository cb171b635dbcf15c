"""Turn each ternary weight into packed codes and a scale, in the graph itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.ir import roles
from ti_fx.ir.edit import call, erase, erase_dead, get_attr, prune, register, supersede, tensor
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import quantiser_of, reads_weight, weight_quantiser_of
from ti_fx.ir.leaves import is_buffer_write
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED, PREPARED
from ti_fx.numerics import encodings
from ti_fx.numerics.weight_codes import group_of


@dataclass(frozen=True)
class Pack(Pass):
    """A ternary weight is stored as two-bit codes and a scale; the graph still runs in PyTorch, with equal values.

    before:  %w = w                              after:  %w_codes = w_codes          u8[elements / 4]
             %w_q = ternary(%w)                          %w_scale = w_scale          f32[], [rows, 1] or [rows, groups]
                                                         %w_q = unpack_ternary(%w_codes, %w_scale, shape, dtype)
    with ``kept=float16``:
             %bias = bias                                %bias_half = packed.bias_half  f16
                                                         %bias = to(%bias_half, float32)

    What writes into a buffer goes: a packed student is not trained, and whoever runs it keeps the buffers as they are.

    Attributes:
        kept: the type in which float32 Parameters that are not ternary are stored (biases, norms, position tables,
            heads). float16 rounds them, here as in the file; one with values beyond its range stays as it is. None is
            what the student's encoding wants: float16 for ``base3``, whose point is size, float32 for all others.
    """

    takes = (PREPARED, PACKED)
    gives = PACKED

    kept: encodings.Kept | None = None

    def requires(self, gm: GraphModule) -> None:
        """A stripped graph with ternary weights, or one that is packed already."""
        require_ternary(gm)
        for node in gm.graph.find_nodes(op="get_attr"):
            if tensor(gm, str(node.target)).is_meta:
                raise PreconditionError(
                    f"pack needs values, and {node.target} is on the meta device; read them with "
                    "ti_fx.export.pack_from, or capture a model with weights"
                )

    def apply(self, gm: GraphModule) -> None:
        """Replace every quantiser, drop the latent weights and what writes into buffers."""
        if writes := [node for node in gm.graph.nodes if is_buffer_write(gm, node)]:
            for node in writes:
                node.replace_all_uses_with(node.all_input_nodes[0])
            for node in writes:
                erase(node)
            erase_dead(gm.graph.nodes)
        for node in [node for node in gm.graph.nodes if weight_quantiser_of(node) is not None]:
            weight, *learned = (tensor(gm, str(source.target)) for source in node.all_input_nodes)
            pack_weight(gm, node, weight, learned)
        if (self.kept or _kept(gm)) == "float16":
            for node in gm.graph.find_nodes(op="get_attr"):
                _halve(gm, node)
        prune(gm)

    def ensures(self, gm: GraphModule) -> None:
        """No quantiser is left."""
        for node in gm.graph.nodes:
            if weight_quantiser_of(node) is not None:
                raise PostconditionError(f"pack left %{node.name}")


def require_ternary(gm: GraphModule) -> None:
    """Refuse a graph that has more than the student, or nothing to pack.

    Raises:
        PreconditionError: names the pass that is missing.
    """
    for node in gm.graph.nodes:
        if roles.role(node) in ("teacher", "loss"):
            raise PreconditionError(
                f"pack needs the student alone, and %{node.name} is {roles.role(node)}", missing="strip"
            )
    if not any(map(reads_weight, gm.graph.nodes)):
        raise PreconditionError("pack finds no ternary weight", missing="ternarize")


def pack_weight(gm: GraphModule, node: Node, weight: Tensor, learned: Sequence[Tensor] = ()) -> None:
    """Replace a call of a weight quantiser by the codes and the scale of ``weight``, the values of what it reads.

    Args:
        gm: the graph.
        node: the call.
        weight: the values of its weight.
        learned: those of what else it reads.
    """
    quantiser, source, options = weight_quantiser_of(node), node.args[0], node.kwargs
    assert quantiser is not None
    assert isinstance(source, Node)
    with torch.no_grad():
        codes, *scales = quantiser.codes(weight, *learned, **options)
        packed = numerics.pack_codes(codes)
    sources = node.all_input_nodes
    name, reader = node.name, next(iter(node.users))
    parts = []
    for suffix, value in zip(("codes", "scale", "offset"), (packed, *scales), strict=False):
        target = f"packed.{source.target}_{suffix}"
        register(gm, target, value)
        parts.append(get_attr(node, target, f"{source.name}_{suffix}", "student", like=reader))
    arguments = (*parts[:2], list(weight.shape), weight.dtype)
    unpacked = call(node, numerics.unpack_ternary, arguments, f"{name}_unpacked", "student", like=reader)
    group = group_of(options["granularity"])  # type: ignore[arg-type]
    unpacked.kwargs = ({"group": group} if group else {}) | dict(zip(("offset",), parts[2:], strict=False))
    supersede(node, unpacked)
    for read in sources:
        if not read.users:
            erase(read)


def _kept(gm: GraphModule) -> encodings.Kept:
    name = facts(gm).encoding
    return "float32" if name is None else encodings.get_encoding(name).kept


def half_name(parameter: str) -> str:
    """Return the name of the buffer that holds a parameter in half precision."""
    return f"packed.{parameter}_half"


def _halve(gm: GraphModule, node: Node) -> None:
    value = tensor(gm, str(node.target)).detach()
    if any(quantiser_of(reader) for reader in node.users):
        return  # a step of activations, 4 bytes that every code is multiplied by
    if not isinstance(tensor(gm, str(node.target)), nn.Parameter) or value.dtype != torch.float32:
        return
    half = value.half()
    if not torch.equal(half.isfinite(), value.isfinite()):
        return
    target = half_name(str(node.target))
    register(gm, target, half)
    stored = get_attr(node, target, f"{node.name}_half", "student", like=node)
    arguments = (stored, torch.float32)
    supersede(
        node, call(node, torch.ops.aten.to.dtype, arguments, f"{node.name}_float", "student", like=node)
    )
