"""Make the graph that the normalising passes start from: torch.export's own, over the model's tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ti_fx.errors import CaptureError
from ti_fx.ir.edit import is_persistent, register, stored
from ti_fx.ir.facts import record_facts
from ti_fx.ir.stages import EXPORTED


def exported_graph(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    baked: Mapping[str, Tensor],
    written: Collection[str] = (),
) -> GraphModule:
    """Return the graph of a program as torch.export writes it, which ``ti_fx.passes.normalise`` makes plain.

    Args:
        program: what torch.export made of the model.
        model: its Parameters and buffers are the graph's, and its mode is the one that was traced.
        baked: the values of inputs that are constants of the program.
        written: the buffers that the model writes into in evaluation.

    Raises:
        CaptureError: the program has a parameter that the model does not name.
    """
    source = program.module(check_guards=False)
    assert isinstance(source, GraphModule)
    graph = Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    graph.set_codegen(source.graph._codegen)
    gm = GraphModule(source, graph, class_name=type(model).__name__)
    record_facts(
        gm, stage=EXPORTED.name, baked=dict(baked), tied=_tied_names(model), written=frozenset(written)
    )
    _share_tensors(gm, model)
    return gm.train(model.training)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every Parameter and buffer by each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the further names of each tensor that has several, by its first."""
    names: dict[int, list[str]] = {}
    for name, value in _named_tensors(model).items():
        names.setdefault(id(value), []).append(name)
    return {first: tuple(others) for first, *others in names.values() if others}


def _share_tensors(gm: GraphModule, model: nn.Module) -> None:
    """Put the model's own tensors in the place of the program's, each under the name that is read and its first."""
    named = _named_tensors(model)
    first: dict[int, str] = {}
    for name, value in named.items():
        first.setdefault(id(value), name)
    for node in gm.graph.find_nodes(op="get_attr"):
        own = named.get(node.target)
        if own is not None:
            for name in {node.target, first[id(own)]}:
                register(gm, name, own, is_persistent(model, name))
            count = f"{str(node.target).removesuffix('running_mean')}num_batches_tracked"
            if count in named:  # a trace in eval mode does not read it
                register(gm, count, named[count], is_persistent(model, count))
        elif isinstance(stored(gm, node), nn.Parameter):
            raise CaptureError(f"the graph reads a parameter {node.target} that the model does not name")
