"""What a trace assumed of sizes is said, and refused where it does not hold; the model itself says what is right."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ti_fx
from ti_fx.errors import InputError
from ti_fx.export import Runtime, to_onnx
from ti_fx.ir.assumptions import Assumption
from ti_fx.ir.facts import facts, record_sizes
from ti_fx.passes import Pack, Strip, Ternarize

BATCHES, LENGTHS = (1, 2, 3, 4, 6), (1, 2, 4, 5, 8, 9, 10, 12, 16, 17)


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8)
        self.dense = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def attend(self, x: Tensor) -> Tensor:
        attended = torch.softmax(x @ x.transpose(-1, -2), -1) @ x
        result: Tensor = self.head(self.dense(attended).relu()).mean(1)
        return result


class _Padded(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length % 4:
            ids = functional.pad(ids, (0, 4 - length % 4), value=7)
        return self.attend(self.table(ids))


class _Longer(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if ids.shape[1] > 12:
            x = x * 2
        return self.attend(x)


class _Even(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if ids.shape[1] // 2 * 2 == ids.shape[1]:
            x = x + 1
        return self.attend(x)


class _LargeBatch(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if ids.shape[0] > 3:
            x = x * 2
        return self.attend(x)


class _OneToken(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if ids.shape[1] == 1:
            x = x * 2
        return self.attend(x)


class _Windows(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        windows = self.table(ids).view(rows * (length // 4), 4, 8)
        return self.attend(windows).reshape(rows, length // 4, 3).mean(1)


class _Halved(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)[:, : max(1, ids.shape[1] // 2)]
        return self.attend(x)


class _Rooted(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.attend(self.table(ids)) * int(ids.shape[1] ** 0.5)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (_Padded, "sequence % 4 == 0"),
        (_Longer, "sequence <= 12"),
        (_Even, "sequence % 2 == 0"),
        (_LargeBatch, "batch <= 3"),
        (_OneToken, "sequence != 1"),
        (_Windows, "sequence % 4 == 0"),
        (_Halved, None),
        (_Rooted, None),
    ],
)
def test_a_graph_is_its_model_or_refuses(kind: type[_Base], said: str | None) -> None:
    model = kind().eval()
    gm = ti_fx.capture(model, {"ids": torch.randint(50, (2, 8))}).eval()
    report = ti_fx.capture_report(gm)
    if said is not None:
        assert said in [one.text for one in report.assumptions]
        assert all("test_assumptions.py:" in one.line for one in report.assumptions)
        assert f"{said} is assumed, decided at" in str(report)
    computed = 0
    for rows, length in itertools.product(BATCHES, LENGTHS):
        ids = torch.randint(50, (rows, length))
        try:
            found = gm(ids=ids)
        except InputError:
            continue
        torch.testing.assert_close(found, model(ids))
        computed += 1
    assert computed >= 5


class _Related(_Base):
    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        if other.shape[1] < ids.shape[1]:
            other = functional.pad(other, (0, 1), value=3)
        x, y = self.table(ids), self.table(other)
        result: Tensor = self.head(self.dense(torch.softmax(x @ y.transpose(-1, -2), -1) @ y)).mean(1)
        return result


def test_sizes_of_two_inputs_that_are_compared() -> None:
    model = _Related().eval()
    gm = ti_fx.capture(model, {"ids": torch.randint(50, (2, 8)), "other": torch.randint(50, (2, 6))}).eval()
    ids, shorter, longer = (torch.randint(50, (3, length)) for length in (9, 5, 12))
    torch.testing.assert_close(gm(ids=ids, other=shorter), model(ids, shorter))
    with pytest.raises(InputError, match="other_sequence < sequence"):
        gm(ids=ids, other=longer)


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, 4)
        self.dense = nn.Linear(8, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        if height % 4 or width % 4:
            pixels = functional.pad(pixels, (0, -width % 4, 0, -height % 4), value=1.0)
        result: Tensor = self.dense(self.cut(pixels).flatten(2).transpose(1, 2)).mean(1)
        return result


def test_sizes_of_images() -> None:
    model = _Image().eval()
    gm = ti_fx.capture(model, {"pixels": torch.randn(2, 3, 16, 16)}, dynamic="all").eval()
    fitting = torch.randn(1, 3, 20, 24)
    torch.testing.assert_close(gm(pixels=fitting), model(fitting))
    for height, width in ((17, 16), (16, 18)):
        with pytest.raises(InputError, match=r"pixels_\d % 4 == 0"):
            gm(pixels=torch.randn(1, 3, height, width))


def test_what_is_harmless_is_not_refused() -> None:
    class Asking(_Base):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            if ids.shape[1] != 1:  # the same, by another way
                return self.attend(x)
            return self.attend(x.clone())

    model = Asking().eval()
    gm = ti_fx.capture(model, {"ids": torch.randint(50, (2, 8))}).eval()
    assert ti_fx.capture_report(gm).assumptions == ()
    torch.testing.assert_close(gm(ids=torch.tensor([[3]])), model(torch.tensor([[3]])))


def test_every_copy_and_the_file_refuse_the_same(tmp_path: Path) -> None:
    example = {"ids": torch.randint(50, (2, 8))}
    gm = ti_fx.capture(_Padded().eval(), example)
    ti_fx.Pipeline(Ternarize(), Strip(), Pack())(gm)
    wrong = {"ids": torch.randint(50, (2, 9))}
    for one in (gm, ti_fx.fork(gm), copy.deepcopy(gm)):
        with pytest.raises(InputError, match=r"sequence is 9, and .* where sequence % 4 == 0"):
            one(**wrong)
    report = to_onnx(gm, tmp_path / "student.onnx", example)
    lengths = {
        int(size) for row in report.parity.differences for size in re.findall(r"sequence=(\d+)", row.case)
    }
    assert len(lengths) >= 2
    assert not any(length % 4 for length in lengths)
    runtime = Runtime(tmp_path / "student.onnx")
    runtime({"ids": torch.randint(50, (3, 12))})
    with pytest.raises(
        InputError, match=r"sequence % 4 == 0 \(the model decides by that at .*test_assumptions"
    ):
        runtime(wrong)


def test_a_condition_computes_numbers_and_nothing_else() -> None:
    assert Assumption("max(a, 3) // 2 * 2 == b").holds({"a": 5, "b": 4})
    assert not Assumption("8 // (a // 8) == 8").holds({"a": 4})  # it has no value there
    assert Assumption("a < b").holds({"a": 5})
    for text in (
        "__import__('os')",
        "a.b == 1",
        "[a]",
        "a == 'x'",
        "9 ** a == 1",
        "(lambda: 1)()",
        "a ==",
        "",
    ):
        with pytest.raises(InputError, match="is no condition on sizes"):
            Assumption(text).holds({"a": 1})


def test_conditions_go_by_the_names_that_sizes_get() -> None:
    gm = ti_fx.capture(_Padded().eval(), {"ids": torch.randint(50, (2, 8))})
    record_sizes(gm, names={symbol: f"new_{name}" for symbol, name in facts(gm).sizes.names.items()})
    assert [one.text for one in facts(gm).sizes.assumptions] == ["new_sequence % 4 == 0"]


class _Listed(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        far = torch.tensor([[abs(i - j) for j in range(ids.shape[1])] for i in range(ids.shape[1])])
        x = self.table(ids)
        return self.attend(x * (far.sum() > 0))


def test_a_fixed_size_names_the_line_that_fixes_it() -> None:
    gm = ti_fx.capture(_Listed().eval(), {"ids": torch.randint(50, (2, 8))})
    report = ti_fx.capture_report(gm)
    assert report.dims["ids"] == ("batch", 8)
    line = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "far = torch" in text
    )
    assert f"test_assumptions.py:{line} makes a Python number of it, 8" in report.static["ids.1"]


class _Squeezed(_Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.attend(self.table(ids)).squeeze()


def test_a_size_of_one_that_only_files_get_wrong(tmp_path: Path) -> None:
    model = _Squeezed().eval()
    example = {"ids": torch.randint(50, (2, 8))}
    gm = ti_fx.capture(model, example).eval()
    one = torch.randint(50, (1, 8))
    torch.testing.assert_close(gm(ids=one), model(one))
    ti_fx.Pipeline(Ternarize(), Strip(), Pack())(gm)
    to_onnx(gm, tmp_path / "student.onnx", example)
    with pytest.raises(InputError, match=r"batch is 1, and .* where batch != 1"):
        Runtime(tmp_path / "student.onnx")({"ids": one})


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_refuses_the_same() -> None:
    model = _Padded().eval()
    gm = ti_fx.capture(model, {"ids": torch.randint(50, (2, 8))}).eval()
    assert len(pickle.loads(pickle.dumps(gm._forward_pre_hooks))) == len(gm._forward_pre_hooks)
    for one in (gm, copy.deepcopy(gm)):
        compiled = torch.compile(one, backend="eager", dynamic=True)
        for length in (8, 12):
            ids = torch.randint(50, (3, length))
            torch.testing.assert_close(compiled(ids=ids), model(ids))
        with pytest.raises(Exception, match=r"sequence % 4 == 0"):
            compiled(ids=torch.randint(50, (3, 9)))
