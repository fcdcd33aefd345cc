"""The benchmark of fine-tuning measures models before and after both ways of training."""

import json

import pytest
from click.testing import CliRunner


@pytest.fixture
def finetune(load_benchmark):
    for module in ("peft", "sklearn"):
        pytest.importorskip(module)
    return load_benchmark("finetune")


def test_models_are_measured_before_and_after(finetune, monkeypatch, tmp_path):
    case, options = next(iter(finetune.CASES.items()))
    monkeypatch.setattr(finetune, "CASES", {case: options})
    output = tmp_path / "results.json"
    arguments = ["--epochs", "4", "--tune", "2", "--json", str(output)]
    result = CliRunner().invoke(finetune.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    (row,) = found["results"]
    assert found["images"] == 597
    assert row["case"] == case
    assert row["flops_kept"] <= options["flops"]
    assert row["compressed"] < min(row["trained"], row["adapted"], found["dense"])


def test_adapters_alone_are_trained(finetune, conv_net, images):
    small = finetune.balf_fx.compile(conv_net, images, flops=0.5, effort="fast", progress=False)
    adapted = finetune.with_adapters(small)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(parameter.requires_grad for parameter in small.parameters())
