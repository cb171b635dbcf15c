"""The picture of a layer: what is drawn, what is marked as changed, and that it is fit for a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import networkx
import pytest
from models import Tiny
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import InputError, MissingExtra
from ti_fx.passes import Intervene, Ternarize
from ti_fx.view import follow, svg, svg_diff, to_networkx
from ti_fx.view.drawing import visible

SVG = "{http://www.w3.org/2000/svg}"


def drawn_nodes(picture: str) -> dict[str, list[str]]:
    """Return the texts of each drawn node by its class."""
    found: dict[str, list[str]] = {}
    for group in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        classes = group.get("class", "")
        if classes.startswith("node") and "plain" not in classes and "note" not in classes:
            found.setdefault(classes, []).append(
                " ".join(text.text or "" for text in group.iter(f"{SVG}text"))
            )
    return found


def test_a_layer_shows_its_computation_and_not_its_bookkeeping(tiny: Tiny) -> None:
    shown = visible(tiny.graph, layer=1, stack=0)
    operations = {attributes["op"].partition(".")[0] for _, attributes in shown.nodes(data=True)}
    assert not operations & {"transpose", "view", "reshape", "parameter", "sym_size"}
    points = {attributes.get("point") for name, attributes in shown.nodes(data=True)}
    assert points >= {"context", "output"}


def test_edges_run_past_what_is_left_out(bert: Tiny) -> None:
    full, shown = to_networkx(bert.graph), visible(bert.graph, layer=0, stack=0)
    inside = [name for name in shown if shown.nodes[name]["kind"] != "entering"]
    assert len(inside) > 10
    for source in inside:
        for reader in inside:
            assert networkx.has_path(shown, source, reader) == networkx.has_path(full, source, reader)


def test_a_pass_is_drawn_before_and_after_with_its_changes_marked(prepared_bert: GraphModule) -> None:
    gm = ti_fx.fork(prepared_bert)
    (step,) = follow(gm, Intervene(at="map"))
    assert step.picture is not None
    nodes = drawn_nodes(step.picture)
    assert any("+ detach" in text for text in nodes["node student added"])
    assert any("map = softmax (tap of map)" in text for text in nodes["node student rewired"])
    assert "node teacher" in nodes
    assert "node loss" in nodes
    assert not any("removed" in classes for classes in nodes)
    edges = re.findall(r'class="edge ([a-z ]+)"', step.picture)
    assert "added intervention" in edges
    assert "removed" in edges


def test_a_removal_is_marked(bert: Tiny) -> None:
    gm = bert.fork()
    ti_fx.Pipeline(Ternarize())(gm)
    nodes = drawn_nodes(svg_diff(gm, bert.graph))
    assert len(nodes["node student removed"]) == 6
    assert all("− ternary" in text for text in nodes["node student removed"])


def test_a_picture_has_a_name_and_follows_the_page_into_the_dark(bert: Tiny) -> None:
    picture = svg(bert.graph, layer=1)
    root = ElementTree.fromstring(picture)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Layer 1 of stack 0 as a graph"
    assert "prefers-color-scheme: dark" in picture


def test_two_pictures_share_no_id(bert: Tiny) -> None:
    first, second = (re.findall(r'\bid="([^"]+)"', svg(bert.graph, layer=layer)) for layer in (0, 1))
    assert len(first) == len(set(first))
    assert not set(first) & set(second)


def test_equal_graphs_have_equal_pictures(bert: Tiny) -> None:
    assert svg(bert.graph) == svg(bert.fork())


def test_a_layer_that_is_not_there(bert: Tiny) -> None:
    with pytest.raises(
        InputError, match="no layer 7 in stack 0; it has layer 0 of stack 0, layer 1 of stack 0"
    ):
        svg(bert.graph, layer=7)


def test_without_graphviz_the_error_says_what_to_install(bert: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match="install the package graphviz"):
        svg(bert.graph)
