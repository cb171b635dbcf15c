"""``write_genai_config`` writes the configuration by which onnxruntime-genai loads a decoder with a cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ti_fx.errors import InputError
from ti_fx.export.cached.names import PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE, cached_layers
from ti_fx.export.file.companions import TOKENIZER, companions, require_companion
from ti_fx.export.file.content import open_file
from ti_fx.files import atomic_write

FILE = "genai_config.json"
# What onnxruntime-genai calls any decoder that takes tokens, a mask and positions; 0.18 has no neutral name for it.
_TYPE = "llama"


def write_genai_config(
    path: str | os.PathLike[str],
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
) -> Path:
    """Write ``genai_config.json`` beside a decoder's file, so that ``onnxruntime_genai.Model(folder)`` loads it.

    The tokenizer goes beside it as ``to_onnx(..., tokenizer=...)`` saves it. Tried with onnxruntime-genai 0.18.0, whose
    own ONNX Runtime (1.32) runs the file; greedy tokens were those of the same file in a plain session.

    Args:
        path: a file made from :func:`ti_fx.export.with_cache`.
        config: the model's configuration.
        generation_config: token ids and the search; None takes what the configuration says.

    Returns:
        The file written.

    Raises:
        InputError: the file is missing or damaged, or has no cache; the configuration names no longest text; the
            folder has another file's configuration, or a tokenizer that was not exported with this one.
    """
    path = Path(path)
    inputs = open_file(path).inputs
    layers = cached_layers(inputs)
    if not layers or "input_ids" not in inputs:
        raise InputError(f"{path} is no decoder with a cache; export what ti_fx.export.with_cache returns")
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise InputError(
            f"{type(config).__name__} has no max_position_embeddings, which onnxruntime-genai needs"
        )
    search = generation_config or GenerationConfig.from_model_config(config)
    _, shared_heads, _, size = inputs[PAST_KEY.format(0)]
    tokens = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    eos = search.eos_token_id
    first = eos[0] if isinstance(eos, list) else eos
    model: dict[str, Any] = {
        "type": _TYPE,
        "context_length": context,
        "vocab_size": text.vocab_size,
        "bos_token_id": search.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": first if search.pad_token_id is None else search.pad_token_id,
        "decoder": {
            "session_options": {"provider_options": []},
            "filename": path.name,
            "head_size": size,
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": shared_heads,
            "num_hidden_layers": layers,
            "inputs": {
                **tokens,
                "past_key_names": PAST_KEY.format("%d"),
                "past_value_names": PAST_VALUE.format("%d"),
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": PRESENT_KEY.format("%d"),
                "present_value_names": PRESENT_VALUE.format("%d"),
            },
        },
    }
    options = {
        "max_length": context,
        "do_sample": bool(search.do_sample),
        "num_beams": search.num_beams or 1,
        "temperature": search.temperature,
        "top_k": search.top_k,
        "top_p": search.top_p,
        "past_present_share_buffer": False,  # the file returns a longer cache instead of writing into the old one
    }
    found = {name: value for name, value in model.items() if value is not None}
    content = {
        "model": found,
        "search": {name: value for name, value in options.items() if value is not None},
    }
    target = path.parent / FILE
    _require_own(path, target)
    atomic_write(target, json.dumps(content, indent=2) + "\n")
    return target


def _require_own(path: Path, target: Path) -> None:
    """Refuse a folder that onnxruntime-genai would take another model's tokenizer or configuration from."""
    with companions(path) as folder:
        if (path.parent / TOKENIZER).is_file():
            require_companion(path, folder, TOKENIZER)
    if target.is_file():
        try:
            named = json.loads(target.read_bytes())["model"]["decoder"]["filename"]
        except (ValueError, KeyError, TypeError):
            named = "no file"
        if named != path.name:
            raise InputError(
                f"{target} is of {named}, and would be replaced by that of {path.name}; "
                "export the file into a folder of its own"
            )
