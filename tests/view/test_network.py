"""The networkx view: places, costs, files, and questions of reachability checked against real gradients."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import networkx
import pytest
import torch
from models import Tiny
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import find_attention
from ti_fx.errors import InputError
from ti_fx.ir import roles
from ti_fx.passes import DecomposeAttention, Distill, DuplicateTeacher, Intervene
from ti_fx.view import QUESTIONS, ask, to_networkx, write_graph


def test_nodes_and_edges_are_those_of_the_graph(tiny: Tiny) -> None:
    graph = to_networkx(tiny.graph)
    assert list(graph) == [node.name for node in tiny.graph.graph.nodes]
    expected = {
        (source.name, node.name) for node in tiny.graph.graph.nodes for source in node.all_input_nodes
    }
    assert set(graph.edges) == expected
    assert [graph.nodes[name]["role"] for name in graph] == [
        roles.role(node) for node in tiny.graph.graph.nodes
    ]


def test_every_attention_block_is_placed(tiny: Tiny) -> None:
    graph = to_networkx(tiny.graph)
    for site in find_attention(tiny.graph):
        for part in ("scores", "map", "context", "output"):
            node = getattr(site, part)
            if node is None:
                continue
            found = graph.nodes[node.name]
            assert (found["stack"], found["layer"], found["kind"]) == (site.stack, site.layer, site.kind), (
                node
            )
            assert part in found["part"].split()
            assert found.get("point") == (None if part == "scores" else part)


def test_a_twin_stands_where_its_student_stands(prepared_bert: GraphModule) -> None:
    graph = to_networkx(prepared_bert)
    teachers = [name for name in graph if graph.nodes[name]["role"] == "teacher"]
    assert teachers
    for name in teachers:
        twin = graph.nodes[name]["twin"]
        for key in ("stack", "layer", "kind", "point"):
            assert graph.nodes[name].get(key) == graph.nodes[twin].get(key), (name, key)


def test_what_several_layers_read_belongs_to_none(t5: Tiny) -> None:
    """T5 computes its position bias once per tower."""
    graph = to_networkx(t5.graph)
    (bias,) = (
        name
        for name, attributes in graph.nodes(data=True)
        if attributes["op"] == "embedding"
        and "relative_attention_bias" in attributes["module"]
        and "encoder" in attributes["module"].split(".")[0]
    )
    assert "layer" not in graph.nodes[bias]


def total_multiply_accumulates(graph: networkx.DiGraph[str]) -> int:
    return sum(graph.nodes[name].get("multiply_accumulates", 0) for name in graph)


def test_costs_follow_the_formula(bert: Tiny) -> None:
    hidden, inner, labels, layers = 16, 32, 3, 2
    batch, sequence = 5, 11
    tokens = batch * sequence
    layer = tokens * (4 * hidden * hidden + 2 * hidden * inner) + 2 * batch * sequence**2 * hidden
    expected = layers * layer + batch * (hidden * hidden + hidden * labels)
    graph = to_networkx(bert.graph, {"batch": batch, "sequence": sequence})
    assert total_multiply_accumulates(graph) == expected
    stored = [name for name in graph if graph.nodes[name]["op"] == "parameter"]
    assert sum(graph.nodes[name]["parameter_elements"] for name in stored) == sum(
        parameter.numel() for parameter in bert.model.parameters()
    )


def test_a_cost_without_sizes_is_text_in_the_names_of_the_dimensions(bert: Tiny) -> None:
    graph = to_networkx(bert.graph)
    map_ = graph.nodes[find_attention(bert.graph)[0].map.name]  # type: ignore[union-attr]
    assert map_["shape"] == ("batch", 2, "sequence", "sequence")
    assert map_["activation_elements"] == "2*batch*sequence**2"
    with pytest.raises(InputError, match="no dimension 'sequense'; did you mean 'sequence'"):
        to_networkx(bert.graph, {"sequense": 3})


def test_fused_attention_costs_what_its_decomposition_costs(plain: Tiny) -> None:
    sizes = {"batch": 3, "sequence": 7}
    decomposed = plain.fork()
    ti_fx.Pipeline(DecomposeAttention())(decomposed)
    assert total_multiply_accumulates(to_networkx(plain.graph, sizes)) == total_multiply_accumulates(
        to_networkx(decomposed, sizes)
    )


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x @ x, x])


def test_an_edge_says_where_its_reader_has_it() -> None:
    graph = to_networkx(ti_fx.capture(Square(), {"x": torch.randn(3, 3)}, dynamic="none"))
    assert {edge: graph.edges[edge]["position"] for edge in graph.edges} == {
        ("x", "matmul"): "0 1",
        ("matmul", "cat"): "0.0",
        ("x", "cat"): "0.1",
        ("cat", "output"): "0",
    }


def test_a_file_of_each_kind_holds_the_graph(prepared_bert: GraphModule, tmp_path: Path) -> None:
    graph = to_networkx(prepared_bert)
    for suffix in (".graphml", ".dot", ".json"):
        write_graph(prepared_bert, tmp_path / f"g{suffix}")
    read = networkx.read_graphml(tmp_path / "g.graphml")
    assert set(read.nodes) == set(graph)
    assert set(read.edges) == set(graph.edges)
    assert read.nodes["input_ids"]["shape"] == "batch, sequence"
    linked = json.loads((tmp_path / "g.json").read_text())
    again = networkx.node_link_graph(linked, edges="edges")
    assert set(again.edges) == set(graph.edges)
    assert again.nodes["input_ids"]["shape"] == ["batch", "sequence"]
    drawn = subprocess.run(["dot", "-Tplain", tmp_path / "g.dot"], capture_output=True, text=True, check=True)
    assert not drawn.stderr
    assert sum(line.startswith("node ") for line in drawn.stdout.splitlines()) == len(graph)


def test_an_unknown_kind_of_file_leaves_the_old_one(bert: Tiny, tmp_path: Path) -> None:
    old = tmp_path / "g.txt"
    old.write_text("old")
    with pytest.raises(InputError, match=r"end the name in \.graphml, \.dot, \.json"):
        write_graph(bert.graph, old)
    assert old.read_text() == "old"


@pytest.mark.parametrize("name", ["bert", *slow("gpt2", "t5", "llama")])
def test_what_is_said_to_be_trained_gets_a_gradient(name: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = tiny.fork()
    ti_fx.Pipeline(DuplicateTeacher(), Distill())(gm)
    for at in (None, "map", "context", "output"):
        ti_fx.Pipeline(Intervene(at=at))(gm)
        gm.zero_grad(set_to_none=True)
        gm(**tiny.example)["loss"].backward()
        groups = ask(gm, "trained").groups
        parameters = {name: value for name, value in gm.named_parameters() if not name.startswith("teacher.")}
        without = {name for name, value in parameters.items() if value.grad is None}
        assert set(groups["trained"]) == parameters.keys() - without, at
        assert set(groups["without a gradient"]) >= without, at
    gm.zero_grad(set_to_none=True)


def test_what_feeds_the_output_but_no_loss(bert: Tiny) -> None:
    gm = bert.fork()
    ti_fx.Pipeline(DuplicateTeacher(), Distill(logits=0.0))(gm)
    found = {
        to_networkx(gm).nodes[name]["target"] for name in ask(gm, "output-without-loss").groups["parameters"]
    }
    expected = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert found == expected


def test_the_teachers_cone_holds_nothing_of_the_student(prepared_bert: GraphModule) -> None:
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene(at="map", layers=(1,)))(gm)
    groups = ask(gm, "teacher-cone").groups
    by_name = {node.name: node for node in gm.graph.nodes}
    assert {roles.role(by_name[name]) for name in groups["teacher"]} == {"teacher"}
    assert {roles.role(by_name[name]) for name in groups["shared nodes that the teacher reads"]} == {"shared"}
    (reader,) = groups["student nodes that read the teacher (interventions)"]
    assert find_attention(gm)[1].map in roles.twins(gm.graph).values()
    assert any(roles.is_teacher(source) for source in by_name[reader].all_input_nodes)


def test_questions_that_can_not_be_answered(bert: Tiny) -> None:
    with pytest.raises(InputError, match="nothing is trained; run duplicate-teacher and distill"):
        ask(bert.graph, "trained")
    with pytest.raises(InputError, match="did you mean 'trained'"):
        ask(bert.graph, "train")
    assert list(QUESTIONS) == ["output-without-loss", "teacher-cone", "trained"]
