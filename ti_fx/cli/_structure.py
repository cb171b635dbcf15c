"""Tells a model's stacks, layers and blocks, as JSON values and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from ti_fx import find_attention, find_feed_forward, fork
from ti_fx.cli import _output as output
from ti_fx.cli._missing import run_after_missing
from ti_fx.find.walk import CAST, SHAPE, projection_weight
from ti_fx.ir.edit import aten_name
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.pipeline import Pipeline

if TYPE_CHECKING:
    from ti_fx.passes import QuantizeActivations, Ternarize

_ATTENTION = ("query", "key", "value", "scores", "map", "context", "output", "residual")
_FEED_FORWARD = ("up", "gate", "down", "hidden", "residual")
_PROJECTIONS = ("query", "key", "value", "output", "up", "gate", "down")


def structure(gm: GraphModule) -> dict[str, Any]:
    """Return ``stacks``, ``attention`` and ``feed_forward``: nodes and, of projections, weights by name."""
    attention = [
        {
            "stack": site.stack,
            "layer": site.layer,
            "kind": site.kind,
            **_nodes(site, _ATTENTION),
            "fused": _fused(site.query, site.key, site.value),
            "fused_kernel": site.map is None,
        }
        for site in find_attention(gm)
    ]
    feed_forward = [
        {
            "stack": site.stack,
            "layer": site.layer,
            **_nodes(site, _FEED_FORWARD),
            "fused": ["up", "gate"] if site.up is site.gate else [],
        }
        for site in find_feed_forward(gm)
    ]
    stacks = [
        {
            "stack": stack,
            "layers": len({site["layer"] for site in attention if site["stack"] == stack}),
            "attention": sum(site["stack"] == stack for site in attention),
            "feed_forward": sum(site["stack"] == stack for site in feed_forward),
        }
        for stack in sorted({site["stack"] for site in [*attention, *feed_forward]})
    ]
    return {"stacks": stacks, "attention": attention, "feed_forward": feed_forward}


def quantised_activations(
    gm: GraphModule, ternarize: Ternarize, activations: QuantizeActivations
) -> dict[str, Any]:
    """Return what the passes would quantise: the encoding, how many values, and the projections that read them."""
    chosen = {"encoding": activations.encoding, "encodings": dict(activations.encodings)}
    if not any(fate.granularity is not None for fate in ternarize.fates(gm).values()):
        return {**chosen, "values": 0, "projections": []}
    copy = fork(gm)
    Pipeline(ternarize)(copy)
    run_after_missing(activations, lambda one: Pipeline(one)(copy))
    found = [node for node in copy.graph.nodes if quantiser_of(node)]
    readers = dict.fromkeys(
        str(weight.target)
        for node in found
        for reader in node.users
        if (weight := projection_weight(reader)) is not None
    )
    return {**chosen, "values": len(found), "projections": list(readers)}


def print_structure(facts: dict[str, Any]) -> None:
    """Print the stacks, and per stack its layers, those that are alike as one."""
    kinds = Counter(site["kind"] for site in facts["attention"])
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    output.say(f"Attention blocks: {len(facts['attention'])}" + (f" ({told})" if told else ""))
    output.say(f"Feed-forward blocks: {len(facts['feed_forward'])}")
    output.say("")
    for entry in facts["stacks"]:
        stack = entry["stack"]
        blocks: dict[int, list[str]] = {}
        for site in facts["attention"] + facts["feed_forward"]:
            if site["stack"] == stack:
                blocks.setdefault(site["layer"], []).extend(_block(site))
        for lines, alike in groupby(sorted(blocks.items()), key=lambda item: item[1]):
            layers = [layer for layer, _ in alike]
            output.say(_title(stack, layers))
            for line in lines:
                output.say(line)
        output.say("")


def print_activations(facts: dict[str, Any]) -> None:
    """Print how many values would be quantised, and in which encodings."""
    encodings = [
        facts["encoding"],
        *(f"{glob}={encoding}" for glob, encoding in facts["encodings"].items()),
    ]
    output.say(
        f"Activations: {facts['values']:,} values would be quantised ({', '.join(encodings)}), those that "
        f"{len(facts['projections']):,} ternary projections read"
    )


def _title(stack: int, layers: Sequence[int]) -> str:
    if stack < 0:
        return "In no stack of attention blocks"
    first, last = layers[0], layers[-1]
    return f"Stack {stack}, " + (f"layer {first}" if first == last else f"layers {first} to {last}")


def _block(site: dict[str, Any]) -> list[str]:
    """Return a block's lines; numbers in a path become stars."""
    name = f"{site['kind']}-attention" if "kind" in site else "feed-forward"
    remarks = [f"one projection makes {_listed(site['fused'])}"] if site["fused"] else []
    if site.get("fused_kernel"):
        remarks.append("a fused kernel hides the map")
    lines = [f"  {name}" + (f" ({'; '.join(remarks)})" if remarks else "")]
    for part, weight in site["weights"].items():
        if part not in site["fused"][1:]:
            lines.append(f"    {part:<7} {starred(weight) if weight else 'computed' if site[part] else '–'}")
    return lines


def starred(name: str) -> str:
    """Return a parameter's name with the numbers in its path as stars."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def _fused(query: Node | None, key: Node | None, value: Node | None) -> list[str]:
    """Return those of the three that one projection makes."""
    if key is None or key is not value:
        return []
    return ["query", "key", "value"] if query is key else ["key", "value"]


def _nodes(site: object, parts: Sequence[str]) -> dict[str, Any]:
    nodes: dict[str, Node | None] = {part: getattr(site, part) for part in parts}
    return {
        **{part: None if node is None else node.name for part, node in nodes.items()},
        "weights": {part: _weight(node) for part, node in nodes.items() if part in _PROJECTIONS},
    }


def _weight(node: Node | None) -> str | None:
    """Return the name of the parameter that a projection reads; None if the weight is computed."""
    if node is None:
        return None
    weight = projection_weight(node)
    starts = [weight] if weight is not None else node.all_input_nodes[::-1]
    for start in starts:
        source = start
        while aten_name(source) in SHAPE | CAST:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            return str(source.target)
    return None
