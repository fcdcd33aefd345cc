"""The benchmark of compression and quantization measures what is stored and what is answered."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import fx, nn


@pytest.mark.slow
def test_both_are_measured_alone_and_together(load_benchmark, data_folder, tmp_path):
    pytest.importorskip("torchao")
    if torch.__version__ < (2, 12):
        pytest.skip("the quantizer finds no layers in what torch 2.8 to 2.11 export without strict=True")
    quantization, output = load_benchmark("quantization"), tmp_path / "results.json"
    models = ["--model", "resnet20", "--model", "stories", "--images", "32", "--effort", "fast", "--evaluate", "32"]
    arguments = [*models, "--data", str(data_folder), "--json", str(output)]
    result = CliRunner().invoke(quantization.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    convolutions, language = json.loads(output.read_text())["models"]
    assert (convolutions["flops"], language["params"]) == (0.6, 0.8)
    rows = {(row["variant"], row["quantization"]): row for row in convolutions["results"]}
    for variant in ("dense", "compressed"):
        assert rows[variant, "PT2E, int8"]["bytes"] < 0.35 * rows[variant, "none"]["bytes"]
        assert rows[variant, "FX graph mode, int8"]["bytes"] < 0.4 * rows[variant, "none"]["bytes"]
    assert rows["dense", "none"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["dense", "PT2E, int8"]["top1"] >= 80
    rows = {(row["variant"], row["quantization"]): row for row in language["results"]}
    for variant in ("dense", "compressed"):
        full, int8 = rows[variant, "none"], rows[variant, "int8 weights"]
        assert int8["bytes"] < 0.5 * full["bytes"]
        assert int8["perplexity"] == pytest.approx(full["perplexity"], rel=0.01)


def test_the_size_is_that_of_the_file(load_benchmark, tmp_path):
    model = nn.Linear(30, 20)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    size = load_benchmark("quantization").stored_bytes(model)
    assert size == pytest.approx((tmp_path / "weights.pth").stat().st_size, abs=200)  # the file's name is inside of it
    assert size > 4 * 30 * 20


def test_what_the_graph_does_not_read_is_dropped(load_benchmark):
    graph = fx.Graph()
    graph.output(graph.call_function(torch.mul, (graph.placeholder("x"), graph.get_attr("used"))))
    thin = fx.GraphModule({"used": nn.Parameter(torch.ones(3))}, graph)
    thin.add_module("layer", nn.Linear(3, 3))
    thin = load_benchmark("quantization").without_unread(thin)
    assert list(thin.state_dict()) == ["used"]
    assert torch.equal(thin(torch.full((3,), 2.0)), torch.full((3,), 2.0))


def test_tied_weights_are_left_alone(load_benchmark):
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    quantized = load_benchmark("quantization").LINEAR["int8 weights"](model, [])
    assert quantized[2].weight is quantized[0].weight
    assert type(quantized[1].weight.data) is not torch.Tensor
    assert type(model[1].weight.data) is torch.Tensor
