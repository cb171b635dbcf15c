"""A RunByNeed evaluates single nodes of a graph over several batches, and keeps a value only while it is needed.

Between two requests only what a later node still reads is in memory, of every batch; what is read within a request
(attention maps, for example) is there for one batch at a time. What depends on no input is evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ti_fx.ir.edit import origin, tensor, written_arguments


class RunByNeed:
    """Evaluates nodes of a graph over batches, in the graph's order and mode, without gradients.

    Args:
        gm: the graph. Its tensors may be changed between requests: see :meth:`forget`.
        batches: inputs by name; those that no wanted node needs are not read.
        wanted: the nodes that will be asked for. What is upstream of none of them is never evaluated.
    """

    def __init__(
        self, gm: GraphModule, batches: Sequence[Mapping[str, Tensor]], wanted: Iterable[Node]
    ) -> None:
        self.gm = gm
        self.position = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.after = _writes(gm)
        self.wanted = set(wanted)
        self.needed = self.upstream(self.wanted)
        self.done: set[Node] = set()
        self.batches = batches
        self.values: list[dict[Node, Any]] = [{} for _ in batches]
        self.constants: dict[Node, Any] = {}
        self.is_constant: dict[Node, bool] = {}
        for node in gm.graph.nodes:
            self.is_constant[node] = node.op != "placeholder" and all(
                self.is_constant[source] for source in node.all_input_nodes
            )

    @property
    def writes(self) -> bool:
        """Whether the graph writes into its values, so that none can be evaluated ahead."""
        return bool(self.after)

    @torch.no_grad()
    def visit(
        self, nodes: Sequence[Node], see: Callable[[Mapping[Node, Any]], None], ahead: bool = False
    ) -> None:
        """Evaluate ``nodes`` on every batch, and show their values to ``see``, a batch at a time.

        Args:
            nodes: among those that were wanted.
            see: is given the values by node; it must not keep or edit them.
            ahead: look at them as the graph is now, without going on: they are evaluated again when next asked for.
        """
        order = self._missing(nodes)
        done = self.done | set(order)
        drops = self._drops(order, nodes, done)
        for batch, values in zip(self.batches, self.values, strict=True):
            own = dict(values) if ahead else values
            for node in order:
                own[node] = self._evaluate(node, own, batch)
                for source in drops.get(node, ()):
                    own.pop(source, None)
            see({node: self._value(node, own) for node in nodes})
            if not ahead:
                for node in nodes:
                    if not self._is_needed(node, done):
                        own.pop(node, None)
        if not ahead:
            self.done = done
            for node in [node for node in self.constants if not self._is_needed(node, done)]:
                del self.constants[node]

    def _drops(self, order: Sequence[Node], nodes: Sequence[Node], done: set[Node]) -> dict[Node, list[Node]]:
        """Return after which of the nodes to evaluate which values are needed no more."""
        last = {source: node for node in order for source in node.all_input_nodes}
        found: dict[Node, list[Node]] = {}
        for source, node in last.items():
            if source not in nodes and not self._is_needed(source, done):
                found.setdefault(node, []).append(source)
        return found

    def forget(self, source: Node) -> None:
        """Forget what was computed from a stored tensor alone: its values are others now."""
        stale = {source}
        for node in self.gm.graph.nodes:
            if any(read in stale for read in node.all_input_nodes) and self.is_constant[node]:
                stale.add(node)
                self.constants.pop(node, None)

    def release(self, nodes: Iterable[Node]) -> None:
        """Say that these nodes won't be asked for again."""
        self.wanted.difference_update(nodes)

    def _missing(self, nodes: Sequence[Node]) -> list[Node]:
        """Return what has to be evaluated for ``nodes``, in the graph's order."""
        upstream = self.upstream(nodes, lambda node: node in self.done or self.is_constant[node])
        left = (node for node in upstream if node not in self.done and not self.is_constant[node])
        return sorted(left, key=self.position.__getitem__)

    def upstream(self, seeds: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False) -> set[Node]:
        """Return ``seeds`` and what has to be evaluated before them; a node for which ``stop`` holds is not passed."""
        seen: set[Node] = set()
        queue = list(seeds)
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                queue += [] if stop(node) else [*node.all_input_nodes, *self.after.get(node, ())]
        return seen

    def _is_needed(self, node: Node, done: set[Node]) -> bool:
        """Whether a value is still read once ``done`` are evaluated, by a later node or by a later request."""
        return node in self.wanted or any(user in self.needed and user not in done for user in node.users)

    def _value(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if not self.is_constant[node]:
            return values[node]
        if node not in self.constants:
            self.constants[node] = self._evaluate(node, values, {})
        return self.constants[node]

    def _evaluate(self, node: Node, values: Mapping[Node, Any], batch: Mapping[str, Tensor]) -> Any:
        if node.op == "placeholder":
            return batch[str(node.target)]
        if node.op == "get_attr":
            return tensor(self.gm, str(node.target))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda source: self._value(source, values))
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)


def _writes(gm: GraphModule) -> dict[Node, set[Node]]:
    """Return, of what reads or writes a value that is written into, the nodes that have to come before it."""
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    readers: dict[Node, set[Node]] = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            readers.setdefault(origin(source), set()).add(node)
    found: dict[Node, set[Node]] = {}
    for node in gm.graph.nodes:
        for written in written_arguments(node):
            for reader in readers[origin(written)] - {node}:
                first, second = (node, reader) if position[node] < position[reader] else (reader, node)
                found.setdefault(second, set()).add(first)
    return found
