"""Fake-quantise what enters the quantised projections, as the encoding will compute it in the exported file."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import PostconditionError, PreconditionError, SelectionError
from ti_fx.find.attention import find_attention
from ti_fx.find.walk import MATMUL, projection_weight, reads_ternary
from ti_fx.find.weights import projections, skipped
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, call, prune
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.inserted import is_blend, is_ours, quantised_weights, quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.numerics.encodings import Encoding, get_encoding
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.passes.prepare.first_steps import Rounded, erase_quantiser, first_steps, read_step

Read = tuple[Node, int]  # a node, and which of its arguments is read


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Each ternary projection reads its input through the encoding's fake-quantiser; readers of one input share it.

    before:  %q = linear(%x, %wq_q)              after:  %x_int8 = int8_tensor(%x)
             %k = linear(%x, %wk_q)                      %q = linear(%x_int8, %wq_q)
                                                         %k = linear(%x_int8, %wk_q)

    1. inputs of projections whose weight is ternary
    2. with ``attention``, the operands of both attention products: Q, K, map (after dropout) and V, as published
    3. an existing quantiser is replaced; encoding ``float`` removes it
    4. one that learns its step reads a Parameter of its own, which starts from values on the example of the capture

    Attributes:
        encoding: a name from ``ti_fx.numerics.encodings.ENCODINGS``; recorded in the graph, where
            ``to_onnx`` finds it.
        encodings: other encodings of single weights, by globs over parameter names or module paths; of several that
            match, the last counts. A table that is only looked up takes the storage alone from its encoding.
        attention: whether Q, K, map and V are quantised, in ``encoding``.
        skip: globs over the projections' parameter names or module paths.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    encoding: str = "int8-tensor"
    attention: bool = False
    skip: tuple[str, ...] = ()
    encodings: Mapping[str, str] = field(default_factory=dict, hash=False)

    def requires(self, gm: GraphModule) -> None:
        """Ternary weights; for ``attention``, attention that is not fused; for several encodings, no detach.

        Readers of one detached input share the detach, so with several encodings it would be in the way.
        """
        for name in (self.encoding, *self.encodings.values()):
            get_encoding(name)
        if not quantised_weights(gm):
            raise PreconditionError("quantize-activations needs ternary weights", missing="ternarize")
        several = self.encodings or len(set(facts(gm).encodings.values())) > 1
        if several and any(node.target is numerics.detach for node in gm.graph.nodes):
            raise PreconditionError(
                "quantize-activations can't set several encodings under an intervention; run it before intervene"
            )
        if any(is_blend(node) for node in gm.graph.nodes):
            raise PreconditionError(
                "quantize-activations would quantise each reader's blend by itself; run it before intervene{blend}"
            )
        if self.attention:
            for site in find_attention(gm):
                if site.map is None:
                    raise PreconditionError(
                        f"quantize-activations can't see the map of {site.where} (%{site.context.name})",
                        missing="decompose-attention",
                    )

    def apply(self, gm: GraphModule) -> None:
        """Set the quantiser of every selected read, and record each weight's encoding."""
        wanted = self.select(gm)
        reads = self._reads(gm, wanted)
        # all that go, first: a quantiser that comes may then take the name of one that went
        unlearned = False
        for reader, position, quantiser in reads:
            present = _present(reader, position)
            if present is not None and quantiser_of(present) is not quantiser:
                unlearned |= _remove(reader, position, present)
        if unlearned:
            prune(gm)
        new = [
            (reader, position, quantiser)
            for reader, position, quantiser in reads
            if quantiser is not None and _present(reader, position) is None
        ]
        twins = roles.twins(gm.graph)
        steps = first_steps(
            gm, [(_chain(reader, position)[-1], quantiser) for reader, position, quantiser in new]
        )
        for reader, position, quantiser in new:
            if _present(reader, position) is None:  # readers of one detached input share what is before it
                _insert(gm, twins, reader, position, quantiser, steps)
        recorded = {name: encoding.name for name, encoding in wanted.items()}
        record_facts(gm, encoding=self.encoding, encodings={**facts(gm).encodings, **recorded})

    def ensures(self, gm: GraphModule) -> None:
        """Every selected read goes through its encoding's quantiser, and only through it."""
        for reader, position, quantiser in self._reads(gm, self.select(gm)):
            if quantiser_of(_present(reader, position)) is not quantiser:
                raise PostconditionError(f"quantize-activations did not set the input of %{reader.name}")

    def select(self, gm: GraphModule) -> dict[str, Encoding]:
        """Return the encoding of each ternary weight that is not skipped, by parameter name, in graph order.

        Raises:
            SelectionError: a glob matches nothing.
        """
        names = [str(node.all_input_nodes[0].target) for node in quantised_weights(gm)]
        left = skipped(_projections(gm).values(), self.skip, "ternary projection")
        found = dict.fromkeys((name for name in names if name not in left), get_encoding(self.encoding))
        for glob, encoding in self.encodings.items():
            matching = skipped(names, (glob,), "ternary weight", "encodings")
            found |= {name: get_encoding(encoding) for name in found if name in matching}
        return found

    def _reads(
        self, gm: GraphModule, wanted: Mapping[str, Encoding]
    ) -> list[tuple[Node, int, Quantiser | None]]:
        """Return every selected read and the quantiser that it goes through, None for none."""
        own = get_encoding(self.encoding).quantiser if self.attention else None
        products = [
            (node, 1 if aten_name(node) == "addmm" else 0, wanted[name].quantiser)
            for node, name in _projections(gm).items()
            if name in wanted
        ]
        return products + [(*read, own) for read in _attention_reads(gm, self.attention)]


