"""What reads, writes, trains, quantizes and serves models of transformers does so with compressed ones."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx
from balf_fx.errors import BalfError, FileError, OptionError, PlanError
from balf_fx.graph.replacements import Replacement
from balf_fx.huggingface.adapters import target_modules

transformers = pytest.importorskip("transformers")

WORDS = TINY_TEXT["vocab_size"]
OPTIONS = {**TINY_TEXT, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}
OPTIONS |= {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**OPTIONS)).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, WORDS, (16, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compressed(model, tokens):
    options = {"flops": 0.6, "effort": "balanced", "progress": False}
    return balf_fx.compile(model, [{"input_ids": tokens}], result="module", **options)


@pytest.fixture
def small(compressed):
    return copy.deepcopy(compressed)


@pytest.fixture(scope="module")
def with_pairs(model, tokens):
    ranks = {"model.layers.0.self_attn.q_proj": 6, "model.layers.0.mlp.up_proj": 8}
    options = {"effort": "fast", "progress": False, "allocation": ranks}
    return balf_fx.compile(model, [{"input_ids": tokens}], result="module", **options)


@pytest.fixture
def pairs(with_pairs):
    """The model with two layers in place of two."""
    return copy.deepcopy(with_pairs)


@pytest.fixture
def folder(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def logits(net, tokens):
    with torch.no_grad():
        return net(tokens).logits


def test_tensors_that_are_given_are_those_that_are_written(small, tokens, tmp_path):
    held = small.state_dict().items()
    given = {name: 0.5 * value if value.is_floating_point() else value for name, value in held}
    small.save_pretrained(tmp_path, state_dict=dict(given))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = again.state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.items())
    small.load_state_dict(given)
    torch.testing.assert_close(logits(again, tokens), logits(small, tokens))


def test_an_embedding_that_was_tied_to_the_head_keeps_its_weight(model, tokens, tmp_path):
    options = {"effort": "fast", "progress": False, "allocation": {"lm_head_factors": 8}}
    small = balf_fx.compile(model, [{"input_ids": tokens}], result="module", **options)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight)
    small.tie_weights()
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (small, again):
        assert isinstance(each.lm_head, Replacement)
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    assert small.config.tie_word_embeddings


def test_a_folder_gives_the_model_back(small, folder, tokens):
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(small)
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    assert balf_fx.report(again).params_after == balf_fx.report(small).params_after
    again.save_pretrained(folder / "again", max_shard_size="20KB")
    assert len(list((folder / "again").glob("*.safetensors"))) > 1
    third = transformers.LlamaForCausalLM.from_pretrained(folder / "again", device_map="cpu")
    assert torch.equal(logits(third, tokens), logits(small, tokens))
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(half, tokens).float(), logits(small, tokens), rtol=0.1, atol=0.3)
    base = transformers.AutoModel.from_pretrained(folder)
    torch.testing.assert_close(base(tokens).last_hidden_state, small.model(tokens).last_hidden_state)


def test_importing_balf_fx_is_enough(folder):
    start = "import balf_fx, sys; assert 'transformers' not in sys.modules; from transformers import AutoModel"
    code = f"{start}; print(type(AutoModel.from_pretrained({str(folder)!r}).layers[0].self_attn.v_proj).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1:] == ["Replacement"], done.stderr


def test_damaged_folders_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, data = load_file(weights), json.loads(config.read_text())
    path = next(path for path, recipe in balf_fx.Plan.from_dict(data["quantization_config"]["plan"][0]).modules.items())
    without = {name: value for name, value in whole.items() if not name.startswith(path)}
    save_file(without, weights, {"format": "pt"})
    with pytest.raises(FileError, match="not complete"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    save_file(whole, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileError, match="truncated"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    for change in ({"format": 99}, {"modules": {"elsewhere": data["quantization_config"]["plan"][0]["modules"][path]}}):
        changed = copy.deepcopy(data)
        changed["quantization_config"]["plan"][0] |= change
        config.write_text(json.dumps(changed))
        with pytest.raises(PlanError):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_copies_of_the_configuration_share_the_plan(small):
    """Encoder-decoders copy it in `forward`, and Dynamo traced every entry of the plan."""
    copied = copy.deepcopy(small.config)
    assert copied.quantization_config is small.config.quantization_config
    written = copied.to_dict()["quantization_config"]
    assert written["quant_method"] == "balf"
    assert written["plan"][0]["modules"]  # not walked through: it is in a list
    assert not any(isinstance(value, dict) for key, value in written.items() if key != "sha256")


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_changed_tensors_are_refused(small, tokens, size, tmp_path):
    from safetensors.torch import load_file, save_file

    small.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    for path in files:
        whole = load_file(path)
        for name in whole:
            changed = {key: value.clone() for key, value in whole.items()}
            changed[name].view(-1)[-1] += 1
            save_file(changed, path, {"format": "pt"})
            with pytest.raises(FileError, match=f"changed since .* checksum of {name} "):
                transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        save_file(whole, path, {"format": "pt"})
    assert torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(small, tokens)
    )


def test_what_became_of_a_model_afterwards_is_saved_with_its_own_checksums(model, small, tmp_path):
    small.save_pretrained(tmp_path / "first")
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    for index, each in enumerate((small, loaded, again)):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.1)
        each.to(torch.bfloat16).save_pretrained(tmp_path / str(index))
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(index))
        held = each.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in read.state_dict().items())
    small.model.save_pretrained(tmp_path / "base")
    base, held = transformers.AutoModel.from_pretrained(tmp_path / "base"), small.model.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in base.state_dict().items())


def test_files_of_balf_fx_and_pickles_give_the_model_back(model, small, tokens, tmp_path):
    balf_fx.save(small, tmp_path / "small.safetensors")
    again = balf_fx.load(tmp_path / "small.safetensors", model)
    for other in (again, pickle.loads(pickle.dumps(small))):
        assert torch.equal(logits(other, tokens), logits(small, tokens))
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(other.generate(tokens, **options), small.generate(tokens, **options))


def test_half_precision(small, tokens):
    want = logits(small, tokens)
    half = small.to(torch.bfloat16)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(logits(half, tokens).float(), want, rtol=0.1, atol=0.3)


@pytest.mark.slow
def test_torch_compile(small, tokens):
    want = logits(small, tokens)
    torch.testing.assert_close(logits(torch.compile(small, backend="aot_eager"), tokens), want, rtol=1e-4, atol=1e-4)


def test_training_with_checkpoints(small, tokens, tmp_path):
    pytest.importorskip("accelerate")
    small.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in small.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(small, arguments, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in small.named_parameters())
    trainer.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    trained = transformers.Trainer(again, arguments, train_dataset=rows)
    trained.train()


def test_adapters_by_name(pairs, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    names = target_modules(pairs, ["q_proj", "up_proj", "down_proj"])
    assert {type(pairs.get_submodule(name)) for name in names} == {torch.nn.Linear}
    path = "model.layers.0"
    both = [f"{path}.{name}.{index}" for name in ("self_attn.q_proj", "mlp.up_proj") for index in (0, 1)]
    assert names == [*both, f"{path}.mlp.down_proj"]
    before, again = logits(pairs, tokens), copy.deepcopy(pairs)
    adapted = peft.get_peft_model(pairs, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    assert sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules()) == len(names)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
    adapted(tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = logits(adapted, tokens)
    assert not torch.allclose(after, before, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(again, tmp_path), tokens), after)
    merged = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged, tokens), after, rtol=1e-4, atol=1e-4)


def test_adapters_of_all_linear_layers(pairs, tokens):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    after = logits(adapted := peft.get_peft_model(pairs, config), tokens)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), tokens), after, rtol=1e-4, atol=1e-4)


def test_a_name_of_a_compressed_layer_is_refused_with_what_to_do(pairs):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"balf_fx.huggingface.adapters.target_modules"):
        peft.get_peft_model(pairs, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_names_of_layers_for_adapters(model, pairs):
    assert target_modules(pairs, "embed_tokens") == ["model.embed_tokens"]
    assert target_modules(pairs, "q_proj.1") == ["model.layers.0.self_attn.q_proj.1"]
    assert target_modules(model, ["q_proj", "self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    for wrong in ("elsewhere", "proj", ""):
        with pytest.raises(OptionError, match="no module"):
            target_modules(pairs, wrong)


def test_quantized_factors(small, tokens):
    quantization = pytest.importorskip("torchao.quantization")
    want = logits(small, tokens)
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    got = logits(small, tokens)
    assert (got - want).norm() < 0.05 * want.norm()
    assert not torch.equal(got, want)


class Scaled(transformers.PreTrainedModel):
    """A parameter with one entry for each hidden feature."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = torch.nn.Linear(12, 32), torch.nn.Linear(32, 10)
        self.scale = torch.nn.Parameter(torch.rand(32) + 0.5)
        self.post_init()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * self.scale)


def test_narrower_parameters_in_folders(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    small = balf_fx.compile(
        Scaled(transformers.LlamaConfig()).eval(),
        [torch.randn(64, 12)],
        params=0.5,
        effort="balanced",
        result="module",
        progress=False,
    )
    assert small.scale.numel() < 32
    small.save_pretrained(tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(Scaled.from_pretrained(tmp_path)(x), small(x))
    whole = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in whole.items() if name != "scale"}, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="not complete: there is no tensor scale"):
        Scaled.from_pretrained(tmp_path)


def test_a_graph_has_no_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan"][0]["modules"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BalfError, match='result="module"'):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
