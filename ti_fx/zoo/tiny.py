"""A configuration of any ``transformers`` model type becomes a tiny one, from what its fields mean.

The rules know the field's words (``hidden_size``, ``num_key_value_heads``), no architecture. Every width becomes the
same number, so widths that must agree still do. What no rule can know stands in ``ti_fx/zoo/exceptions.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ti_fx.example_inputs.request import FIRST_SPECIAL, IMAGE
from ti_fx.zoo.settings import FIELDS

VOCABULARY = 128
WIDTH = 64
INNER = 96  # of a feed-forward block: differs from WIDTH, so that the two are never mistaken for each other
HEADS = 4
HEAD = WIDTH // HEADS
LAYERS = 2
POSITIONS = 64
STAGED_IMAGE = 64  # halved by every stage, so it must begin larger
PATCH = 8
NARROW = 16  # the first stage's width where widths grow from stage to stage

# Decided in Python at every step, so that no captured graph can hold it: off.
_RANDOM = re.compile(
    r"layer_?drop|mask_time_prob|mask_feature_prob|mask_prob|mask_ratio"
    r"|stochastic|jitter_noise|quantizer_dropout|layerdrop"
)
_OFF = {
    "apply_spec_augment": False,
    "use_cache": False,
    "use_mems_eval": False,
    "use_mems_train": False,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
    "pos_embed_rescale": None,
}
_TOKEN = re.compile(r"(^|_)(tok|token)_?(id|ids|index|indices)$|_token$|_idx$")
_LAYER_COUNT = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|depth)$")
_LAYER_INDICES = re.compile(r"(_indexes|_indices|_index|layer_ids?|_layers|_attention_blocks|_layer)$")
# Some classes leave these open, and their own model then can't be built.
_NEEDED = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": WIDTH // 2,
    "prediction_length": 8,
}

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _wide(limit: int) -> Rule:
    """Return a rule that leaves small numbers, which count things, as they are."""
    return lambda value: limit if value >= 32 else value


def _window(value: int) -> int:
    """A window of 64 and more is measured in pixels where patches are: two patches along each side of a merged one."""
    return min(value, 4) if value < 64 else 4 * PATCH


# The first pattern found anywhere in the field's name decides. All apply to whole numbers.
_RULES: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"vocab_size|vocabulary_size|_vocab$", _wide(VOCABULARY)),
        (r"experts_per_tok|top_?k_experts|experts_top_?k|moe_top_?k|moe_k$|selected_experts", _at_most(2)),
        (r"shared_experts?$", _at_most(1)),
        (r"experts?$|num_local_experts|experts", _at_most(4)),
        (
            r"^(n_groups?|num_groups?|mamba_n_groups|topk_group|num_expert_group|topk_groups?|n_expert_groups?)$",
            _at_most(1),
        ),
        (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", _at_most(HEAD // 2)),
        (
            r"head_dim|^d_kv$|dim_head|^d_head$|head_size|dim_per_head|kv_channels",
            _at_most(HEAD),
        ),
        (r"kv_head|key_value_head|_kv_heads|num_query_groups|multi_query_group", _at_most(2)),
        (r"linear_num_key_heads", _at_most(2)),
        (r"heads$|^n_head$|_head$|heads_per_stage|num_attention_heads", _at_most(HEADS)),
        (r"lora_rank|lora_dim|low_rank|_rank$", _at_most(HEAD)),
        (r"num_kv_shared_layers|num_nextn|num_mtp", _at_most(0)),
        (r"first_k_dense_replace", _at_most(1)),
        (r"(layers?|^depth|_depth|num_blocks|n_layer|encoder_blocks|num_layers_.*)$", _at_most(LAYERS)),
        (r"moe_intermediate|expert_intermediate|expert_dim|expert_ffn|expert_hidden", _wide(WIDTH // 2)),
        (
            r"intermediate|ffn|mlp_dim|feed_?forward|^d_ff$|d_inner|n_inner|inner_dim|ff_dim|mlp_hidden",
            _wide(INNER),
        ),
        (r"num_pos_feats", _wide(WIDTH // 2)),
        (r"num_codebooks|n_codebooks", _at_most(4)),
        (r"num_embeddings|codebook", _wide(WIDTH)),
        (r"mel_bins|num_mel|feature_size|n_mels", _at_most(32)),
        (
            r"position|max_.*length|context_length|max_len|max_seq|block_size|sequence_length",
            _at_most(POSITIONS),
        ),
        (r"sliding_window|attention_window|local_attention|window", _window),
        (r"chunk_size", _at_most(16)),
        (r"num_queries|num_query_tokens|num_latents|n_queries|query_length|num_denoising", _at_most(8)),
        (r"num_frames|num_image_tokens", _at_most(4)),
        (
            r"sampling_rate|sample_rate|_rate$|_id$|ignore|theta|temperature|base$|buckets|distance|stride|factor",
            int,
        ),
        (r"num_filters", _at_most(8)),
        (r"d_latents", _wide(WIDTH)),
        (r"upsample_groups", _wide(WIDTH)),
        (r"kernel|hop_length|n_fft|frame|period|floor|interval|multiplier", int),
        (r"hidden|dim|size|channel|width|units|filters|d_model|n_embd|embd|feats|features", _wide(WIDTH)),
    )
)


class _Tiny:
    """One configuration and those inside it, made smaller together: token ids must still agree between them."""

    def __init__(self) -> None:
        self.ids: dict[int | str, int] = {}

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        by_hand = FIELDS.get(config.model_type) or FIELDS.get(type(config).__name__, {})
        if config.model_type == "timm_backbone":
            return _backbone(config)
        chosen, layers = _layers(config)
        staged = _is_staged(config)
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            name, value = field.name, vars(config).get(field.name)
            if name in by_hand or not field.init:
                continue
            if value is None:
                if name in _NEEDED:
                    changed[name] = _NEEDED[name]
                elif re.search(r"^(image|audio|video)_token_(id|index)$", name):
                    changed[name] = self.special(name)
                continue
            if name.startswith("_out_"):
                continue
            if name in chosen:
                changed[name] = chosen[name]
            elif isinstance(value, PreTrainedConfig):
                changed[name] = self.config(value)
            elif _LAYER_COUNT.search(name) and isinstance(value, int) and layers:
                changed[name] = layers
            elif field.default is None and isinstance(value, int | float):
                continue  # worked out by the class from other fields, as it will be again
            else:
                smaller = self.value(name, value, layers or LAYERS, staged)
                given = field.default is not None and value != field.default
                if given or smaller != value:
                    changed[name] = smaller
        if vars(config).get("num_key_value_heads") == vars(config).get("num_attention_heads"):
            changed.pop("num_key_value_heads", None)
            if "num_attention_heads" in changed and "num_key_value_heads" in vars(config):
                changed["num_key_value_heads"] = changed["num_attention_heads"]
        if getattr(config, "_out_features", None) is not None:
            changed["out_indices"] = _backbone_indices(config, layers)
        return type(config)(**{**changed, **by_hand})

    def value(self, name: str, value: Any, layers: int, staged: bool) -> Any:
        """Return what the field becomes; the same object where no rule speaks of it."""
        if name in _OFF:
            return _OFF[name]
        if _RANDOM.search(name) and isinstance(value, list | tuple):
            return type(value)(0.0 for _ in value)
        if _RANDOM.search(name) and isinstance(value, float | int):
            return type(value)(0)
        if isinstance(value, bool | str | float):
            return value
        if isinstance(value, Mapping):
            return _rope(value) if "rope" in name else dict(value)
        if _TOKEN.search(name):
            return self.token(value)
        if isinstance(value, list | tuple):
            return type(value)(self.numbers(name, value, layers, staged))
        if isinstance(value, int):
            return self.number(name, value, staged)
        return value

    def token(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self.token(entry) for entry in value)
        if not isinstance(value, int) or value < FIRST_SPECIAL:
            return value
        return self.special(value)

    def special(self, key: int | str) -> int:
        """Return an id from the end of the vocabulary, the same for the same key."""
        return self.ids.setdefault(key, VOCABULARY - 1 - len(self.ids))

    def numbers(self, name: str, values: Sequence[Any], layers: int, staged: bool) -> list[Any]:
        if not values or not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            return list(values)
        if _LAYER_INDICES.search(name) and "out_" not in name and not name.startswith("stage"):
            last = max(max(values), 1)
            return sorted({value if value < 0 else value * (layers - 1) // last for value in values})
        if name in ("depths", "num_blocks", "layers", "blocks_per_stage", "stage_num_blocks"):
            return [min(value, 2) for value in values]
        if re.search(r"image_size|patch_size|spatial_shape", name):
            return [self.number(name, value, staged) for value in values]
        if re.search(r"heads", name):
            return [
                max(1, 2 * value // max(min(values), 1)) if max(values) > 2 else value for value in values
            ]
        if (
            re.search(r"hidden|dim|channel|width|size|filters", name)
            and max(values) >= 32
            and "window" not in name
        ):
            smallest = min(value for value in values if value > 4)
            return [value if value <= 4 else NARROW * value // smallest for value in values]
        return list(values)

    def number(self, name: str, value: int, staged: bool) -> int:
        if name.endswith("image_size") or name in ("input_size", "img_size"):
            return min(value, STAGED_IMAGE if staged else IMAGE) if value > 8 else value
        if re.search(r"patch_size$|^patch_stride$", name):
            return min(value, PATCH)
        if staged and name == "embed_dim":
            return NARROW
        if staged and name == "window_size":
            return min(value, 2)
        if staged and re.search(r"num_encoder_blocks|num_stages", name):
            return value
        for pattern, rule in _RULES:
            if pattern.search(name):
                return rule(value)
        return value


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of the same class with two layers or one of each kind, 64 wide, 128 words.

    ``config`` is left as it was. Dropout stays as it is; what draws random numbers in Python is off.

    Raises:
        Exception: whatever the class raises about a value that it does not accept.
    """
    return _Tiny().config(config)


