"""A file's digests must be those that it was written with; the first node that was changed since is named."""

from __future__ import annotations

import onnx
from torch.fx import GraphModule, Node

from ti_fx.errors import ParityError
from ti_fx.export import inputs as io
from ti_fx.export.file.content import FileContent
from ti_fx.export.file.digests import digests_of, owner, owner_of, recorded
from ti_fx.ir.text import where


def compare_digests(file: FileContent, gm: GraphModule) -> None:
    """Compare what a file holds with its record.

    Raises:
        InputError: the file has no record.
        ParityError: names the first node that was changed, its module and layer, or the part of the file.
    """
    written, found = recorded(file.metadata), digests_of(file)
    for name in written | found:  # in the order of the file
        if written.get(name) == found.get(name):
            continue
        if name.startswith("/"):
            raise ParityError(
                f"the file's {name.removeprefix('/')} are not those that were written; export it again"
            )
        node = _place(name, file.model, gm)
        raise ParityError(
            f"{name if node is None else where(node)} is the first node that differs: its operators and constants in "
            "the file are not those that were written; export it again"
        )


def _place(name: str, model: onnx.ModelProto, gm: GraphModule) -> Node | None:
    """Return the node of that name, or the first that its values lead to."""
    _, outputs = io.flat_outputs(gm)  # they have their own names
    nodes: dict[str, Node] = {node.name: node for node in gm.graph.nodes} | outputs
    if name in nodes:
        return nodes[name]
    reached = {name}
    for node in model.graph.node:
        if reached & {owner_of(value) for value in node.input}:
            reader = owner(node)
            if reader in nodes:
                return nodes[reader]
            reached.add(reader)
    return None
