"""The text, vision, audio and multimodal models of transformers that the zoo examines, in small configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from zoo_subject import Case, Subject

_WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_WIDTHS, "vocab_size": 1000, "max_position_embeddings": 64, "pad_token_id": 0}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {**_WIDTHS, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [32, 64], "depths": [1, 1]}

TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "bart": (
        "BartModel",
        "text",
        {
            "vocab_size": 1000,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    "bert": ("BertForSequenceClassification", "text", _TEXT),
    "bloom": (
        "BloomForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "clip_text": ("CLIPTextModel", "text", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "clip_vision": ("CLIPVisionModel", "image", _VISION),
    "convnext": ("ConvNextForImageClassification", "image", {**_STAGES, "num_stages": 2}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "text",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "deit": ("DeiTForImageClassification", "image", _VISION),
    "dinov2": ("Dinov2ForImageClassification", "image", _VISION),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "text",
        {"vocab_size": 1000, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "gemma": ("GemmaForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gpt2": (
        "GPT2LMHeadModel",
        "text",
        {"vocab_size": 1000, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "text", {**_TEXT, "use_cache": False}),
    "llama": ("LlamaForCausalLM", "text", _DECODER),
    "mamba": (
        "MambaForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    ),
    "mistral": ("MistralForCausalLM", "text", _DECODER),
    "mixtral": ("MixtralForCausalLM", "text", {**_DECODER, "num_local_experts": 4}),
    "mobilevit": ("MobileViTForImageClassification", "image", {"image_size": 64}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "text",
        {**_DECODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "text",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "use_cache": False},
    ),
    "phi": ("PhiForCausalLM", "text", _DECODER),
    "phi3": ("Phi3ForCausalLM", "text", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "text", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "resnet": ("ResNetForImageClassification", "image", {**_STAGES, "embedding_size": 32}),
    "roberta": ("RobertaForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "segformer": (
        "SegformerForImageClassification",
        "image",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "siglip_vision": ("SiglipVisionModel", "image", _VISION),
    "swin": (
        "SwinForImageClassification",
        "image",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5_encoder": (
        "T5EncoderModel",
        "text",
        {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", "image", _VISION),
    "whisper_encoder": (
        "WhisperForAudioClassification",
        "audio",
        {
            "vocab_size": 1000,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 50,
            "num_mel_bins": 80,
        },
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "text",
        {"vocab_size": 1000, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
}
"""Name -> class, what it reads, and how its configuration differs from the class's own."""


def transformers_cases(_: Sequence[str]) -> Iterator[Case]:
    """All of them, whatever is selected: to list them takes no time."""
    return (Case("transformers", name) for name in TRANSFORMERS)


def transformers_subject(name: str, _: Mapping[str, Any]) -> Subject:
    """A model of TRANSFORMERS with random weights."""
    import transformers

    class_name, reads, options = TRANSFORMERS[name]
    model_class = getattr(transformers, class_name)
    batch = {"text": _text_batch, "image": _image_batch, "audio": _audio_batch}[reads]
    return Subject(model_class(model_class.config_class(**options)), batch)


def _text_batch(samples: int, length: int = 16) -> dict[str, Tensor]:
    """Tokens with padding behind all but the first sample."""
    mask = torch.ones(samples, length, dtype=torch.int64)
    mask[1:, -3:] = 0
    return {"input_ids": torch.randint(3, 1000, (samples, length)), "attention_mask": mask}


def _image_batch(samples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, 3, 64, 64)}


def _audio_batch(samples: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(samples, 80, 100)}