def _is_staged(config: PreTrainedConfig) -> bool:
    """Whether the model is a pyramid: each stage has half the positions of the one before."""
    return any(
        isinstance(vars(config).get(name), list | tuple)
        for name in (
            "depths",
            "hidden_sizes",
            "blocks_per_stage",
            "stage_num_blocks",
            "num_blocks",
            "embed_dim",
        )
    )


def _layers(config: PreTrainedConfig) -> tuple[dict[str, list[Any]], int | None]:
    """Return the per-layer lists cut to one layer of each kind, and how many layers that makes.

    Lists of one length are cut at the same places, so that a layer keeps its kind in all of them.
    """
    values = vars(config)
    if _is_staged(config):
        return {}, None
    count = next((values[n] for n in values if _LAYER_COUNT.search(n) and isinstance(values[n], int)), None)
    if count is None or count < 2:
        return {}, None
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == count and not name.startswith("_")
    }
    kinds = [tuple(map(str, kind)) for kind in zip(*lists.values(), strict=True)] if lists else []
    first = sorted({kinds.index(kind) for kind in kinds})[:6]
    if len(first) < LAYERS:
        first = list(range(LAYERS))
    return {name: [entries[index] for index in first] for name, entries in lists.items()}, len(first)


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings for heads of ``HEAD`` numbers: sections and factor lists have to fill half of one."""
    smaller = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):
            smaller[name] = _rope(value)
        elif name.endswith("section") and isinstance(value, list | tuple):
            half = HEAD // 2
            smaller[name] = [half // len(value)] * (len(value) - 1)
            smaller[name].append(half - sum(smaller[name]))
            smaller["partial_rotary_factor"] = 1.0
        elif name in ("long_factor", "short_factor"):
            smaller[name] = list(value)[: HEAD // 2]
        elif name == "original_max_position_embeddings":
            smaller[name] = POSITIONS // 2
    return smaller


def _backbone_indices(config: PreTrainedConfig, layers: int | None) -> list[int]:
    """Return as many of a backbone's last stages as its class hands out."""
    wanted = len(vars(config)["_out_features"])
    stages = len(config.stage_names) - 1 if _is_staged(config) or layers is None else layers
    return list(range(max(stages - wanted + 1, 0), stages + 1))


def _backbone(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny convolutional backbone where the class names one that only ``timm`` has."""
    wanted = len(getattr(config, "out_indices", None) or (1,))
    resnet: Any = CONFIG_MAPPING["resnet"]
    made: PreTrainedConfig = resnet(
        embedding_size=NARROW,
        hidden_sizes=[NARROW, NARROW, 2 * NARROW, 2 * NARROW],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=list(range(5 - wanted, 5)),
    )
    return made
