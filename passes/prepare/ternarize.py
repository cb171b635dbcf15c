"""Read each selected weight through a ternary quantiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ti_fx import numerics
from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.find.weights import Fate, fates, heads, table, word_embeddings
from ti_fx.ir import roles
from ti_fx.ir.edit import call
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.numerics.ternary_weights import Granularity


@dataclass(frozen=True)
class Ternarize(Pass):
    """Student reads of a weight go through ``ternary``; the Parameter stays in full precision and is trained.

    before:  %h = linear(%x, %w)                 after:  %w_q = ternary(%w, granularity=tensor)
                                                         %h = linear(%x, %w_q)

    1. linear projections, heads excepted (they stay in full precision unless ``head=True``)
    2. word embeddings: tables of at least ``min_rows`` rows indexed by an integer input
    3. a head tied to a word embedding: with ``tied="both"`` one quantiser, the embedding's, is read by both, and the
       tensor is stored once; with ``tied="embedding"`` the head reads the Parameter itself, and both are stored

    Source: TernaryBERT, section 3.1; per-tensor weights and per-row word embeddings as published.

    Attributes:
        weights, embeddings: granularity of the scale; None selects none of that kind.
        head: whether heads are selected, too.
        tied: what of an embedding that is tied to a head is ternary. The default keeps what tying is for, one stored
            tensor: GPT-2's head kept in full precision is 154 MB beside 31 MB of everything else.
        min_rows: the smallest table that counts as a word embedding.
        clip: latent weights are clamped to [-clip, clip]; outside, the gradient is zero.
        skip: globs over parameter names or module paths that are not selected.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    weights: Granularity | None = "tensor"
    embeddings: Granularity | None = "row"
    head: bool = False
    tied: Literal["both", "embedding"] = "both"
    min_rows: int = 1024
    clip: float = numerics.CLIP
    skip: tuple[str, ...] = ()

    def requires(self, gm: GraphModule) -> None:
        """A graph that is not packed."""
        for node in gm.graph.nodes:
            if node.target is numerics.unpack_ternary:
                raise PreconditionError(
                    f"ternarize can't change a packed weight (%{node.name}); capture the model again"
                )

    def apply(self, gm: GraphModule) -> None:
        """Insert or replace the quantiser of each selected weight, right after the weight's read."""
        kept = self._kept_readers(gm)
        for weight, granularity in self.select(gm).items():
            quantise(weight, granularity, self.clip, kept.get(weight, []))

    def ensures(self, gm: GraphModule) -> None:
        """Each selected weight has a quantiser with these options."""
        for weight, granularity in self.select(gm).items():
            found = [user for user in weight.users if user.target is numerics.ternary]
            if len(found) != 1 or found[0].kwargs != {"granularity": granularity, "clip": self.clip}:
                raise PostconditionError(f"ternarize did not quantise {weight.target}")

    def select(self, gm: GraphModule) -> dict[Node, Granularity]:
        """Return the get_attr node of each selected weight and its granularity, in graph order."""
        return {
            weight: fate.granularity
            for weight, fate in self.fates(gm).items()
            if fate.granularity is not None
        }

    def fates(self, gm: GraphModule) -> dict[Node, Fate]:
        """Return what becomes of each stored tensor, and why: see :func:`ti_fx.find.weights.fates`."""
        return fates(
            gm,
            weights=self.weights,
            embeddings=self.embeddings,
            head=self.head,
            min_rows=self.min_rows,
            skip=self.skip,
        )

    def _kept_readers(self, gm: GraphModule) -> dict[Node, list[Node]]:
        """Return, by table, the readers of a tied head that go on reading the Parameter."""
        if self.tied == "both" or self.head:
            return {}
        kept = heads(gm)
        found: dict[Node, list[Node]] = {}
        for weight in {table(node) for node in word_embeddings(gm, self.min_rows)}:
            found[weight] = [
                reader
                for reader in _readers(weight)
                if reader in kept or (reader.users and all(user in kept for user in reader.users))
            ]
        return found


def _readers(weight: Node) -> list[Node]:
    """Return who reads a weight, through its quantiser or not."""
    own = [user for user in weight.users if roles.is_student(user)]
    return [reader for user in own for reader in (user.users if user.target is numerics.ternary else (user,))]


def quantise(
    weight: Node, granularity: Granularity, clip: float = numerics.CLIP, kept: Sequence[Node] = ()
) -> None:
    """Let the readers of a weight read it through a quantiser, those in ``kept`` excepted."""
    options: dict[str, Argument] = {"granularity": granularity, "clip": clip}
    readers = _readers(weight)
    quantiser = next((user for user in weight.users if user.target is numerics.ternary), None)
    if quantiser is None:
        quantiser = call(
            weight.next, numerics.ternary, (weight,), f"{weight.name}_q", "student", like=readers[0]
        )
    quantiser.kwargs = options
    for reader in readers:
        wanted, other = (weight, quantiser) if reader in kept else (quantiser, weight)
        reader.replace_input_with(other, wanted)
        roles.record(reader, exempt=[weight.target] if reader in kept else None)
