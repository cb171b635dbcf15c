"""A head's loss on outputs and labels is the loss that its own forward returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import all_heads, head, without_caches
from models import VOCABULARY, t5_model
from tiny_training import history, trainer
from torch import Tensor

from ti_fx import Recipe
from ti_fx.errors import InputError
from ti_fx.passes import Distill
from ti_fx.train.rows import DECODER_INPUTS, with_decoder_inputs
from ti_fx.train.task_loss import own_loss

QUICK = [
    ("NEXT_SENTENCE_PREDICTION", "bert", "BertForNextSentencePrediction"),
    ("CAUSAL_LM", "llama", "LlamaForCausalLM"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "t5", "T5ForConditionalGeneration"),
]
SLOW = [one for one in all_heads() if one not in QUICK]
Tensors = dict[str, Tensor]


def check(task: str, model_type: str, name: str, **fields: Any) -> None:
    """Compare at the size of the example and, where the rows are apart, at another."""
    model, inputs, labels = head(task, model_type, name, **fields)
    if task in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
        inputs.pop(DECODER_INPUTS)
    given = with_decoder_inputs(model, inputs, labels)
    caches = without_caches(model)
    with torch.no_grad():
        expected = model(**inputs, **labels, **caches).loss
        loss = own_loss(model, cut(given), cut(labels))
        found = loss(model(**given, **caches), labels, given)
    assert torch.allclose(found, expected, rtol=1e-5, equal_nan=True), (float(found), float(expected))


def cut(tensors: Tensors) -> Tensors:
    """The first two rows, where every tensor has as many."""
    return {key: value[:2] for key, value in tensors.items()}


@pytest.mark.parametrize(("task", "model_type", "name"), QUICK)
def test_the_loss_is_the_forwards(task: str, model_type: str, name: str) -> None:
    check(task, model_type, name)


@pytest.mark.slow
def test_an_encoder_decoder_is_evaluated_on_the_inputs_that_it_makes_of_labels(tmp_path: Path) -> None:
    model: Any = t5_model(decoder_start_token_id=0)
    generator = torch.Generator().manual_seed(4)
    data: Any = [
        {"input_ids": ids, "attention_mask": [1] * 6, "labels": [*ids[:4], -100 if row else 5]}
        for row, ids in enumerate(torch.randint(2, VOCABULARY, (4, 6), generator=generator).tolist())
    ]
    made = trainer(
        tmp_path,
        Recipe("t5", distill=Distill(task=1.0)),
        model=model,
        arguments_options={"max_steps": 1},
        train_dataset=data,
        eval_dataset=data,
    )
    given, labels = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels"))
    shifted: Any = model._shift_right(labels)
    with torch.no_grad():
        logits = made.student()(
            input_ids=given, attention_mask=torch.ones_like(given), decoder_input_ids=shifted
        ).logits
    expected = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100))
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    made.train()
    assert history(made)[0]["loss_task"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type", "name"), SLOW)
def test_the_loss_of_every_head_is_the_forwards(task: str, model_type: str, name: str) -> None:
    try:
        head(task, model_type, name)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    try:
        check(task, model_type, name)
    except InputError as error:
        pytest.skip(f"refused: {error}")
