"""Some model types' tiny configurations need more than the general rules; a table says what."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
    "partial_rotary_factor": 1.0,
}


_TIMESERIES = {
    "prediction_length": 8,
    "context_length": 16,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
}


_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32]]}


# The names spell the code in letters: A is 0.
_CODES = {
    "<image>": 127,
    **{f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": code for code in range(64)},
}


_TOKENS = {
    "<image>": 127,
    "<|extra_200|>": 126,
    **{f"<|visual token {code:06d}|>": code for code in range(64)},
}


_DETECTOR = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64, 64, 64]}


# Fields of a configuration, by its own ``model_type`` (also inside another), or its class's name where it has none.
FIELDS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 16},
    "align_vision_model": {"width_coefficient": 0.05, "depth_coefficient": 0.3, "hidden_dim": 64},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": _TIMESERIES,
    "bailing_hybrid": {"num_group": 1, "n_group": 1, "topk_group": 1},
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "bit": {"num_groups": 1},
    "chameleon": {"vocabulary_map": _CODES},
    "clap_audio_model": {"patch_embeds_hidden_size": 16, "hidden_size": 128},
    "clvp_decoder": {"num_attention_heads": 2, "decoder_fixing_codes": [83, 45, 45, 48]},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "d_fine": _DETECTOR,
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deimv2": _DETECTOR,
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "dots1": {"n_shared_experts": 1},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientnet": {"width_coefficient": 0.05, "depth_coefficient": 0.3, "hidden_dim": 64},
    "emu3": {"vocabulary_map": _TOKENS},
    "emu3_vqgan": {"hidden_size": 256},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 32},
    "funnel": {"block_sizes": [1, 1]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"intermediate_size": 96},
    "glm4v_moe_text": {"rope_parameters": _MROPE},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "glmasr_encoder": {"intermediate_size": 256},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granite_docling_text": {
        "attention_multiplier": 0.25,
        "residual_multiplier": 1.0,
        "embedding_multiplier": 1.0,
    },
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "granitemoehybrid": {"mamba_d_head": 32, "layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 64],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [16, 32, 64, 128],
    },
    "hrm_text": {"embedding_scale": 1.0, "H_cycles": 1, "L_cycles": 2},
    "hunyuan_vl_text": {"rope_parameters": _MROPE},
    "idefics": {"additional_vocab_size": 0},
    "informer": _TIMESERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "levit": {"patch_size": 16, "image_size": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 256},
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 32},
    "mllama_vision_model": {"vision_output_dim": 192},
    "mobilevit": {"hidden_sizes": [16, 32, 48]},
    "mobilevitv2": {"image_size": 128},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron_asr_streaming_encoder": {"sliding_window": 20},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "perceiver": {"num_blocks": 1, "num_self_attends_per_block": 2},
    "pp_doclayout_v3": {**_DETECTOR, "x4_feat_dim": 16},
    "pp_doclayout_v4": _DETECTOR,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 98, "audio_start_token_id": 97},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 98, "audio_start_token_id": 97},
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rt_detr": _DETECTOR,
    "rt_detr_v2": _DETECTOR,
    "sam2_hiera_det_model": {"hidden_size": 16, "global_attention_blocks": [4]},
    "sam2_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "seggpt": {
        "image_size": [64, 32],
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3],
    },
    # its dropout is an autograd function of its own, which a trace in train mode keeps for ever
    "sew-d": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "siglip2_vision_model": {"vision_use_head": False},
    "siglip_vision_model": {
        "vision_use_head": False
    },  # what classifies and what speaks of images do not read it
    "step3p5": {"sliding_window": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": _TIMESERIES,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vjepa2": {"frames_per_clip": 4},
    "voxtral_encoder": {"intermediate_size": 256},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


# Which of transformers' tables of classes has the class to build ("BASE": the model without a head).
TASKS: dict[str, str] = {
    "longformer": "MASKED_LM",  # a class token attends globally, so the last layer's windows would not matter
    "musicgen": "TEXT_TO_WAVEFORM",
    "musicgen_melody": "TEXT_TO_WAVEFORM",
}


# Types that are not built, and why.
REFUSED: dict[str, str] = {
    "bark": "BarkModel has no forward, only generate",
    "glm_image_vqmodel": "GlmImageVQVAE has no forward",
    "inkling_mm_model": "its vision layers fold patches by factors of the image's size, which no rule makes smaller",
    "mra": "attention is a CUDA kernel, without which the layers are empty (modeling_mra.py)",
    "omdet-turbo": "its backbone is a Swin transformer of the package timm",
    "tvp": "modeling_tvp.py views its column positions as the batch's shape, so it runs with one row only",
}

for _name in ("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_video"):
    REFUSED[_name] = "the forward takes an inference session, which is no tensor"
