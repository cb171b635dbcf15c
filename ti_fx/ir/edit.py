"""These functions edit a graph where torch.fx leaves that to its users: they insert, name, sort, fork and prune."""

from __future__ import annotations

import copy
import heapq
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ti_fx.errors import VerificationError
from ti_fx.ir import roles


def erase(node: Node) -> None:
    """Erase a node without users and free its name, so that undoing and redoing a pass gives the same names."""
    names = node.graph._graph_namespace
    node.graph.erase_node(node)
    names._used_names.discard(node.name)


def erase_dead(nodes: Iterable[Node]) -> None:
    """Erase those of ``nodes`` (in graph order) that nobody reads and that write into nothing, last first."""
    for node in reversed(list(nodes)):
        if not node.users and not node.is_impure():
            erase(node)


def erase_dead_writes(graph: Graph) -> None:
    """Erase what leads to no output, writes into tensors included that only such nodes read.

    (``eliminate_dead_code`` keeps every write, and with it all that it reads.)
    """
    groups: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        groups.setdefault(origin(node), []).append(node)
    writes = [node for node in graph.nodes if written_arguments(node)]
    live: set[Node] = set()
    wanted = [
        node
        for node in graph.nodes
        if node.op in ("placeholder", "output") or (node.is_impure() and node not in writes)
    ]
    while wanted:
        while wanted:
            node = wanted.pop()
            if node not in live:
                live.add(node)
                wanted.extend(node.all_input_nodes)
        wanted = [
            node
            for node in writes
            if node not in live
            and any(one in live for written in written_arguments(node) for one in groups[origin(written)])
        ]
    for node in reversed(list(graph.nodes)):
        if node not in live:
            erase(node)


def origin(node: Node) -> Node:
    """Return the node that made the tensor which this one is, is a view of, or is one of."""
    while gives_its_input(node):
        node = node.all_input_nodes[0]
    return node


def gives_its_input(node: Node) -> bool:
    """Whether a node's value is, by its operator's schema, its input or a view of it."""
    returns: Any = getattr(getattr(node.target, "_schema", None), "returns", ())
    aliases = bool(returns) and returns[0].alias_info is not None
    return bool(node.all_input_nodes) and (aliases or node.target is operator.getitem)


def insert(
    before: Node,
    op: str,
    target: Callable[..., Any] | str,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    name: str | None = None,
    role: roles.Role | None = None,
    like: Node | None = None,
) -> Node:
    """Insert a node before another one: the one way by which a node comes into a graph.

    Args:
        before: the node that follows.
        op: as torch.fx calls it (``call_function``).
        target: what is called or read.
        args: of the call.
        kwargs: of the call.
        name: of the node; None: what torch.fx makes of the target.
        role: of the node; None: that of ``before``, which may have none.
        like: the node that lends its place in the module tree; None: ``before``.
    """
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.create_node(op, target, args, kwargs or {}, name=name)
    place(node, like or before)
    own = role or roles.role(before)
    if own is not None:
        roles.set_role(node, own)
    return node


def call(
    before: Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    name: str | None = None,
    role: roles.Role | None = None,
    kwargs: dict[str, Any] | None = None,
    like: Node | None = None,
) -> Node:
    """Insert ``function(*args, **kwargs)`` before a node; see :func:`insert`."""
    return insert(before, "call_function", function, args, kwargs, name=name, role=role, like=like)


def call_module(
    before: Node,
    target: str,
    args: tuple[Any, ...],
    name: str | None = None,
    role: roles.Role | None = None,
    like: Node | None = None,
) -> Node:
    """Insert a call of the graph's module ``target``, which must exist, before a node; see :func:`insert`."""
    return insert(before, "call_module", target, args, name=name, role=role, like=like)


def get_attr(
    before: Node,
    target: str,
    name: str | None = None,
    role: roles.Role | None = None,
    like: Node | None = None,
) -> Node:
    """Insert a read of the parameter or buffer ``target``, which must exist, before a node; see :func:`insert`."""
    return insert(before, "get_attr", target, name=name, role=role, like=like)


def insert_copy(before: Node, node: Node, read: Callable[[Node], Any], name: str | None = None) -> Node:
    """Insert a copy of a node, of this graph or another, before a node.

    Args:
        before: the node that follows.
        node: what is copied, metadata included.
        read: what the copy reads in the place of each node that ``node`` reads.
        name: of the copy; None: what torch.fx makes of the node's own.
    """
    with before.graph.inserting_before(before):
        copied = before.graph.node_copy(node, read)
    if name is not None:
        before.graph._graph_namespace._used_names.discard(copied.name)
        copied._rename(name)
    return copied


def rename(node: Node, name: str) -> None:
    """Call a node by a name, with a number behind it where another node has that; one that is called so is left."""
    if not re.fullmatch(rf"{re.escape(name)}(_\d+)?", node.name):
        node._rename(name)


