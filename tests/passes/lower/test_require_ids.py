"""An id that PyTorch refuses is refused by the file in any session; one that it takes gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from lowering_models import as_packed
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import InputError
from ti_fx.export import Runtime, to_onnx
from ti_fx.ir.edit import aten_name
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import Pack, QuantizeActivations, Ternarize
from ti_fx.passes.lower import RequireIds

SIZE = 16
# What reads ids: of places 0 to 5 of a table or a sequence, each by another operator or another way from the input.
READS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "as they are": lambda x, table, ids: x + nn.functional.embedding(ids[..., 0], table),
    "a part": lambda x, table, ids: x + nn.functional.embedding(ids.unbind(-1)[1], table),
    "a sum": lambda x, table, ids: x + nn.functional.embedding(ids[..., 0] + 2, table[:8]),
    "a difference": lambda x, table, ids: x + nn.functional.embedding(ids[..., 1] - ids[..., 0], table),
    "gathered": lambda x, table, ids: x.gather(1, ids[..., :1].expand_as(x)),
    "selected": lambda x, table, ids: x + table.index_select(0, ids[0, :, 0]),
    "added up": lambda x, table, ids: x.scatter_add(1, ids[..., :1].expand_as(x), x),
    "one of classes": lambda x, table, ids: x + nn.functional.one_hot(ids[..., 0], SIZE).float(),
    "scattered": lambda x, table, ids: x.scatter(1, ids[..., :1].expand_as(x), 2 * x),
}
COUNTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clamped": lambda x, table, ids: x + nn.functional.embedding(ids[..., 0].clamp(min=0), table),
    "counted": lambda x, table, ids: x + nn.functional.embedding((ids[..., 0] > 0).long().cumsum(1), table),
    "the largest": lambda x, table, ids: x + nn.functional.embedding(x[..., :5].argmax(-1), table),
    "places": lambda x, table, ids: x + nn.functional.embedding(torch.arange(x.shape[1]), table),
    "from the end": lambda x, table, ids: x + table[ids[..., 0]],
}


class Reads(nn.Module):
    """A layer before the head, so that one weight is ternary."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.table = nn.Parameter(torch.randn(9, SIZE))
        self.first, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.first(self.read(x, self.table, ids)).relu())
        return found


def example() -> dict[str, Tensor]:
    ids = torch.stack([torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[3, 2, 4], [4, 3, 2]])], -1)
    return {"x": torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(0)), "ids": ids}


def guards(gm: GraphModule) -> int:
    before = ti_fx.dump(gm)
    Pipeline(RequireIds())(gm)
    after = ti_fx.dump(gm)
    Pipeline(RequireIds())(gm)
    assert ti_fx.dump(gm) == after  # nothing is guarded twice
    return (
        len([node for node in gm.graph.nodes if aten_name(node) == "masked_fill"]) if after != before else 0
    )


@pytest.mark.parametrize("name", READS)
def test_an_id_that_the_input_decides_is_guarded(name: str) -> None:
    assert guards(as_packed(Reads(READS[name]), example())) == 1


@pytest.mark.parametrize("name", COUNTED)
def test_an_id_that_can_not_be_negative_is_left_alone(name: str) -> None:
    assert guards(as_packed(Reads(COUNTED[name]), example())) == 0


class All(nn.Module):
    """Every way to read ids, each from an input of its own, and a word embedding that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1100, SIZE)
        self.reads = nn.ModuleList(Reads(read) for read in READS.values())
        self.first, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1100, bias=False)
        self.head.weight = self.words.weight

    def forward(
        self,
        words: Tensor,
        x: Tensor,
        as_they_are: Tensor,
        a_part: Tensor,
        a_sum: Tensor,
        a_difference: Tensor,
        gathered: Tensor,
        selected: Tensor,
        added_up: Tensor,
        one_of_classes: Tensor,
        scattered: Tensor,
    ) -> Tensor:
        looked_up = (as_they_are, a_part, a_sum, a_difference)
        ids = (*looked_up, gathered, selected, added_up, one_of_classes, scattered)
        total = self.first(self.words(words))
        for read, one in zip(self.reads, ids, strict=True):
            total = total + read.read(x, read.table, one)  # type: ignore[operator]
        found: Tensor = self.head(total)
        return found


NAMES = [name.replace(" ", "_") for name in READS]
# An input, a place in it, and what stands there: beyond a table, or so that the index is negative.
WRONG = [
    *((name, (0, 0, 1 if name == "a_part" else 0), value) for name in NAMES for value in (-30, 100)),
    *(("words", (1, 1), value) for value in (-1, 1100)),
]


@pytest.fixture(scope="module", params=["int8-tensor", *slow("nbits2")])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = All().eval()
    one = example()
    inputs = {"words": torch.randint(0, 1100, (2, 3)), "x": one["x"], **dict.fromkeys(NAMES, one["ids"])}
    gm = ti_fx.capture(model, inputs)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding=request.param), Pack())(gm)
    path = tmp_path_factory.mktemp("ids") / "ids.onnx"
    to_onnx(gm, path, inputs)
    return model, path, inputs


def test_a_plain_session_refuses_what_pytorch_refuses(
    exported: tuple[nn.Module, Path, dict[str, Tensor]],
) -> None:
    model, path, inputs = exported
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for name, place, value in WRONG:
        given = {key: one.clone() for key, one in inputs.items()}
        given[name][place] = value
        with pytest.raises((IndexError, RuntimeError)):
            model(**given)
        with pytest.raises(Exception, match=r"bounds|invalid ind(ex|ice)|Out of range"):
            session.run(None, {key: one.numpy() for key, one in given.items()})
    assert len(session.run(None, {key: one.numpy() for key, one in inputs.items()})) == 1


def test_the_runtime_says_it_in_one_line(exported: tuple[nn.Module, Path, dict[str, Tensor]]) -> None:
    _, path, inputs = exported
    given = {**inputs, "a_difference": inputs["a_difference"].flip(-1)}
    with pytest.raises(
        InputError, match=r"^an input holds an id that is negative or beyond its table \(.*bounds"
    ) as found:
        Runtime(path)(given)
    assert "\n" not in str(found.value)
