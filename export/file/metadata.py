"""An exported file says in its metadata what it is, so that it is understood without the graph it came from.

=============================== =====================================================================================
ti_fx.encoding                  the encoding of the weights, by name: ``int8-token``
ti_fx.weight_encodings          JSON, where some weights have another: their encodings by their names
ti_fx.requantized_from          the encoding it was trained with, where that is another one
ti_fx.weights_requantized_from  JSON, where some weights were trained with another than that
ti_fx.batch_dependent           JSON list of the weights whose activation has one range for the whole batch, so that a
                                row's result depends on what else is in it; ``attention`` is the products of attention
ti_fx.tensors                   JSON: the names of the packed tensors by layout
ti_fx.kept                      JSON: the floating types of the tensors that are not packed, and how many of each
ti_fx.tensors_sha256            of all tensors of the packed graph
ti_fx.part_of                   of an encoder's or a decoder's file, the same of the student that both are parts of
ti_fx.recipe                    JSON: the recipe that the student was trained by
ti_fx.recipe_sha256             of that text
ti_fx.source                    JSON: the model's class, and its name on the hub where its configuration has one
ti_fx.largest                   JSON: the largest size that the model takes of a dynamic dimension
ti_fx.rows                      JSON: how many rows the table has that an input of ids looks up, by the input's name
ti_fx.companions                JSON: the SHA-256 of each file that was saved beside it, by its name
ti_fx.assumptions               JSON, where there are any: conditions on the sizes of the inputs without which the file
                                is not the model, and the line of the model's code that decides by each
ti_fx.checks                    JSON, where there are any: what the model refuses by values, and what that is computed
                                from (``ti_fx.export.file.checks``)
ti_fx.opset                     the ONNX opset
ti_fx.minimum_onnxruntime       the oldest ONNX Runtime that computes what this one does
ti_fx.versions                  JSON: what wrote it
ti_fx.record                    JSON: a digest of each node's operators and of each other part of the file, by which
                                ``check`` finds what was changed afterwards (``ti_fx.export.file.digests``)
=============================== =====================================================================================

Nothing of the machine is among them: no path, no time, no name of a user.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule

from ti_fx._version import __version__
from ti_fx.errors import InputError
from ti_fx.export import inputs as io
from ti_fx.export.file import content
from ti_fx.export.file.checks import checks_of, to_json
from ti_fx.export.file.minimum_runtime import MINIMUM_RUNTIME, minimum_runtime
from ti_fx.export.student import same_numerics
from ti_fx.find.packed import batch_dependent, encoding_of, packed_weights
from ti_fx.ir.edit import aten_name, tensor
from ti_fx.ir.facts import facts

ASSUMPTIONS = "ti_fx.assumptions"
BATCH_DEPENDENT = "ti_fx.batch_dependent"
CHECKS = "ti_fx.checks"
KEPT = "ti_fx.kept"
LARGEST = "ti_fx.largest"
OPSET = "ti_fx.opset"
PART_OF = "ti_fx.part_of"
RECIPE, RECIPE_HASH = "ti_fx.recipe", "ti_fx.recipe_sha256"
ROWS = "ti_fx.rows"
SOURCE = "ti_fx.source"
TENSORS_HASH = "ti_fx.tensors_sha256"
VERSIONS = "ti_fx.versions"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_RESHAPED = ("view", "reshape", "to", "unsqueeze", "squeeze", "clone", "contiguous")
_WRITERS = ("torch", "transformers", "onnx", "onnxruntime")


def metadata_of(
    gm: GraphModule,
    student: GraphModule,
    model: ir.Model,
    tensors: list[content.PackedTensor],
    config: Any,
) -> dict[str, str]:
    """Return the metadata of a file.

    Args:
        gm: the packed graph as it was trained.
        student: the same with the encoding of the file.
        model: the finished ONNX model.
        tensors: where the packed tensors are in it.
        config: the source model's configuration, or None.
    """
    largest = {name: size for name, (_, size) in io.limits(gm).items() if size is not None}
    found = {
        **content.encoding_entries(encoding_of(student)),
        content.TENSORS_KEY: content.to_json(tensors),
        TENSORS_HASH: tensors_hash(student),
        BATCH_DEPENDENT: json.dumps(batch_dependent(student)),
        KEPT: json.dumps(kept_types(student)),
        SOURCE: json.dumps(source_of(gm, config)),
        LARGEST: json.dumps(largest),
        ROWS: json.dumps(table_rows(student)),
        OPSET: str(model.opset_imports[""]),
        MINIMUM_RUNTIME: minimum_runtime(model),
        VERSIONS: json.dumps({"ti_fx": __version__, **{name: version(name) for name in _WRITERS}}),
    }
    if not same_numerics(student, gm):
        found |= content.requantized_entries(encoding_of(gm))
    if (whole := facts(gm).part_of) is not None:
        found[PART_OF] = whole
    assumed = facts(gm).sizes.assumptions
    if assumed:
        found[ASSUMPTIONS] = json.dumps({one.text: one.line for one in assumed})
    if checks := checks_of(student):
        found[CHECKS] = to_json(checks)
    recipe = facts(gm).recipe
    if recipe is not None:
        found[RECIPE] = recipe if isinstance(recipe, str) else json.dumps(recipe)
        found[RECIPE_HASH] = hashlib.sha256(found[RECIPE].encode()).hexdigest()
    return found


def tensors_hash(gm: GraphModule) -> str:
    """Return the SHA-256 of every tensor that a graph reads: name, dtype, shape and bytes, in the order of names."""
    found = hashlib.sha256()
    for name in sorted({str(node.target) for node in gm.graph.find_nodes(op="get_attr")}):
        value = tensor(gm, name).detach()
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def kept_types(gm: GraphModule) -> dict[str, int]:
    """Return how many tensors of each floating type a packed graph reads beside its codes and their scales."""
    weights = {name for weight in packed_weights(gm) for name in weight.names}
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} - weights
    values = (tensor(gm, name) for name in sorted(names))
    return dict(
        Counter(str(value.dtype).removeprefix("torch.") for value in values if value.is_floating_point())
    )


def table_rows(gm: GraphModule) -> dict[str, int]:
    """Return how many rows the smallest table has that an input looks up as it is, by the input's name."""
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        if aten_name(node) != "embedding":
            continue
        table, ids = node.args[0], node.args[1]
        while aten_name(ids) in _RESHAPED:
            ids = ids.args[0]
        if ids.op == "placeholder":
            rows = int(table.meta["val"].shape[0])
            found[str(ids.target)] = min(rows, found.get(str(ids.target), rows))
    return found


def source_of(gm: GraphModule, config: Any) -> dict[str, str]:
    """Return the source model's class, and its name on the hub if its configuration has one."""
    found = {"class": type(gm).__name__}
    name = str(getattr(config, "_name_or_path", None) or "")
    if _is_on_the_hub(name):
        found["name"] = name
    return found


def _is_on_the_hub(name: str) -> bool:
    """Whether this is the name of a repository and not of a folder on this machine."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def value_of(metadata: Mapping[str, str], key: str, default: Any) -> Any:
    """Return a JSON value of the metadata, the default where the file has none.

    Raises:
        InputError: the text is not JSON, its kind is not the default's, or a list or dict in it holds another. A
            default of None takes any JSON.
    """
    if key not in metadata:
        return default
    damaged = InputError(f"the file's metadata {key} is damaged; export it again")
    try:
        value = json.loads(metadata[key])
    except ValueError:
        raise damaged from None
    if default is None:
        return value
    if not isinstance(value, type(default)):
        raise damaged
    parts = value.values() if isinstance(value, dict) else value
    if any(isinstance(part, dict | list) for part in parts):
        raise damaged
    return value
