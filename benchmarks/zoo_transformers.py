"""The text, vision, audio and multimodal models of transformers that the zoo examines, in small configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from zoo_inputs import LENGTHS, MASKED, OTHERS, Batch, padded, without_masks
from zoo_subject import Case, Subject

_WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_WIDTHS, "vocab_size": 1000, "max_position_embeddings": 64, "pad_token_id": 0}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_TRANSLATOR = {
    "vocab_size": 1000,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "use_cache": False,
}
_T5 = {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False}
_GPT = {"vocab_size": 1000, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False}
_EXPERTS = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    **_DECODER,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_VISION = {**_WIDTHS, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [32, 64], "depths": [1, 1]}
_WAVE = {**_WIDTHS, "conv_dim": [32, 32], "conv_kernel": [10, 8], "conv_stride": [8, 8], "num_feat_extract_layers": 2}

TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "arcee": ("ArceeForCausalLM", "text", _DECODER),
    "ast": (
        "ASTForAudioClassification",
        "spectrogram",
        {**_WIDTHS, "num_mel_bins": 32, "max_length": 64, "patch_size": 16},
    ),
    "bart": ("BartForConditionalGeneration", "translation", _TRANSLATOR),
    "beit": ("BeitForImageClassification", "image", _VISION),
    "bert": ("BertForSequenceClassification", "text", _TEXT),
    "blenderbot": ("BlenderbotForConditionalGeneration", "translation", _TRANSLATOR),
    "bloom": (
        "BloomForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "camembert": ("CamembertForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "clip": (
        "CLIPModel",
        "caption",
        {"text_config": {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": _VISION},
    ),
    "clip_text": ("CLIPTextModel", "text", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "clip_vision": ("CLIPVisionModel", "image", _VISION),
    "codegen": ("CodeGenForCausalLM", "text", {**_GPT, "n_ctx": 64, "rotary_dim": 8}),
    "cohere": ("CohereForCausalLM", "text", _DECODER),
    "convbert": ("ConvBertForSequenceClassification", "text", {**_TEXT, "embedding_size": 64}),
    "convnext": ("ConvNextForImageClassification", "image", {**_STAGES, "num_stages": 2}),
    "convnextv2": ("ConvNextV2ForImageClassification", "image", {**_STAGES, "num_stages": 2}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "text",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "text", _LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "text", _LATENT),
    "deit": ("DeiTForImageClassification", "image", _VISION),
    "dinov2": ("Dinov2ForImageClassification", "image", _VISION),
    "dinov3": ("DINOv3ViTModel", "image", _VISION),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "text",
        {"vocab_size": 1000, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "ernie": ("ErnieForSequenceClassification", "text", _TEXT),
    "exaone4": ("Exaone4ForCausalLM", "text", _DECODER),
    "falcon": (
        "FalconForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False},
    ),
    "fnet": ("FNetForSequenceClassification", "tokens", _TEXT),
    "gemma": ("GemmaForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", "text", {**_DECODER, "head_dim": 16, "sliding_window": 8}),
    "glm": ("GlmForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", "text", _GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "text", _GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "text",
        {
            "vocab_size": 1000,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "text", {**_TEXT, "use_cache": False}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "text",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    ),
    "gptj": ("GPTJForCausalLM", "text", {**_GPT, "rotary_dim": 8}),
    "granite": ("GraniteForCausalLM", "text", _DECODER),
    "granite_moe": ("GraniteMoeForCausalLM", "text", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("HeliumForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "hubert": ("HubertModel", "wave", _WAVE),
    "lfm2": ("Lfm2ForCausalLM", "text", {**_DECODER, "block_multiple_of": 16}),
    "llama": ("LlamaForCausalLM", "text", _DECODER),
    "llava": (
        "LlavaForConditionalGeneration",
        "dialogue",
        {
            "text_config": {**_DECODER, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": 999,
            "vision_feature_layer": -1,
        },
    ),
    "m2m_100": ("M2M100ForConditionalGeneration", "translation", _TRANSLATOR),
    "mamba": (
        "MambaForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "text",
        {
            "vocab_size": 1000,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "use_cache": False,
        },
    ),
    "marian": ("MarianMTModel", "translation", _TRANSLATOR),
    "mbart": ("MBartForConditionalGeneration", "translation", _TRANSLATOR),
    "mistral": ("MistralForCausalLM", "text", _DECODER),
    "mixtral": ("MixtralForCausalLM", "text", {**_DECODER, "num_local_experts": 4}),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "text",
        {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    "mobilevit": ("MobileViTForImageClassification", "image", {"image_size": 64}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "text",
        {**_DECODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
    "mpnet": ("MPNetForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "mpt": (
        "MptForCausalLM",
        "text",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 1000, "use_cache": False},
    ),
    "mt5": ("MT5ForConditionalGeneration", "translation", _T5),
    "nemotron": ("NemotronForCausalLM", "text", _DECODER),
    "olmo": ("OlmoForCausalLM", "text", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "text", _DECODER),
    "olmoe": ("OlmoeForCausalLM", "text", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": (
        "OPTForCausalLM",
        "text",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "use_cache": False},
    ),
    "pegasus": ("PegasusForConditionalGeneration", "translation", _TRANSLATOR),
    "persimmon": ("PersimmonForCausalLM", "text", _DECODER),
    "phi": ("PhiForCausalLM", "text", _DECODER),
    "phi3": ("Phi3ForCausalLM", "text", _DECODER),
    "phimoe": ("PhimoeForCausalLM", "text", {**_DECODER, "num_local_experts": 4}),
    "poolformer": (
        "PoolFormerForImageClassification",
        "image",
        {
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    "pvt_v2": (
        "PvtV2ForImageClassification",
        "image",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", "text", _DECODER),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "text", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3": ("Qwen3ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "text", {**_EXPERTS, "head_dim": 16}),
    "regnet": (
        "RegNetForImageClassification",
        "image",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 16},
    ),
    "rembert": (
        "RemBertForSequenceClassification",
        "text",
        {**_TEXT, "input_embedding_size": 32, "output_embedding_size": 32},
    ),
    "resnet": ("ResNetForImageClassification", "image", {**_STAGES, "embedding_size": 32}),
    "roberta": ("RobertaForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "roformer": ("RoFormerForSequenceClassification", "text", {**_TEXT, "embedding_size": 64}),
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
    "siglip": ("SiglipModel", "caption", {"text_config": {**_TEXT, "projection_size": 64}, "vision_config": _VISION}),
    "siglip_vision": ("SiglipVisionModel", "image", _VISION),
    "smollm3": ("SmolLM3ForCausalLM", "text", _DECODER),
    "squeezebert": ("SqueezeBertForSequenceClassification", "text", {**_TEXT, "embedding_size": 64}),
    "stablelm": ("StableLmForCausalLM", "text", _DECODER),
    "starcoder2": ("Starcoder2ForCausalLM", "text", {**_DECODER, "sliding_window": 8}),
    "swin": (
        "SwinForImageClassification",
        "image",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "image",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5": ("T5ForConditionalGeneration", "translation", _T5),
    "t5_encoder": ("T5EncoderModel", "text", {k: v for k, v in _T5.items() if k != "use_cache"}),
    "umt5": ("UMT5ForConditionalGeneration", "translation", _T5),
    "vit": ("ViTForImageClassification", "image", _VISION),
    "wav2vec2": ("Wav2Vec2Model", "wave", _WAVE),
    "whisper": (
        "WhisperForConditionalGeneration",
        "speech",
        {
            **{k: v for k, v in _TRANSLATOR.items() if k != "max_position_embeddings"},
            "max_source_positions": 50,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
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
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "xlnet": (
        "XLNetForSequenceClassification",
        "text",
        {"vocab_size": 1000, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
    "yolos": ("YolosForObjectDetection", "image", {**_VISION, "image_size": [64, 64], "num_detection_tokens": 4}),
}
"""Name -> class, what it reads, and how its configuration differs from the class's own."""


