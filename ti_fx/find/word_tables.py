"""Of the tables that inputs look up, those of words are told from those of positions, coordinates and kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.find.walk import CAST, SHAPE
from ti_fx.ir.edit import aten_name, tensor
from ti_fx.ir.facts import facts

_KINDS = (
    16  # rows up to which a table is taken for one of kinds (token types), beside which ids may well count on
)
_OFFSET = 2  # where the positions of a row begin in some models
_JOINS = frozenset(["add", "add_", "cat"])
_PASSES = SHAPE | CAST | {"mul", "dropout"}


@dataclass(frozen=True)
class LookUp:
    """An input looks up rows of a stored table.

    Attributes:
        node: the embedding.
        table: the get_attr node of its table.
        ids: the input.
        part: which of the numbers in the input's last dimension it takes; None if it takes the input as it is.
    """

    node: Node
    table: Node
    ids: Node
    part: int | None


def other_tables(gm: GraphModule, lookups: list[LookUp], is_tied: Callable[[Node], bool]) -> dict[Node, str]:
    """Return the tables that are not words' although an input looks them up, each with the reason.

    1. coordinates: several numbers of an input's last dimension look up one table (boxes around words)
    2. of tables whose rows are added up or put side by side, words' are those tied to a projection; else those whose
       ids do not count on by ones in the example, as positions do; of these the ones with most rows

    Args:
        gm: a captured graph.
        lookups: of all its tables, small ones, too.
        is_tied: whether a table is a projection's weight, too.
    """
    found: dict[Node, str] = {}
    for one in lookups:
        parts = {(other.ids, other.part) for other in lookups if other.table is one.table}
        if one.part is not None and len(parts) > 1:
            found[one.table] = f"coordinates: several numbers of {one.ids.target} look it up"
    example = facts(gm).example or {}
    for group in _groups([one for one in lookups if one.table not in found]):
        rows = {one.table: int(tensor(gm, str(one.table.target)).shape[0]) for one in group}
        counted = {one.table for one in group if _counts_on(example, str(one.ids.target))}
        tied = {table for table in rows if is_tied(table)}
        words = tied or (set(rows) - counted)
        if not tied and max((rows[table] for table in words), default=0) <= _KINDS:
            words = set(rows)
        most = max(rows[table] for table in words)
        kept = [table for table in rows if table in words and rows[table] == most]
        for table in rows.keys() - set(kept):
            found[table] = (
                f"positions or kinds: its rows are added to those of the word embedding {kept[0].target}"
            )
    return found


def _groups(lookups: list[LookUp]) -> list[list[LookUp]]:
    """Put together the look-ups whose rows are added up or put side by side before any parameter is applied."""
    groups: list[tuple[set[Node], list[LookUp]]] = []
    for one in lookups:
        joins, together = _joins(one.node), [one]
        for other in [group for group in groups if not joins.isdisjoint(group[0])]:
            joins, together = joins | other[0], other[1] + together
            groups.remove(other)
        groups.append((joins, together))
    return [group for _, group in groups]


def _joins(node: Node) -> set[Node]:
    """Return the sums that a value goes into."""
    found: set[Node] = set()
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            is_join = aten_name(user) in _JOINS
            passes = is_join or aten_name(user) in _PASSES or user.op == "call_module"  # a dropout's leaf
            if passes and user not in seen:
                seen.add(user)
                queue.append(user)
                found.update([user] if is_join else [])
    return found


def _counts_on(example: Mapping[str, Tensor], name: str) -> bool:
    """Whether an input's rows count on by ones up to about their length, with padding perhaps: those of positions."""
    ids = example.get(name)
    if ids is None or ids.is_meta or ids.dim() == 0 or ids.shape[-1] < 2:
        return False
    steps = ids.diff(dim=-1)
    counts = bool((steps <= 1).all()) and bool(steps.eq(1).any())
    return counts and int(ids.max()) <= ids.shape[-1] + _OFFSET