def _projections(gm: GraphModule) -> dict[Node, str]:
    """Return the projections of ternary weights and the names of their parameters."""
    found: dict[Node, str] = {}
    for node in projections(gm):
        weight = projection_weight(node)
        if weight is not None and reads_ternary(node):
            found[node] = str(weight.target)
    return found


def _attention_reads(gm: GraphModule, wanted: bool) -> list[Read]:
    """Return the reads of Q, K, map and V: before K's transpose, so that a token is a vector along the last axis."""
    reads: list[Read] = []
    for site in find_attention(gm):
        if site.map is None or site.scores is None:
            continue
        product: Node | None = _score_product(site.scores)
        if product is None or aten_name(site.context) not in ("matmul", "bmm"):
            if not wanted:
                continue  # never quantised
            raise SelectionError(
                f"{site.where}: no matmul of Q and K feeds %{site.scores.name}, or none of map and V makes "
                f"%{site.context.name}; set attention=False"
            )
        first = 1 if aten_name(product) == "baddbmm" else 0
        key = product.args[first + 1]
        transposed = isinstance(key, Node) and aten_name(key) == "transpose"
        reads += [
            (product, first),
            (key, 0) if transposed and isinstance(key, Node) else (product, first + 1),
        ]
        reads += [(site.context, 0), (site.context, 1)]
    return reads


def _score_product(scores: Node) -> Node | None:
    """Return the nearest product of two activations upstream of the scores, None if that is an einsum."""
    queue, seen = deque([scores]), {scores}
    while queue:
        node = queue.popleft()
        if aten_name(node) in MATMUL and all(source.op != "get_attr" for source in node.all_input_nodes):
            return node if aten_name(node) != "einsum" else None
        for source in node.all_input_nodes:
            if roles.is_student(source) and source not in seen:
                seen.add(source)
                queue.append(source)
    return None


def _chain(reader: Node, position: int) -> list[Node]:
    """Return the quantisers and detaches between a read and its source, nearest the reader first, then the source."""
    node = reader.args[position]
    assert isinstance(node, Node)
    chain = [node]
    while is_ours(node):
        node = node.all_input_nodes[0]
        chain.append(node)
    return chain


def _present(reader: Node, position: int) -> Node | None:
    """Return the fake-quantiser between a read and its source, None if there is none."""
    return next((node for node in _chain(reader, position) if quantiser_of(node) is not None), None)


def _insert(
    gm: GraphModule,
    twins: dict[Node, Node],
    reader: Node,
    position: int,
    quantiser: Quantiser,
    steps: Mapping[Rounded, Tensor],
) -> None:
    """Let a read go through the source's quantiser of this kind, or through a new one."""
    *between, source = _chain(reader, position)
    node = next(
        (user for user in source.users if quantiser_of(user) is quantiser and roles.is_student(user)), None
    )
    below = between[-1] if between else reader
    if node is None:
        name = f"{twins.get(source, source).name}_{quantiser.suffix}"
        first = steps.get((source, quantiser))
        learned = () if first is None else (read_step(gm, below, name, first),)
        node = call(below, quantiser.function, (source, *learned), name, "student")
    below.replace_input_with(source, node) if between else _replace_argument(reader, position, node)


def _replace_argument(reader: Node, position: int, new: Node) -> None:
    reader.update_arg(position, new)


def _remove(reader: Node, position: int, quantiser: Node) -> bool:
    """Let a read go past a quantiser, which is erased with its last one; return whether a step went with it."""
    chain = _chain(reader, position)
    index = chain.index(quantiser)
    source = chain[index + 1]
    if index:
        chain[index - 1].replace_input_with(quantiser, source)
    else:
        _replace_argument(reader, position, source)
    return not quantiser.users and erase_quantiser(quantiser)
