"""Models as other libraries leave them: wrapped, in half precision, with NaN, frozen. Right, or one line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model, seeded
from one_layer import OneLayer
from tiny_training import PLAIN, batch, different, history, rows, trainer, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import BertForSequenceClassification

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import CheckpointError, InputError, TiFxError, TrainingError
from ti_fx.export import to_onnx
from ti_fx.passes import Pack
from ti_fx.train import TernaryTrainer, checkpoint


def compiled(model: nn.Module) -> nn.Module:
    made: Any = torch.compile(model)
    assert isinstance(made, nn.Module)
    return made


def compiled_layers(model: Any) -> nn.Module:
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = compiled(layer)
    result: nn.Module = model
    return result


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def autocast(model: nn.Module) -> nn.Module:
    """As accelerate prepares a model for bf16."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16"
    accelerator.native_amp = True
    prepared: nn.Module = accelerator.prepare_model(model)
    return prepared


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled layers": compiled_layers,
    "compiled in place": compiled_in_place,
    "parallel and compiled": lambda model: nn.DataParallel(compiled(compiled_layers(model))),
    "averaged": AveragedModel,
    "autocast": autocast,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TernaryTrainer:
    """One that trained the model without a wrapper."""
    made = trainer(
        tmp_path_factory.mktemp("plain"),
        PLAIN,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 2},
    )
    made.train()
    return made


QUICK = ("compiled layers",)


@pytest.mark.parametrize(
    "wrapper", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WRAPPERS]
)
def test_a_wrapped_models_checkpoint_has_the_sources_names(
    wrapper: str, plain: TernaryTrainer, tmp_path: Path
) -> None:
    """``from_pretrained`` of it loads every weight, and the student is the one of the plain model."""
    made = trainer(
        tmp_path, PLAIN, model=WRAPPERS[wrapper](bert_model(layers=1)), arguments_options={"max_steps": 2}
    )
    made.train()
    made.save_model()
    loaded: Any = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert (loaded[1]["missing_keys"], loaded[1]["unexpected_keys"]) == (set(), set())
    assert different(dict(loaded[0].state_dict()), weights(plain)) == []
    assert different(weights(plain), weights(made)) == []
    student = ti_fx.load(tmp_path, model=WRAPPERS[wrapper](bert_model(layers=1)))
    assert torch.equal(student(**batch()).logits, plain.student()(**batch()).logits)


