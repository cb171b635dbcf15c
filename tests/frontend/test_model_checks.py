"""What a model refuses by values its graph refuses, in its words, and so does ``Runtime`` where inputs decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow import slow
from torch import Tensor, nn
from transformers import BartConfig, BartForSequenceClassification
from transformers.utils.import_utils import torch_compilable_check

import ti_fx
from ti_fx.errors import InputError
from ti_fx.export import Runtime, to_onnx
from ti_fx.export.file.checks import from_json
from ti_fx.passes import Pack, Strip, Ternarize

END = 2
PLAIN: Any = torch  # its checks have no types


def _ids(*ends: int) -> Tensor:
    """Return rows of ids with this many ends each."""
    rows = torch.randint(4, 60, (len(ends), 8), generator=torch.Generator().manual_seed(0))
    for row, count in enumerate(ends):
        rows[row, 8 - count :] = END
    return rows


class _Checking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(60, 8)
        self.dense = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def check(self, ids: Tensor) -> None:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        self.check(input_ids)
        x = self.table(input_ids)
        result: Tensor = self.head(self.dense(torch.softmax(x @ x.transpose(1, 2), -1) @ x).relu()).mean(1)
        return result


class _Raises(_Checking):
    def check(self, ids: Tensor) -> None:
        if (ids == END).sum() != ids.shape[0]:
            raise ValueError(f"one end a row, not {ids.shape[0]} in all.")


class _Asserts(_Checking):
    def check(self, ids: Tensor) -> None:
        assert ((ids == END).sum(1) == 1).all(), "one end a row"


class _ChecksTensor(_Checking):
    def check(self, ids: Tensor) -> None:
        PLAIN._check_tensor_all((ids == END).sum(1) == 1, lambda: "one end a row")


class _ChecksNumber(_Checking):
    def check(self, ids: Tensor) -> None:
        count = (ids == END).sum(1).amax().item()
        PLAIN._check(count <= 1, lambda: "one end a row")


class _ChecksLikeTransformers(_Checking):
    def check(self, ids: Tensor) -> None:
        torch_compilable_check(((ids == END).sum(1) == 1).all(), "one end a row")


def _packed(model: nn.Module) -> torch.fx.GraphModule:
    gm = ti_fx.capture(model, {"input_ids": _ids(1, 1)}).eval()
    ti_fx.Pipeline(Ternarize(), Strip(), Pack())(gm)
    return gm


@pytest.mark.parametrize(
    "kind", [_Raises, *slow(_Asserts, _ChecksTensor, _ChecksNumber), _ChecksLikeTransformers]
)
def test_graph_and_runtime_refuse_what_the_model_refuses(kind: type[_Checking], tmp_path: Path) -> None:
    model = kind().eval()
    gm = ti_fx.capture(model, {"input_ids": _ids(1, 1)}).eval()
    right, wrong = _ids(1, 1, 1), _ids(2, 1)
    torch.testing.assert_close(gm(input_ids=right), model(right))
    assert any("one end a row" in line for line in ti_fx.capture_report(gm).followed)
    with pytest.raises((ValueError, AssertionError, RuntimeError), match="one end a row"):
        model(wrong)
    with pytest.raises(RuntimeError, match=r"one end a row.* \(test_model_checks.py:\d+\)"):
        gm(input_ids=wrong)
    ti_fx.Pipeline(Ternarize(), Strip(), Pack())(gm)
    to_onnx(gm, tmp_path / "student.onnx", {"input_ids": _ids(1, 1)})
    runtime = Runtime(tmp_path / "student.onnx")
    runtime({"input_ids": right})
    with pytest.raises(InputError, match="one end a row"):
        runtime({"input_ids": wrong})


@pytest.mark.slow
def test_bart_with_rows_of_other_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=60, eos_token_id=END, max_position_embeddings=32, **sizes, **heads)
    model = BartForSequenceClassification(config).train(False)
    gm = _packed(model)
    to_onnx(gm, tmp_path / "student.onnx", {"input_ids": _ids(1, 1)})
    runtime = Runtime(tmp_path / "student.onnx")
    runtime({"input_ids": _ids(1, 1)})
    for ends in ((2, 0), (1, 2), (0, 0)):
        with pytest.raises(ValueError, match="eos"):
            model(_ids(*ends))
        with pytest.raises(RuntimeError, match="eos"):
            gm(input_ids=_ids(*ends))
        with pytest.raises(InputError, match="eos" if ends != (0, 0) else "can't run these inputs"):
            runtime({"input_ids": _ids(*ends)})


def test_a_check_by_what_layers_compute_is_listed(tmp_path: Path) -> None:
    class Late(_Checking):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            PLAIN._check_tensor_all(x.abs() < 100, lambda: "too large")
            attended = torch.softmax(x @ x.transpose(1, 2), -1) @ x
            result: Tensor = self.head(self.dense(attended).relu()).mean(1)
            return result

    gm = _packed(Late().eval())
    to_onnx(gm, tmp_path / "student.onnx", {"input_ids": _ids(1, 1)})
    runtime = Runtime(tmp_path / "student.onnx")
    assert [("too large" in check.message, check.rows) for check in runtime.checks] == [(True, ())]


def test_a_files_checks_only_compute() -> None:
    for name in ("aten.from_file.default", "python.system", "aten.nothing.default", "eval"):
        with pytest.raises(InputError, match="damaged"):
            from_json({"no": f'[["{name}", [], {{}}]]'})