def place(node: Node, like: Node) -> None:
    """Copy where in the module tree and in the user's source a node comes from."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def replace_input(user: Node, old: Node, new: Node) -> None:
    """Make one user read ``new`` where it read ``old``."""
    user.replace_input_with(old, new)


def supersede(old: Node, new: Node) -> None:
    """Let ``new`` have the readers, the name and the shape of ``old``, which is erased."""
    name = old.name
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    erase(old)
    new.graph._graph_namespace._used_names.discard(new.name)
    new._rename(name)


def tensor(gm: GraphModule, target: str) -> Tensor:
    """Return the parameter or buffer at a dotted path."""
    owner, _, name = target.rpartition(".")
    value = getattr(gm.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{target} is not a tensor")
    return value


def stored(gm: GraphModule, node: Node) -> Tensor | None:
    """Return the parameter or buffer that a node reads; None of any other node, or where there is no such tensor."""
    if node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def register(root: nn.Module, target: str, value: Tensor | nn.Module, persistent: bool = True) -> None:
    """Put a Parameter, buffer or module at a dotted path, making plain modules on the way.

    Modules on the path may be shared with forks, so each is replaced by one that shares its tensors and has its own
    list of children.
    """
    *path, name = target.split(".")
    module = root
    for part in path:
        known = module._modules.get(part)
        own = nn.Module() if known is None else copy.copy(known)
        own._modules = dict(own._modules)
        module._modules[part] = own
        module = own
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, nn.Module):
        module.add_module(name, value)
    else:
        module.register_buffer(name, value, persistent=persistent)


def is_persistent(root: nn.Module, target: str) -> bool:
    """Whether a buffer is part of ``state_dict()`` (always true of a Parameter)."""
    owner, _, name = target.rpartition(".")
    return name not in root.get_submodule(owner)._non_persistent_buffers_set


def prune(gm: GraphModule) -> None:
    """Keep only the tensors and modules that the graph reads, in new containers around the same objects.

    The containers of ``gm`` may be shared with its forks, so they are replaced and never edited.
    """
    root = nn.Module()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            register(root, node.target, tensor(gm, node.target), is_persistent(gm, node.target))
        elif node.op == "call_module":
            register(root, node.target, gm.get_submodule(node.target))
    root.train(gm.training)
    gm._modules, gm._parameters, gm._buffers = root._modules, root._parameters, root._buffers
    gm._non_persistent_buffers_set = root._non_persistent_buffers_set


def copy_graph(original: Graph) -> Graph:
    """Return a copy of a graph, in any order of its nodes: new ones of the same names, with the same metadata."""
    graph = Graph()
    copies = {
        node: graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        for node in original.nodes
    }
    for node, copied in copies.items():
        copied.args, copied.kwargs = map_arg(
            (node.args, node.kwargs), lambda source: copies.get(source, source)
        )
        copied.meta = dict(node.meta)
    graph._codegen = original._codegen
    return graph


def fork(gm: GraphModule) -> GraphModule:
    """Return a new graph over the same Parameter, buffer and submodule objects.

    Edits of one graph don't show in the other; ``.to()``, ``train()`` on a shared submodule, and training do.
    """
    twin = GraphModule(nn.Module(), Graph(), class_name=type(gm).__name__)
    twin._parameters, twin._buffers = gm._parameters, gm._buffers
    twin._non_persistent_buffers_set = gm._non_persistent_buffers_set
    twin._modules = dict(gm._modules)
    twin.meta = dict(gm.meta)
    twin._forward_pre_hooks = gm._forward_pre_hooks.copy()
    twin._forward_pre_hooks_with_kwargs = gm._forward_pre_hooks_with_kwargs.copy()
    twin._deepcopy_hooks = list(gm._deepcopy_hooks)
    twin.training = gm.training
    twin.graph = copy_graph(gm.graph)
    return twin


def replace_by_leaf(gm: GraphModule, node: Node, leaf: nn.Module, args: tuple[Any, ...]) -> None:
    """Let a module of the graph's own compute what a node did, in the graph's mode."""
    target = f"leaves.{node.name}"
    leaf.train(gm.training)
    register(gm, target, leaf)
    supersede(node, call_module(node, target, args))


def sort(graph: Graph) -> None:
    """Put nodes in topological order, keeping the written order wherever it is legal.

    Raises:
        VerificationError: the graph has a cycle.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    if all(position[source] < position[node] for node in graph.nodes for source in node.all_input_nodes):
        return
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    nodes = list(graph.nodes)
    ready = [position[node] for node in nodes if not waiting[node]]
    heapq.heapify(ready)
    done = 0
    root = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        root.prepend(node)
        done += 1
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, position[user])
    if done != len(nodes):
        stuck = ", ".join(f"%{node.name}" for node in nodes if waiting[node])
        raise VerificationError(f"topological order: a cycle goes through some of {stuck[:200]}")


def ancestors(seeds: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """Return everything upstream of ``seeds``, seeds included; a node for which ``stop`` holds is not passed."""
    seen: set[Node] = set()
    queue = list(seeds)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            queue.extend(node.all_input_nodes)
    return seen


def parameter_nodes(graph: Graph) -> dict[str, list[Node]]:
    """Return the get_attr nodes by their target."""
    reads: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(node.target, []).append(node)
    return reads


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put every submodule in train or eval mode, and each back as it was."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, value in before.items():
            part.training = value


def aten_name(node: Node) -> str:
    """Return ``"linear"`` for a call of aten.linear.default, ``""`` for anything that is not an ATen call."""
    target = node.target
    if (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
    ):
        return target._schema.name.removeprefix("aten::")
    return ""


def written_arguments(node: Node) -> list[Node]:
    """Return the nodes that an in-place operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [
        value
        for argument, value in zip(schema.arguments, node.args, strict=False)
        if isinstance(value, Node) and argument.alias_info is not None and argument.alias_info.is_write
    ]


def constant_size(size: int | torch.SymInt) -> int | None:
    """Return the size if it is a number, None if it is a symbol."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return size


def input_names(gm: GraphModule) -> tuple[str, ...]:
    """Return the keywords that the graph takes, in order."""
    return tuple(str(node.target) for node in gm.graph.find_nodes(op="placeholder"))
