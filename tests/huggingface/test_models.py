"""Compressed models of transformers are models of transformers: each family generates, caches and answers as before."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx
from balf_fx.errors import FileError
from balf_fx.huggingface.adapters import target_modules

transformers = pytest.importorskip("transformers")

WORDS, LENGTH = TINY_TEXT["vocab_size"], 8
_TEXT = {**TINY_TEXT, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_TEXT |= {"max_position_embeddings": 32}
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
_GPT |= {"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_PATCHES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_PATCHES |= {"image_size": 16, "patch_size": 4, "initializer_range": 0.2}
_BART = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
_BART |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2}
_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART |= {"forced_eos_token_id": None, "max_position_embeddings": 32}
_T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
_WHISPER = {key: value for key, value in _BART.items() if key != "max_position_embeddings"}
_WHISPER |= {"max_source_positions": 50, "max_target_positions": 32, "suppress_tokens": None}
_WHISPER |= {"begin_suppress_tokens": None, "eos_token_id": None}
_LATENT = {**_TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_LATENT |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16}
_LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_LLAVA = {"text_config": {**_DECODER, "model_type": "llama"}, "vision_feature_layer": -1}
_LLAVA |= {"vision_config": {**_PATCHES, "model_type": "clip_vision_model"}, "image_token_index": WORDS - 1}

DECODERS = {
    "Llama": ("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", _DECODER),
    "Qwen3": ("Qwen3ForCausalLM", _DECODER | {"head_dim": 8}),
    "Mistral": ("MistralForCausalLM", _DECODER | {"sliding_window": 5}),
    "Gemma": ("GemmaForCausalLM", _DECODER | {"head_dim": 8}),
    "Phi": ("PhiForCausalLM", _DECODER),
    "Phi3": ("Phi3ForCausalLM", _DECODER),
    "GPT-2": ("GPT2LMHeadModel", _GPT),
    "NeoX": ("GPTNeoXForCausalLM", _TEXT),
    "OPT": ("OPTForCausalLM", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "Falcon": ("FalconForCausalLM", _TEXT),
    "Mixtral": ("MixtralForCausalLM", _DECODER | {"num_local_experts": 2}),
    "DeepSeek": ("DeepseekV3ForCausalLM", _LATENT | {"num_hidden_layers": 2}),
}
TRANSLATORS = {"T5": ("T5ForConditionalGeneration", _T5), "BART": ("BartForConditionalGeneration", _BART)}
CLASSIFIERS = {
    "BERT": ("BertForSequenceClassification", _TEXT),
    "RoBERTa": ("RobertaForSequenceClassification", _TEXT | {"pad_token_id": 1}),
    "ViT": ("ViTForImageClassification", _PATCHES),
    "DINOv2": ("Dinov2ForImageClassification", _PATCHES),
    "CLIP": ("CLIPVisionModel", _PATCHES),
    "ModernBERT": ("ModernBertForSequenceClassification", _TEXT | {"eos_token_id": 2, "sep_token_id": 2}),
    "SigLIP": ("SiglipModel", {"text_config": _TEXT | {"projection_size": 32}, "vision_config": _PATCHES}),
    "Swin": ("SwinForImageClassification", _SWIN),
}
SPEAKERS = {
    "Whisper": ("WhisperForConditionalGeneration", _WHISPER),
    "LLaVA": ("LlavaForConditionalGeneration", _LLAVA),
}
FAMILIES = {**DECODERS, **TRANSLATORS, **CLASSIFIERS, **SPEAKERS}
KEPT = {"Mixtral": 0.9}  # of its FLOPs; all other families keep 0.65
FAST = (
    *TRANSLATORS,
    *SPEAKERS,
    "Qwen2",
    "Mistral",
    "RoBERTa",
    "Mixtral",
    "DeepSeek",
    "SigLIP",
    "Swin",
)  # lower ranks alone; the others get fewer features, too


def build(name):
    class_name, options = FAMILIES[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval()


def batch(name, count=16, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
    if name in ("ViT", "DINOv2", "CLIP", "Swin"):
        return pixels
    tokens = torch.randint(3, WORDS, (count, length), generator=generator)
    if name in TRANSLATORS:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)[:, : length - 2]}
    if name == "Whisper":
        return {"input_features": torch.randn(count, 80, 100, generator=generator), "decoder_input_ids": tokens}
    if name == "LLaVA":
        image = torch.full((count, 16), WORDS - 1)  # a token for each of the image's patches
        tokens = torch.cat([tokens[:, :1], image, tokens[:, 1:].clamp(max=WORDS - 2)], 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels}
    if name == "SigLIP":
        return {"input_ids": tokens, **pixels}
    return {"input_ids": tokens}


@pytest.fixture(scope="module")
def compressed():
    """Each family's model, what it was compressed to, and the graph with the same layers."""
    found = {}

    def of(name):
        if name not in found:
            graphs = []
            with pytest.MonkeyPatch.context() as patch:
                check = balf_fx.api.check_same
                patch.setattr(balf_fx.api, "check_same", lambda *args: (graphs.append(args[1]), check(*args)))
                model = build(name)
                options = {
                    "flops": KEPT.get(name, 0.65),
                    "effort": "fast" if name in FAST else "balanced",
                    "progress": False,
                }
                small = balf_fx.compile(model, [batch(name)], result="module", **options)
            found[name] = model, small, graphs[0]
        return found[name]

    return of


