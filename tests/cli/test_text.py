"""Language models of transformers: calibrated on a text, compressed into a folder, and judged by their perplexity."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tokenizers
import transformers
from click.testing import CliRunner
from small_models import TINY_TEXT
from torch.nn import functional as F

from balf_fx.cli.main import main
from balf_fx.cli.text import open_text
from balf_fx.errors import CalibrationError, OptionError

WORDS = [
    "<unk>",
    *[
        "a",
        "the",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "in",
        "mat",
        "hat",
        "and",
        "then",
        "it",
        "was",
        "very",
        "big",
        "small",
        "red",
        "blue",
    ],
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a language model, its tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    words = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained("model")
    options = {**TINY_TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    model.save_pretrained("model")
    Path("data.txt").write_text(" ".join(random.Random(0).choices(WORDS[1:], k=1000)))
    return model


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


COMMON = ("hf:model", "--text", "data.txt", "--length", "10", "--samples", "60", "--effort", "fast", "-q")


def test_a_folder_becomes_a_smaller_folder(work):
    result = invoke("compress", *COMMON, "--flops", "0.7", "--output", "small")
    assert result.exit_code == 0, result.output
    assert "saved as small" in result.output
    small = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in work.parameters())
    written = transformers.pipeline("text-generation", "small")("the cat", max_new_tokens=3, do_sample=False)
    assert written[0]["generated_text"].startswith("the cat")


def test_a_sweep_has_the_perplexity_of_what_was_not_calibrated_on(work):
    result = invoke("sweep", *COMMON, "--budgets", "0.8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    text = open_text(Path("data.txt"), "hf:model", work, 10)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[60:]
    tokens = text.tokens[order]
    with torch.no_grad():
        logits = work(tokens).logits[:, :-1].flatten(0, 1)
    assert found["perplexity"] == pytest.approx(float(F.cross_entropy(logits, tokens[:, 1:].flatten()).exp()), rel=1e-5)
    assert found["points"][0]["perplexity"] > 1
    assert found["samples"] == 40


def test_a_text_is_one_stream_of_tokens(work):
    text = open_text(Path("data.txt"), "hf:model", work, 30)
    assert text.tokens.shape == (33, 30)
    assert [WORDS[index] for index in text.tokens.flatten()[:20]] == Path("data.txt").read_text().split()[:20]
    assert open_text(Path("data.txt"), "hf:model", work, 1000).tokens.shape == (15, 64)  # the model has no more
    Path("short.txt").write_text("the cat")
    Path("empty").mkdir()
    with pytest.raises(CalibrationError, match="fewer than one sequence"):
        open_text(Path("short.txt"), "hf:model", work, 30)
    with pytest.raises(OptionError, match="only models of transformers"):
        open_text(Path("data.txt"), "timm:resnet18", work, 30)
    with pytest.raises(OptionError, match="there is no tokenizer"):
        open_text(Path("data.txt"), "hf:empty", work, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "hf:model", "--flops", "0.7", "-o", "small"), "needs --data or, for a language model, --text"),
        (("compress", *COMMON, "--data", "model", "--flops", "0.7", "-o", "small"), "pass one of them"),
        (("compress", *COMMON, "--flops", "0.7", "--result", "graph", "-o", "small"), "a folder holds a model"),
        (("compress", *COMMON, "--flops", "0.7", "-o", "small.pt"), "does not end in .safetensors"),
    ],
)
def test_wrong_usage(work, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
