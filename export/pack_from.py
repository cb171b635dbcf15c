"""``pack_from`` packs a graph without values: it reads weights one by one, and keeps only their codes.

A folder of safetensors, a dict, or a function of the name gives the weights. What is read is made ternary, packed and
dropped, so the float model is never in memory: of 7 billion parameters, 1.75 GB of codes are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ti_fx.errors import InputError, did_you_mean
from ti_fx.ir.edit import fork, is_persistent, parameter_nodes, prune, register, tensor
from ti_fx.ir.inserted import weight_quantiser_of
from ti_fx.ir.pipeline import Pipeline, Report
from ti_fx.ir.roles import LEARNED_PREFIXES
from ti_fx.ir.shapes import move_to_cpu
from ti_fx.ir.stages import PACKED
from ti_fx.numerics.encodings import Kept
from ti_fx.passes.deploy.pack import Pack, pack_weight, require_ternary

WeightSource = str | os.PathLike[str] | Mapping[str, Tensor] | Callable[[str], Tensor]


def pack_from(gm: GraphModule, *weights: WeightSource, kept: Kept | None = None) -> Report:
    """Pack a graph that was captured on the meta device, reading one weight at a time.

    ``gm`` is what ``Pack()`` makes of the model with values, and on the CPU, afterwards; on an error it is as it was.

    >>> with accelerate.init_empty_weights():  # parameters have no values, buffers have  # doctest: +SKIP
    ...     model = LlamaForCausalLM(config)
    >>> buffers = dict(model.named_buffers())  # doctest: +SKIP
    >>> gm = ti_fx.capture(model.to("meta"), example)  # doctest: +SKIP
    >>> Pipeline(Ternarize(), QuantizeActivations(encoding="nbits2"), Strip())(gm)  # doctest: +SKIP
    >>> pack_from(gm, "Llama-2-7b-hf", buffers)  # doctest: +SKIP

    Args:
        gm: a stripped graph with ternary weights.
        weights: where the values are, by the graph's names, asked in this order: a folder with safetensors (in shards
            or in one file) or one such file; a dict; a function that returns the tensor, or raises KeyError.
        kept: as of ``Pack``.

    Raises:
        PreconditionError: the graph is not stripped, or has no ternary weight.
        InputError: a weight is missing, or has another shape or kind than the graph's; a file can't be read.
    """
    require_ternary(gm)
    sources = [_source(one) for one in weights]
    every = [name for name in parameter_nodes(gm.graph) if tensor(gm, name).is_meta]
    needed = [name for name in every if not name.startswith(LEARNED_PREFIXES)]
    for name in needed:
        if not any(source.may_have(name) for source in sources):
            raise _missing(name, sources)
    return Pipeline(_Fill(sources, needed, kept), stage=PACKED)(gm)


class _Fill(PassBase):
    """Give each tensor its values, or the codes of its values."""

    def __init__(self, sources: list[_Source], needed: list[str], kept: Kept | None) -> None:
        self.sources, self.needed, self.kept = sources, needed, kept

    def __str__(self) -> str:
        return f"pack from {', '.join(source.name for source in self.sources) or 'nothing'}"

    def call(self, graph_module: GraphModule) -> PassResult:
        """Return a packed fork."""
        made = fork(graph_module)
        prune(made)  # gives it containers of its own
        for name in self.needed:
            self._fill(made, name)
        move_to_cpu(made)
        Pack(kept=self.kept).apply(made)
        return PassResult(made, True)

    def _fill(self, gm: GraphModule, name: str) -> None:
        expected = tensor(gm, name)
        value = self._read(name, expected)
        readers = [user for node in parameter_nodes(gm.graph)[name] for user in node.users]
        for reader in readers:
            if weight_quantiser_of(reader) is not None:
                pack_weight(gm, reader, value, self._learned(gm, reader, value))
        if not all(weight_quantiser_of(reader) is not None for reader in readers):
            is_parameter = isinstance(expected, nn.Parameter)
            value = value.clone()  # what was read may be the caller's own, or mapped from a file
            stored = nn.Parameter(value, requires_grad=expected.requires_grad) if is_parameter else value
            register(gm, name, stored, persistent=is_persistent(gm, name))

    def _learned(self, gm: GraphModule, quantiser: Node, weight: Tensor) -> list[Tensor]:
        """Return what a quantiser has learned: from the sources, or as the weight starts it where none has it."""
        method = weight_quantiser_of(quantiser)
        assert method is not None
        found = []
        for read, one in zip(quantiser.all_input_nodes[1:], method.learned, strict=True):
            name, expected = str(read.target), tensor(gm, str(read.target))
            if not expected.is_meta:
                found.append(expected)
            elif any(source.may_have(name) for source in self.sources):
                found.append(self._read(name, expected))
            else:
                granularity: Any = quantiser.kwargs["granularity"]
                found.append(one.start(weight, granularity))
        return found

    def _read(self, name: str, expected: Tensor) -> Tensor:
        for source in self.sources:
            value = source.read(name)
            if value is None:
                continue
            if value.shape != expected.shape or value.is_floating_point() != expected.is_floating_point():
                raise InputError(
                    f"{source.name} has {name} as {value.dtype}{list(value.shape)}, and the graph needs "
                    f"{expected.dtype}{list(expected.shape)}; give the weights of the model that was captured"
                )
            return value.detach().to("cpu", expected.dtype).contiguous()
        raise _missing(name, self.sources)


def _missing(name: str, sources: list[_Source]) -> InputError:
    known = {one for source in sources for one in source.names}
    near = did_you_mean(name, known) if get_close_matches(name, known) else ""
    return InputError(
        f"{name} has no values on the meta device, and the weights don't have it{near}; a buffer is computed, not "
        "stored: give dict(model.named_buffers()) of a model made under accelerate.init_empty_weights()"
    )


class _Source:
    """Somewhere to read tensors from, by name."""

    name: str
    names: tuple[str, ...] = ()

    def may_have(self, name: str) -> bool:
        """Whether it is worth asking."""
        return name in self.names

    def read(self, name: str) -> Tensor | None:
        """Return a tensor, None if it is not there."""
        raise NotImplementedError


def _source(given: WeightSource) -> _Source:
    if isinstance(given, Mapping):
        return _Given(given)
    if callable(given):
        return _Made(given)
    if isinstance(given, str | os.PathLike):
        return _Folder(Path(given))
    raise InputError(f"weights is a {type(given).__name__}; give a folder, a dict of tensors or a function")


class _Given(_Source):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.tensors = "the given dict", tensors
        self.names = tuple(name for name, value in tensors.items() if not value.is_meta)

    def read(self, name: str) -> Tensor | None:
        return self.tensors[name] if name in self.names else None


class _Made(_Source):
    def __init__(self, make: Callable[[str], Tensor]) -> None:
        self.name, self.make = getattr(make, "__name__", "the given function"), make

    def may_have(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor | None:
        try:
            return self.make(name)
        except KeyError:
            return None


class _Folder(_Source):
    """Safetensors: a file is opened for each tensor, so that no more than one is in memory."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{path} has no *.safetensors; give a folder that save_pretrained wrote")
        index = path / "model.safetensors.index.json"
        if index.is_file():  # a folder may hold the same weights in other files, too
            files = [path / name for name in _shards(index)]
        self.places: dict[str, Path] = {}
        for file in files:
            with _opened(file) as stored:
                self.places |= dict.fromkeys(stored.keys(), file)
        self.names = tuple(self.places)

    def read(self, name: str) -> Tensor | None:
        if name not in self.places:
            return None
        with _opened(self.places[name]) as stored:
            value: Tensor = stored.get_tensor(name)
        return value


def _shards(index: Path) -> list[str]:
    """Return the files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"can't read {index}: {error}; download it again") from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name:
            raise InputError(f"{index} names {name!r}, which is no file beside it: don't trust it")
    return names


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't read {file}: {error}; download it again") from error