def answer(output):
    return output[0] if isinstance(output, tuple) else output.get("logits", output[0])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_compressed_model_is_a_smaller_model_of_its_class(name, compressed):
    model, small, graph = compressed(name)
    assert type(small) is type(model)
    assert small.config.model_type == model.config.model_type
    assert small.device == model.device
    assert small.dtype == model.dtype
    report = balf_fx.report(small)
    params = sum(parameter.numel() for parameter in small.parameters())
    assert params == report.params_after
    assert report.flops_kept <= KEPT.get(name, 0.65)
    for seed in (0, 1):
        given = batch(name, count=16 if name == "LLaVA" else 3, seed=seed)  # its graph has one number of samples
        fixed = {} if name in CLASSIFIERS else {"use_cache": False}
        torch.testing.assert_close(answer(small(**given)), answer(graph(**given, **fixed)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_caches_give_what_whole_sequences_give(name, compressed):
    _, small, _ = compressed(name)
    tokens = batch(name, count=2, length=7, seed=2)["input_ids"]
    whole, cache, steps = small(tokens).logits, None, []
    for index in range(tokens.shape[1]):
        output = small(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-4)


def generate(model, name, *, count=2, **options):
    given = batch(name, count=count, length=5, seed=3)
    given.pop("decoder_input_ids", None)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    torch.manual_seed(0)
    return model.generate(**{**given, **options}, max_new_tokens=6, min_new_tokens=6)


@pytest.mark.parametrize("name", [*DECODERS, *TRANSLATORS, *SPEAKERS])
def test_greedy_beam_and_sampled_generation(name, compressed):
    _, small, _ = compressed(name)
    greedy = generate(small, name, do_sample=False)
    assert torch.equal(greedy, generate(small, name, do_sample=False, use_cache=False))
    beams = generate(small, name, num_beams=3, do_sample=False)
    assert torch.equal(beams, generate(small, name, num_beams=3, do_sample=False, use_cache=False))
    sampled = generate(small, name, do_sample=True)
    assert torch.equal(sampled, generate(small, name, do_sample=True, use_cache=False))


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_the_left_changes_nothing(name, compressed):
    _, small, _ = compressed(name)
    tokens = batch(name, count=1, length=5, seed=4)["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    alone = generate(small, name, input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False)
    beside = generate(small, name, input_ids=padded, attention_mask=(padded > 0).long(), do_sample=False)
    assert torch.equal(beside[:, 3:], alone)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_caches_hold_no_zeros_of_narrower_heads(name, compressed):
    model, small, _ = compressed(name)
    tokens = batch(name, count=2, length=7, seed=2)["input_ids"]
    sizes = {width.kind: width.size for width in balf_fx.plan(small).widths if width.kind != "channels"}
    old, new = (each(tokens, use_cache=True).past_key_values.layers[0] for each in (model, small))
    for kind, want, got in (("queries", old.keys, new.keys), ("values", old.values, new.values)):
        assert got.shape == (*want.shape[:-1], sizes.get(kind, want.shape[-1]))


@pytest.mark.parametrize("name", DECODERS)
def test_a_static_cache_gives_what_a_growing_one_gives(name, compressed):
    _, small, _ = compressed(name)
    growing = generate(small, name, do_sample=False)
    cache = transformers.StaticCache(config=small.config, max_cache_len=16)
    assert torch.equal(generate(small, name, do_sample=False, past_key_values=cache), growing)


def test_hidden_states_and_attentions_keep_their_shapes(compressed):
    model, small, _ = compressed("BERT")
    given = batch("BERT", count=2)
    want, got = (each(**given, output_hidden_states=True) for each in (model, small))
    assert [value.shape for value in got.hidden_states] == [value.shape for value in want.hidden_states]
    assert torch.equal(got.hidden_states[0], want.hidden_states[0])  # the embeddings are untouched


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_folders_give_models_of_each_kind_back(name, compressed, tmp_path):
    _, small, _ = compressed(name)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    if hasattr(small.config, "quantization_config"):
        assert balf_fx.plan(tmp_path).ranks == balf_fx.plan(small).ranks
        assert str(balf_fx.report(tmp_path)) == str(balf_fx.report(again))
    else:
        with pytest.raises(FileError, match="transformers reads it without"):
            balf_fx.plan(tmp_path)
    state = small.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    # Products of odd sizes are rounded by where their weights lie in memory.
    torch.testing.assert_close(answer(again(**batch(name, count=2))), answer(small(**batch(name, count=2))))


def half(value):
    return value.to(torch.bfloat16) if value.is_floating_point() else value


def has_several_inputs(module, _):
    """Whether torchao can quantize a layer: it fails where the rank is 1, and in `nn.MultiheadAttention`."""
    return type(module) is torch.nn.Linear and module.in_features > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_training_and_quantization(name, compressed):
    quantization = pytest.importorskip("torchao.quantization")
    small = copy.deepcopy(compressed(name)[1])
    given = batch(name, count=2)
    with torch.no_grad():
        want = answer(small(**given))
        halved = answer(copy.deepcopy(small).to(torch.bfloat16)(**{key: half(value) for key, value in given.items()}))
        assert halved.dtype is torch.bfloat16
        assert torch.isfinite(halved).all()
        rounded = copy.deepcopy(small)
        quantization.quantize_(rounded, quantization.Int8WeightOnlyConfig(), has_several_inputs)
        assert 0 < (answer(rounded(**given)) - want).norm() < 0.1 * want.norm()
    if small.supports_gradient_checkpointing:
        small.gradient_checkpointing_enable()
    answer(small.train()(**given)).square().mean().backward()
    changed = [path for path, recipe in balf_fx.plan(small).modules.items() if recipe.form != "cache"]
    found = [parameter for path in changed for parameter in small.get_submodule(path).parameters()]
    assert found
    assert all(parameter.grad is not None for parameter in found)


def labelled(name):
    """Rows for Trainer, with what the family's loss is computed from."""
    given = batch(name, count=2)
    rows = [{key: value[index] for key, value in given.items()} for index in range(2)]
    for row in rows:
        if name in CLASSIFIERS:
            row["labels"] = torch.tensor(1)
        else:
            row["labels"] = row.pop("decoder_input_ids", row.get("input_ids"))
    return rows


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("CLIP", "SigLIP")])  # they take no labels
def test_a_step_of_the_trainer(name, compressed, tmp_path):
    pytest.importorskip("accelerate")
    small = copy.deepcopy(compressed(name)[1])
    before = {path: value.clone() for path, value in small.named_parameters()}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, **quiet)
    transformers.Trainer(small, arguments, train_dataset=labelled(name)).train()
    assert any(not torch.equal(value, before[path]) for path, value in small.named_parameters())


