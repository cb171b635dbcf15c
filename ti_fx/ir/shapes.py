"""Keep ``node.meta["val"]`` (fake tensors) right after a pass, touching only what changed.

Evaluating a node costs about 3 ms, so a pass pays for the nodes it changed, and equal calls on inputs of equal shape,
dtype, device and stride are evaluated once in a graph's life: a transformer's layers are alike, and a pass after it
evaluates what is as before. Everything runs in the placeholders' own
FakeTensorMode, so symbolic sizes keep their meaning.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.node import Argument, map_aggregate
from torch.utils import _pytree as pytree

from ti_fx.errors import VerificationError, first_line
from ti_fx.ir.edit import tensor

# Of their tensor these read the shape alone, no value.
OF_SHAPES = frozenset(
    f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")
) | frozenset(f"new_{what}" for what in ("zeros", "ones", "full", "empty"))


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """Return the mode of the graph's placeholders.

    Raises:
        ValueError: no placeholder carries a fake tensor; the graph did not come from ``ti_fx.capture``.
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("no placeholder carries meta['val']; capture the model with ti_fx.capture")


def sizes_of(gm: GraphModule) -> ShapeEnv | None:
    """Return what knows the graph's symbolic sizes; None where no placeholder has one."""
    nodes = gm.graph.find_nodes(op="placeholder")
    values = [value for node in nodes if isinstance(value := node.meta.get("val"), FakeTensor)]
    return values[0].fake_mode.shape_env if values else None


def guard_count(gm: GraphModule) -> int:
    """Return how many guards the graph's symbolic sizes have collected.

    Not counted: what torch's own kernels ask about without fixing a size (is a tensor empty, which stride is larger,
    does a view have as many elements). An equality that gives a size is, wherever it comes from.
    """
    environment = fake_mode(gm).shape_env
    return 0 if environment is None else sum(not _is_about_strides(guard) for guard in environment.guards)


def _is_about_strides(guard: Any) -> bool:
    asked = getattr(guard.sloc.framework_loc, "filename", "")
    fixes = guard.expr.is_Equality and any(side.is_Symbol for side in guard.expr.args)
    return not fixes and asked.startswith(torch.__path__[0])


def signature(value: Any) -> Hashable:
    """Return shape, dtype, device and stride of every tensor in ``value``, in a form that can be compared."""
    if isinstance(value, Tensor):
        return _sizes(value.shape), value.dtype, value.device, _sizes(value.stride())
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return type(value).__name__, str(value)
    return str(spec), tuple(signature(leaf) for leaf in leaves)


def _sizes(sizes: Iterable[int | torch.SymInt]) -> tuple[Hashable, ...]:
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _own_symbols(node: Node, value: Any) -> bool:
    """Whether a number or size depends on values: its symbol is the node's own, and another call's is another."""
    given = [source.meta["val"] for source in node.all_input_nodes]
    return bool(_open_symbols(value)) and not _open_symbols(value) <= _open_symbols(given)


def _open_symbols(value: Any) -> set[Any]:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor | torch.SymInt)]
    return set().union(*(free_unbacked_symbols(leaf) for leaf in leaves))


# Of each graph: the mode of its placeholders, and the value of each distinct call that was evaluated in it.
_KNOWN: WeakKeyDictionary[GraphModule, tuple[FakeTensorMode, dict[Hashable, Any]]] = WeakKeyDictionary()


def _known(gm: GraphModule, mode: FakeTensorMode) -> dict[Hashable, Any]:
    of, values = _KNOWN.get(gm, (None, {}))
    if of is not mode:
        values = {}
        _KNOWN[gm] = mode, values
    return values


def forget(gm: GraphModule) -> None:
    """Forget every value that was evaluated in a graph: it may rest on what is assumed of sizes no longer."""
    _KNOWN.pop(gm, None)


