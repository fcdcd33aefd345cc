"""Mixtures of experts of Hugging Face's transformers."""

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx
from balf_fx.graph.flops import count_flops
from balf_fx.graph.site import Reason

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

SIZES = {**TINY_TEXT, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2, "use_cache": False}
SMALL = {"moe_intermediate_size": 24, "num_experts": 4}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**SMALL, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**SMALL, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "DeepseekV2": {**DEEPSEEK, "moe_intermediate_size": 24, "n_routed_experts": 4, "topk_group": 1, "n_group": 1},
    "DeepseekV3": {**DEEPSEEK, "moe_intermediate_size": 24, "n_routed_experts": 8, "topk_group": 2, "n_group": 4},
}


def language_model(name, experts=None):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are left as zeros
            if not parameter.any():
                parameter.normal_(std=0.1)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(TINY_TEXT["vocab_size"], (4, 12))} for _ in range(4)]


class Called(torch.nn.Module):
    """A model as a function of its tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens)


@pytest.mark.parametrize("name", MODELS)
def test_six_tenths_of_everything(name, batches):
    model, tokens = language_model(name), batches[0]["input_ids"]
    flops, params = count_flops(Called(model), tokens), sum(each.numel() for each in model.parameters())
    prepared = balf_fx.prepare(model, batches[0])
    balf_fx.calibrate(prepared, batches, progress=False)
    for measure in ("flops", "params"):
        small = balf_fx.convert(prepared, **{measure: 0.6}, progress=False)
        report = balf_fx.report(small)
        assert report.flops_before == flops
        assert report.flops_after == count_flops(Called(small), tokens)
        assert report.params_after == sum(each.numel() for each in small.parameters())
        assert (report.flops_after / flops if measure == "flops" else report.params_after / params) <= 0.6
        experts = [row for row in report.sites if row.kind == "experts"]
        assert {row.name.rpartition(".")[2] for row in experts} == {"gate_up_proj", "down_proj"}
        assert {row.groups for row in experts} == {8 if name == "DeepseekV3" else 4}
        assert any(row.rank is not None for row in experts)
        routers = [row for row in report.refused if row.reason == Reason.ROUTER.value]
        assert len(routers) == len(experts) / 2
        assert torch.isfinite(small(**batches[1]).logits).all()


def compressed(implementation, batches, **options):
    options = {"effort": "fast", "progress": False, **options}
    return balf_fx.compile(language_model("Mixtral", implementation), batches, **options)


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_every_implementation_gives_the_same(experts, batches):
    grouped, other = (compressed(implementation, batches, flops=0.6) for implementation in ("grouped_mm", experts))
    assert max(balf_fx.report(small).flops_kept for small in (grouped, other)) <= 0.6
    ranks = balf_fx.plan(grouped).ranks
    if experts == "eager":
        assert balf_fx.plan(other).ranks == ranks
    else:  # which counts other FLOPs, and so has other ranks
        grouped, other = (compressed(each, batches, allocation=ranks) for each in ("grouped_mm", experts))
    torch.testing.assert_close(other(**batches[0]).logits, grouped(**batches[0]).logits, rtol=1e-3, atol=1e-3)


def test_the_best_effort_and_a_file(batches, tmp_path):
    model = language_model("Mixtral")
    small = balf_fx.compile(model, batches, flops=0.6, progress=False)
    report = balf_fx.report(small)
    assert report.flops_after == count_flops(Called(small), batches[0]["input_ids"]) <= 0.6 * report.flops_before
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", language_model("Mixtral"))
    assert torch.equal(loaded(**batches[1]).logits, small(**batches[1]).logits)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_the_backend(name, batches):
    model = language_model(name)
    options = {"flops": 0.6, "calibration_steps": len(batches), "effort": "fast", "progress": False, "inner": "eager"}
    compiled = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        for batch in (*batches, batches[0]):
            answer = compiled(**batch)
        report = balf_fx.report(compiled)
        assert report.flops_kept <= 0.6
        assert any(row.kind == "experts" and row.rank is not None for row in report.sites)
        small = balf_fx.compile(model, batches, flops=0.6, effort="fast", progress=False)
        torch.testing.assert_close(answer.logits, small(**batches[0]).logits, rtol=1e-3, atol=1e-3)
    torch.compiler.reset()
