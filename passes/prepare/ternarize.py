"""Read each selected weight through a ternary quantiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ti_fx import numerics
from ti_fx.errors import InputError, PostconditionError, PreconditionError, SelectionError
from ti_fx.find.weights import Fate, fates, heads, table, word_embeddings
from ti_fx.ir import roles
from ti_fx.ir.edit import call, erase, get_attr, register, tensor
from ti_fx.ir.inserted import weight_quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.numerics.weight_codes import Granularity
from ti_fx.numerics.weight_quantiser import WeightQuantiser
from ti_fx.numerics.weight_quantisers import get_method


@dataclass(frozen=True)
class Ternarize(Pass):
    """Student reads of a weight go through its quantiser; the Parameter stays in full precision and is trained.

    before:  %h = linear(%x, %w)                 after:  %w_q = ternary(%w, granularity=tensor)
                                                         %h = linear(%x, %w_q)

    1. linear projections, heads excepted (they stay in full precision unless ``head=True``)
    2. word embeddings: tables of at least ``min_rows`` rows indexed by an integer input
    3. a head tied to a word embedding: with ``tied="both"`` one quantiser, the embedding's, is read by both, and the
       tensor is stored once; with ``tied="embedding"`` the head reads the Parameter itself, and both are stored

    Source: TernaryBERT, section 3.1; per-tensor weights and per-row word embeddings as published. Of each other method
    its function says the formula and the source (``ti_fx.numerics.weight_quantisers``).

    Attributes:
        weights, embeddings: granularity of the scale: ``tensor``, ``row``, or ``group-32``, ``group-64``, ``group-128``
            (that many neighbours of the last dimension); None selects none of that kind.
        head: whether heads are selected, too.
        tied: what of an embedding that is tied to a head is ternary. The default keeps what tying is for, one stored
            tensor: GPT-2's head kept in full precision is 154 MB beside 31 MB of everything else.
        min_rows: the smallest table that counts as a word embedding.
        clip: latent weights are clamped to [-clip, clip]; outside, the gradient is zero.
        skip: globs over parameter names or module paths that are not selected.
        method: how weights become ternary, or binary: a name from ``ti_fx.numerics.weight_quantisers.METHODS``. What
            one of them learns is a Parameter of the student beside the weight, which the weight's values start:
            ``weight_quant.<parameter>.step``.
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
    method: str = "twn"

    def __post_init__(self) -> None:
        """Refuse a method that there is not, and options that it does not have.

        Raises:
            InputError: names what there is.
        """
        allowed = get_method(self.method).granularities
        if self.clip != numerics.CLIP and self.quantiser.learned:
            raise InputError(
                f"{self.method} learns the range of weights, so clip={self.clip:g} says nothing; leave it out"
            )
        for option in ("weights", "embeddings"):
            granularity = getattr(self, option)
            if granularity is not None and granularity not in allowed:
                raise InputError(
                    f"{option}={granularity!r} is no granularity of {self.method}; use one of {', '.join(allowed)}"
                )

    @property
    def quantiser(self) -> WeightQuantiser:
        """What weights are read through."""
        return get_method(self.method)

    def requires(self, gm: GraphModule) -> None:
        """A graph that is not packed."""
        for node in gm.graph.nodes:
            if node.target is numerics.unpack_ternary:
                raise PreconditionError(
                    f"ternarize can't change a packed weight (%{node.name}); capture the model again"
                )

    def apply(self, gm: GraphModule) -> None:
        """Insert or replace the quantiser of each selected weight, right after the weight's read.

        Raises:
            SelectionError: the last dimension of a selected weight does not suit the method.
        """
        kept = self._kept_readers(gm)
        selected = self.select(gm)
        for weight in selected:
            _require_multiple(gm, weight, self.quantiser)
        _own_learned(gm)
        for weight, granularity in selected.items():
            options = _options(self.quantiser, granularity, self.clip)
            quantiser = quantise(weight, self.quantiser, options, kept.get(weight, []))
            _learn(gm, weight, quantiser, self.quantiser, granularity)
        _own_learned(gm)

    def ensures(self, gm: GraphModule) -> None:
        """Each selected weight has a quantiser with these options."""
        for weight, granularity in self.select(gm).items():
            found = [user for user in weight.users if weight_quantiser_of(user) is not None]
            wanted = (self.quantiser.function, _options(self.quantiser, granularity, self.clip))
            if [(one.target, one.kwargs) for one in found] != [wanted]:
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
    return [
        reader
        for user in own
        for reader in (user.users if weight_quantiser_of(user) is not None else (user,))
    ]


def _require_multiple(gm: GraphModule, weight: Node, method: WeightQuantiser) -> None:
    size = tensor(gm, str(weight.target)).shape[-1]
    if size % method.multiple:
        raise SelectionError(
            f"{method.name} needs a last dimension that is a multiple of {method.multiple}, and {weight.target} has "
            f"{size}; leave it out with Ternarize(skip=({str(weight.target)!r},)) or take another method"
        )


def _options(method: WeightQuantiser, granularity: Granularity, clip: float) -> dict[str, Argument]:
    return {"granularity": granularity} | ({} if method.learned else {"clip": clip})


def quantise(
    weight: Node, method: WeightQuantiser, options: Mapping[str, Argument], kept: Sequence[Node] = ()
) -> Node:
    """Let the readers of a weight read it through a quantiser, which is returned, those in ``kept`` excepted."""
    readers = _readers(weight)
    quantiser = next((user for user in weight.users if weight_quantiser_of(user) is not None), None)
    if quantiser is None:
        quantiser = call(
            weight.next, method.function, (weight,), f"{weight.name}_q", "student", like=readers[0]
        )
    quantiser.target, quantiser.kwargs = method.function, dict(options)
    for reader in readers:
        wanted, other = (weight, quantiser) if reader in kept else (quantiser, weight)
        reader.replace_input_with(other, wanted)
        roles.record(reader, exempt=[weight.target] if reader in kept else None)
    return quantiser


def _learn(
    gm: GraphModule, weight: Node, quantiser: Node, method: WeightQuantiser, granularity: Granularity
) -> None:
    """Let a quantiser read what it learns; a tensor that is there, of the same shape, stays."""
    value = tensor(gm, str(weight.target))
    old = {str(node.target): node for node in quantiser.all_input_nodes[1:]}
    reads = []
    for one in method.learned:
        target = f"{roles.WEIGHT_QUANT}.{weight.target}.{one.name}"
        start = one.start(value, granularity)
        if target not in old or tensor(gm, target).shape != start.shape:
            register(gm, target, nn.Parameter(start, requires_grad=value.requires_grad))
        read = old.pop(target, None)
        if read is None:
            read = get_attr(quantiser, target, f"{weight.name}_learned_{one.name}", "student", like=quantiser)
        reads.append(read)
    quantiser.args = (weight, *reads)
    for node in old.values():
        erase(node)


def _own_learned(gm: GraphModule) -> None:
    """Keep of the learned tensors those that the graph reads, in new containers: the old ones may be those of forks."""
    own = {
        str(node.target): tensor(gm, str(node.target))
        for node in gm.graph.find_nodes(op="get_attr")
        if str(node.target).startswith(f"{roles.WEIGHT_QUANT}.")
    }
    gm._modules.pop(roles.WEIGHT_QUANT, None)
    for target, value in own.items():
        register(gm, target, value)