class Evaluator:
    """Evaluates nodes of one graph on fake tensors, each distinct call once."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.mode = fake_mode(gm)
        self.known = _known(gm, self.mode)
        self.open: dict[Hashable, Any] | None = None
        self.signatures: dict[Node, tuple[Any, Hashable]] = {}

    def value(self, node: Node) -> Any:
        """Return the node's value from its inputs' ``meta["val"]``."""
        if node.op == "placeholder":
            return node.meta["val"]
        if node.op == "output":
            return self._inputs(node.args[0])
        if "val" in node.meta and _own_symbols(node, node.meta["val"]):
            return node.meta["val"]
        key = self._key(node)
        if key not in self.known:
            value = self._evaluate(node)
            if _own_symbols(node, value):
                return self._alike().setdefault(self._open_key(node), value)
            self.known[key] = value
        return self.known[key]

    def _alike(self) -> dict[Hashable, Any]:
        """Return values with symbols of their own by what decides them: a twin's by the same mask are equal."""
        if self.open is None:
            known = [
                node for node in self.gm.graph.nodes if "val" in node.meta and node.op == "call_function"
            ]
            self.open = {
                self._open_key(node): node.meta["val"]
                for node in known
                if _own_symbols(node, node.meta["val"])
            }
        return self.open

    def _open_key(self, node: Node) -> Hashable:
        """Return the call, and the nodes or symbols whose values decide its size: an index's masks, else its input."""
        deciding = node.all_input_nodes[1:] or node.all_input_nodes
        values = [source.meta["val"] for source in deciding]
        return self._key(node), tuple(
            str(value) if isinstance(value, torch.SymInt) else source
            for source, value in zip(deciding, values, strict=True)
        )

    def signature(self, node: Node) -> Hashable:
        """Return the signature of the node's ``meta["val"]``."""
        value = node.meta["val"]
        known = self.signatures.get(node)
        if known is None or known[0] is not value:
            known = self.signatures[node] = value, signature(value)
        return known[1]

    def _inputs(self, argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, lambda source: source.meta["val"])

    def _key(self, node: Node) -> Hashable:
        """Return what the value depends on: the call, its constants, and its inputs' signatures."""
        if node.op == "get_attr":
            return "get_attr", signature(tensor(self.gm, str(node.target)))
        target: Hashable = node.target
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            stored = tuple(map(signature, (*module.parameters(), *module.buffers())))
            # one that stores nothing is what its options say; any other is itself
            target = (module if stored else type(module), module.extra_repr(), module.training, stored)
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        parts = tuple(
            self.signature(leaf) if isinstance(leaf, Node) else (type(leaf), str(leaf)) for leaf in leaves
        )
        return node.op, target, str(spec), parts

    def _evaluate(self, node: Node) -> Any:
        # the dispatcher that torch.export traces under: some operations take symbolic sizes only in Python
        with enable_python_dispatcher(), self.mode, torch.no_grad():
            if node.op == "get_attr":
                stored = tensor(self.gm, str(node.target))
                return torch.empty_strided(
                    stored.shape, stored.stride(), dtype=stored.dtype, device=stored.device
                )
            args, kwargs = self._inputs((node.args, node.kwargs))
            if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()):
                # a fake tensor remembers the symbol of its number, and equal calls share one fake tensor
                args = pytree.tree_map_only(Tensor, torch.empty_like, args)
            if node.op == "call_module":
                return self.gm.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)


def refresh(gm: GraphModule, changed: Iterable[Node]) -> list[Node]:
    """Recompute ``meta["val"]`` of changed nodes and of their users until shape, dtype, device and stride settle.

    Returns the nodes that were evaluated, in graph order.

    Raises:
        VerificationError: a node does not take its inputs' shapes or dtypes; names the node.
    """
    dirty = set(changed)
    evaluator = Evaluator(gm)
    evaluated: list[Node] = []
    for node in gm.graph.nodes:
        if node not in dirty and "val" in node.meta:
            continue
        before = evaluator.signature(node) if "val" in node.meta else None
        try:
            node.meta["val"] = evaluator.value(node)
        except Exception as error:
            raise VerificationError(
                f"meta present and consistent: %{node.name} can't be computed from its inputs: "
                + first_line(error)
            ) from error
        evaluated.append(node)
        if evaluator.signature(node) != before:
            dirty.update(node.users)
    return evaluated


def evaluate(gm: GraphModule, node: Node) -> Any:
    """Return one node's value from its inputs' ``meta["val"]``."""
    return Evaluator(gm).value(node)


def inconsistencies(gm: GraphModule, nodes: Iterable[Node]) -> list[Node]:
    """Return those of ``nodes`` whose recorded value is not what evaluating them now gives."""
    evaluator = Evaluator(gm)
    return [node for node in nodes if evaluator.signature(node) != signature(evaluator.value(node))]


def move_to_cpu(gm: GraphModule) -> None:
    """Write the CPU where the trace wrote the meta device: in calls, and in what is known of every value.

    The graph's own tensors must be on the CPU already.
    """
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            with mode:
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cpu"
                )
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _on_cpu)
    refresh(gm, gm.graph.nodes)


def _on_cpu(argument: Argument) -> Argument:
    return torch.device("cpu") if argument == torch.device("meta") else argument