ONE_LENGTH = ("gpt_neo", "llava", "mamba", "mamba2", "xlnet")
"""Models for which torch.export fixes the number of tokens, since their code loops over it or compares it."""

ONE_SIZE = ("llava",)
"""Models for which it fixes the number of samples."""

UNMASKED = ", no mask"
"""Ends the name of a case whose model is called with tokens alone."""


def transformers_cases(_: Sequence[str]) -> Iterator[Case]:
    """All of them, whatever is selected: to list them takes no time. Models of masked text come a second time."""
    for name, (_, reads, _) in TRANSFORMERS.items():
        yield Case("transformers", name)
        if reads in MASKED:
            yield Case("transformers", name + UNMASKED)


def transformers_subject(name: str, _: Mapping[str, Any]) -> Subject:
    """A model of TRANSFORMERS with random weights."""
    import transformers

    architecture = name.removesuffix(UNMASKED)
    class_name, reads, options = TRANSFORMERS[architecture]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**options))
    if reads not in MASKED:
        return Subject(model, OTHERS[reads])
    lengths = LENGTHS[:1] if architecture in ONE_LENGTH else LENGTHS
    first, *others = _text_batches(MASKED[reads], lengths, masked=architecture == name)
    return Subject(model, first, tuple(others), other_sizes=() if architecture in ONE_SIZE else (3,))


def _text_batches(
    make: Callable[[int, int], Batch], lengths: Sequence[int], masked: bool
) -> Iterator[Callable[[int], Batch]]:
    """At each length, padded on the right, on the left and not at all; or without masks."""
    for length in lengths:
        whole = functools.partial(make, length=length)
        yield from (padded(whole, "right"), padded(whole, "left"), whole) if masked else (without_masks(whole),)