TASKS = dict.fromkeys(DECODERS, "text-generation")
TASKS |= dict.fromkeys(["BERT", "RoBERTa", "ModernBERT"], "text-classification")
TASKS |= dict.fromkeys(["ViT", "DINOv2", "Swin"], "image-classification")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{index}": index for index in range(WORDS)}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_a_pipeline_answers_as_the_model_does(name, compressed, tokenizer):
    _, small, _ = compressed(name)
    if TASKS[name] == "image-classification":
        image = pytest.importorskip("PIL.Image").new("RGB", (20, 20), "red")
        processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
        pipe, given = transformers.pipeline(TASKS[name], model=small, image_processor=processor), image
        want = answer(small(**processor(image, return_tensors="pt")))
    else:
        pipe, given = transformers.pipeline(TASKS[name], model=small, tokenizer=tokenizer), "w4 w5 w6"
        want = answer(small(torch.tensor([[4, 5, 6]])))
    if TASKS[name] == "text-generation":
        (found,) = pipe(given, max_new_tokens=1, do_sample=False, return_full_text=False)
        assert found["generated_text"].strip() == f"w{int(want[0, -1].argmax())}"
    else:
        found = pipe(given)
        found = found[0] if isinstance(found[0], list) else found
        assert found[0]["label"] == small.config.id2label[int(want[0].argmax())]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_adapters_by_name(name, compressed):
    peft = pytest.importorskip("peft")
    small = copy.deepcopy(compressed(name)[1])
    given, forms = batch(name, count=2), {path: recipe.form for path, recipe in balf_fx.plan(small).modules.items()}
    names = target_modules(small, [path for path, form in forms.items() if form != "cache"])
    names = [path for path in names if not isinstance(small.get_submodule(path), torch.nn.Conv2d)]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapted = peft.get_peft_model(small, config)
    assert sum(path.endswith("lora_A.default") for path, _ in adapted.named_modules()) == len(names) > 0
    after = answer(adapted(**given))
    torch.testing.assert_close(answer(adapted.merge_and_unload()(**given)), after, rtol=1e-3, atol=1e-4)