@pytest.mark.slow
def test_capturing_a_wrapped_model_leaves_it_wrapped() -> None:
    model = WRAPPERS["parallel and compiled"](bert_model(layers=1))
    names = list(model.state_dict())
    gm = ti_fx.capture(model, batch())
    assert set(gm.state_dict()) == set(bert_model(layers=1).state_dict())
    assert list(model.state_dict()) == names


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_becomes_float32_and_is_said(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = bert_model(layers=1)
    model.to(dtype)
    model.config.dtype = dtype
    expected = copy.deepcopy(model).float()
    made = trainer(
        tmp_path, PLAIN, model=model, teacher=copy.deepcopy(model), arguments_options={"max_steps": 1}
    )
    assert different(weights(made), dict(expected.state_dict())) == []
    assert f"was in {str(dtype).removeprefix('torch.')} and is float32 now" in caplog.text
    made.train()
    made.save_model()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert different(dict(loaded.state_dict()), weights(made)) == []
    gm = ti_fx.load(tmp_path)
    ti_fx.Pipeline(Pack())(gm)
    to_onnx(gm, tmp_path / "student.onnx", batch())


def test_a_graph_in_half_precision_is_refused(tmp_path: Path) -> None:
    gm = ti_fx.capture(seeded(OneLayer).bfloat16(), batch())
    with pytest.raises(InputError, match=r"captured from a model in bfloat16, .* capture model\.float\(\)"):
        trainer(tmp_path, PLAIN, model=gm)


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    for which in ("model", "teacher"):
        models = {"model": seeded(OneLayer), "teacher": seeded(OneLayer)}
        with torch.no_grad():
            models[which].key.weight[0, 0] = value
        with pytest.raises(InputError, match=r"key\.weight of OneLayer holds (nan|infinity)"):
            trainer(tmp_path, PLAIN, **models)  # type: ignore[arg-type]


class Overflows(OneLayer):
    """Whose loss is no number from some step on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) * self.scale


def test_training_stops_at_a_loss_that_is_no_number(tmp_path: Path) -> None:
    made = trainer(tmp_path, PLAIN, model=seeded(Overflows), arguments_options={"learning_rate": 1e30})
    message = (
        r"step \d, phase 'quantise': the (loss is nan|gradient of .* holds nan).*; lower the learning rate"
    )
    with pytest.raises(TrainingError, match=message):
        made.train()
    assert 0.0 not in [entry["loss"] for entry in history(made)]


def test_a_checkpoint_with_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, PLAIN, model=seeded(OneLayer), arguments_options={"max_steps": 1})
    made.train()
    with torch.no_grad():
        made.model.get_parameter("query.bias")[0] = float("nan")
    made.save_model(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=r"query\.bias holds nan"):
        checkpoint.load(tmp_path / "saved", model=seeded(OneLayer))


# --- frozen, and forward(*args, **kwargs) ---------------------------------------------------------------------------


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"all 5 ternary weights are frozen, .*requires_grad_\(True\)"):
        trainer(tmp_path, PLAIN, model=seeded(OneLayer).requires_grad_(False))


def test_frozen_weights_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(OneLayer)
    model.words.requires_grad_(False)
    made = trainer(tmp_path, PLAIN, model=model, arguments_options={"max_steps": 2})
    before = weights(made)
    made.train()
    assert "words.weight" not in different(before, weights(made))
    assert "query.weight" in different(before, weights(made))
    assert "words.weight: ternary, and frozen (requires_grad is False)" in caplog.text


class Wrapper(nn.Module):
    """As adapters wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Based(Wrapper):
    """One that has more modules, and says which it wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.others = nn.ModuleList()

    def get_base_model(self) -> nn.Module:
        return self.base_model


class Adapted(Based):
    """One whose adapters can be merged."""

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        Wrapper,
        pytest.param(Based, marks=pytest.mark.slow),
        pytest.param(lambda model: Wrapper(Based(model)), marks=pytest.mark.slow),
    ],
)
def test_a_forward_of_any_arguments_takes_what_the_model_within_takes(
    kind: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    named = [{**row, "text": "not an input"} for row in rows(8)]
    made = trainer(
        tmp_path, PLAIN, model=kind(seeded(OneLayer)), train_dataset=named, arguments_options={"max_steps": 2}
    )
    made.train()
    plain = trainer(
        tmp_path, PLAIN, model=seeded(OneLayer), train_dataset=named, arguments_options={"max_steps": 2}
    )
    plain.train()
    assert [one["loss"] for one in history(made)] == [one["loss"] for one in history(plain)]
    assert torch.equal(made.student()(**batch()), plain.student()(**batch()))


def test_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Adapted trains adapters .* model\.merge_and_unload\(\)"):
        trainer(tmp_path, PLAIN, model=Adapted(seeded(OneLayer)))


# --- what is given in the wrong form --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "recipe.yaml")
    for written in (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml")):
        assert trainer(tmp_path, written, model=seeded(OneLayer)).recipe == PLAIN  # type: ignore[arg-type]
    with pytest.raises(TiFxError, match=r"can't read recipe .*missing.yaml"):
        trainer(tmp_path, str(tmp_path / "missing.yaml"), model=seeded(OneLayer))


def test_a_class_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a model, an nn\.Module, and got OneLayer"):
        trainer(tmp_path, PLAIN, model=OneLayer)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_trained_model_can_be_copied_and_averaged_and_not_pickled(tmp_path: Path) -> None:
    model = bert_model(layers=1)
    made = trainer(tmp_path, PLAIN, model=model, arguments_options={"max_steps": 1})
    with pytest.raises(InputError, match=r"can't be pickled; trainer\.save_model") as raised:
        pickle.dumps(made.model)
    assert "\n" not in str(raised.value)
    averaged = AveragedModel(made.model)
    made.train()
    averaged.update_parameters(made.model)  # position ids are whole numbers, and no parameters
    assert all(value.is_floating_point() for value in made.model.parameters())
    average: Any = averaged.module
    average.eval()
    assert average(**batch()).logits.shape == (4, 3)
    shadow = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    for name, value in made.model.named_parameters():
        shadow[name].mul_(0.9).add_(value.detach(), alpha=0.1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_input_is_refused_in_one_line(layout: torch.layout) -> None:
    texts = [torch.ones(length, dtype=torch.int64) for length in (3, 5)]
    nested = torch.nested.nested_tensor(texts, layout=layout)
    gm = ti_fx.capture(seeded(OneLayer), batch())
    for call in (lambda given: ti_fx.capture(seeded(OneLayer), given), lambda given: gm(**given)):
        with pytest.raises(InputError, match=r"input 'input_ids' is a nested tensor.*to_padded_tensor"):
            call({**batch(2), "input_ids": nested})


def test_a_sparse_input_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"input 'attention_mask' is a torch.sparse_coo tensor.*to_dense"):
        ti_fx.capture(
            seeded(OneLayer), {**batch(2), "attention_mask": batch(2)["attention_mask"].to_sparse()}
        )


def test_sizes_are_left_open_as_asked(tmp_path: Path) -> None:
    made = trainer(tmp_path, Recipe.preset("ternarybert"), model=seeded(OneLayer), dynamic="batch")
    assert ti_fx.capture_report(made.student()).dims["input_ids"] == ("batch", 8)
    with pytest.raises(InputError, match="captured already"):
        trainer(tmp_path, PLAIN, model=ti_fx.capture(seeded(OneLayer), batch()), dynamic="none")
