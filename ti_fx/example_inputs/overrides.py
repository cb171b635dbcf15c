"""Some model types need inputs that the rules can't know; they are listed here."""

from __future__ import annotations

# Inputs beyond those of the rules, with a maker's name where the rule's is not wanted.
ALSO: dict[str, dict[str, str]] = {
    "blip_2_qformer": {"encoder_hidden_states": ""},
    "decision_transformer": {
        "states": "",
        "actions": "",
        "rewards": "",
        "returns_to_go": "",
        "timesteps": "",
    },
    "deepseek_vl_hybrid": {"high_res_pixel_values": ""},
    "diffusion_gemma": {"decoder_input_ids": "words"},  # drawn at random without
    "dia": {"decoder_input_ids": "code words"},
    "idefics": {"image_attention_mask": "", "pixel_values": "image lists"},
    "kosmos-2": {"input_ids": "long words", "image_embeds_position_mask": ""},
    "depth_pro": {"pixel_values": "large images"},
    "efficientloftr": {"pixel_values": "pairs"},
    "lightglue": {"pixel_values": "pairs"},
    "lxmert": {"visual_feats": "", "visual_pos": ""},
    "mllama": {
        "pixel_values": "aspect images",
        "aspect_ratio_ids": "",
        "aspect_ratio_mask": "",
        "input_ids": "words",
        "cross_attention_mask": "",
    },
    "qwen2_audio": {"input_ids": "quarter words"},
    "vit_mae": {"noise": ""},  # drawn at random without
    "seggpt": {
        "pixel_values": "square images",
        "prompt_pixel_values": "square images",
        "prompt_masks": "square images",
    },
    "kyutai_speech_to_text": {"input_ids": "text and code words"},
    "musicgen": {"decoder_input_ids": "codebook rows"},
    "musicgen_melody": {"decoder_input_ids": "codebook rows"},
}
for _name in ("autoformer", "informer", "time_series_transformer"):
    ALSO[_name] = {"past_time_features": "", "future_values": "", "future_time_features": ""}
for _name in ("llava_next", "llava_next_video", "llava_onevision"):
    ALSO[_name] = {"pixel_values": "tiles", "image_sizes": "wide sizes"}

# Inputs that the rules would make and that have to stay away.
UNUSED: dict[str, frozenset[str]] = {
    "csm": frozenset({"input_values"}),
    "embedding_gemma2": frozenset({"pixel_values"}),
    "granite_speech": frozenset({"input_features_mask"}),
    "granite_speech_plus": frozenset({"input_features_mask"}),
    "gemma4": frozenset({"pixel_values"}),
    "gemma4_unified": frozenset({"pixel_values"}),
    "kyutai_speech_to_text": frozenset({"input_values"}),
    "llava": frozenset({"image_sizes"}),
    "musicgen_melody": frozenset({"input_features"}),
}
