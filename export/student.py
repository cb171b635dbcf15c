"""A student that is exported is packed, stands alone, and has the encodings it was trained with, or one on request."""

from __future__ import annotations

from torch.fx import GraphModule

from ti_fx.errors import EncodingMismatch, PreconditionError
from ti_fx.find.packed import encoding_of, packed_weights, weight_quantisers
from ti_fx.ir import roles
from ti_fx.ir.edit import fork
from ti_fx.ir.inserted import weight_quantiser_of
from ti_fx.ir.pipeline import Pipeline
from ti_fx.numerics.encodings import WeightEncodings, get_encoding
from ti_fx.passes.deploy.requantize import Requantize


def require_packed(gm: GraphModule) -> None:
    """Refuse a graph that is not a packed student.

    Raises:
        PreconditionError: names the pass that is missing.
    """
    for node in gm.graph.nodes:
        if roles.role(node) in ("teacher", "loss"):
            raise PreconditionError(
                f"export needs the student alone, and %{node.name} is {roles.role(node)}; run Strip() and Pack() first"
            )
        if weight_quantiser_of(node) is not None:
            raise PreconditionError(f"export needs packed weights, and %{node.name} is not; run Pack() first")
    if not any(packed_weights(gm)):
        raise PreconditionError("export finds no packed ternary weight; run Ternarize() and Pack() first")


def with_encoding(gm: GraphModule, encoding: str | None, requantize: bool) -> GraphModule:
    """Return ``gm`` if ``encoding`` is its own (or None), else a fork with the other encoding.

    An encoding of the same numerics is another way to store the same student, and always allowed.

    Raises:
        InputError: there is no such encoding.
        EncodingMismatch: it computes something else, and ``requantize`` is false.
    """
    trained = encoding_of(gm)
    if encoding is None or WeightEncodings(encoding) == trained:
        return gm
    wanted = get_encoding(encoding).quantiser
    if not requantize and any(quantiser is not wanted for quantiser in weight_quantisers(gm).values()):
        raise EncodingMismatch(
            f"the student was trained with encoding '{trained}', and {encoding!r} was asked for; leave encoding out, "
            "train with the other one, or pass requantize=True to see what the change costs"
        )
    copy = fork(gm)
    Pipeline(Requantize(encoding))(copy)
    return copy


def as_written(
    gm: GraphModule, encoding: WeightEncodings, requantized_from: WeightEncodings | None
) -> GraphModule | None:
    """Return the graph that computes as a file of ``encoding``, None if ``gm`` is not what it was written from."""
    if requantized_from == encoding_of(gm) and not encoding.others:
        return with_encoding(gm, encoding.name, requantize=True)
    found = weight_quantisers(gm)
    same = all(get_encoding(encoding.of(name)).quantiser is quantiser for name, quantiser in found.items())
    return gm if same else None


def same_numerics(one: GraphModule, other: GraphModule) -> bool:
    """Whether two forks of a student compute the same, however they are stored."""
    return weight_quantisers(one) == weight_quantisers(other)
