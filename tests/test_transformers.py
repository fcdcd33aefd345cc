"""Compressed models of Hugging Face's transformers are called as these are, and answer as these do."""

from __future__ import annotations

import pickle

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx
from balf_fx.engine import tempering
from balf_fx.errors import CaptureError

transformers = pytest.importorskip("transformers")

WORDS, TOKENS = TINY_TEXT["vocab_size"], 8


def language_model(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY_TEXT, num_key_value_heads=2, initializer_range=0.2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def classifier(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY_TEXT, num_labels=3, initializer_range=0.2, **options)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(WORDS, (16, TOKENS))


@pytest.fixture
def encoded(tokens):
    """What a tokenizer returns, with padding."""
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (16, 1))).long()
    return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": mask})


def compress(model, batches, **options):
    return balf_fx.compile(model, batches, **{"params": 1.0, "effort": "fast", "progress": False, **options})


def test_a_classifier_answers_as_the_model_does(encoded):
    model = classifier()
    small = compress(model, [encoded])
    some = {key: value[:5] for key, value in encoded.items()}
    want, got = model(**some), small(**some)
    assert type(got) is type(want)
    assert list(got.keys()) == list(want.keys()) == ["logits"]
    for answer in (got.logits, got["logits"], got[0], got.to_tuple()[0]):
        torch.testing.assert_close(answer, want.logits)
    copied = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(copied(**some).logits, want.logits)


@pytest.mark.parametrize("make", [classifier, lambda: language_model(use_cache=False)], ids=["BERT", "Llama"])
def test_the_default_effort_stays_near_the_model(make, encoded):
    model = make()
    small = compress(model, [encoded], params=None, flops=0.7, effort="best")
    assert balf_fx.report(small).flops_kept <= 0.7
    want, got = model(**encoded).logits, small(**encoded).logits
    assert (got - want).norm() < 0.5 * (want - want.mean(0)).norm()


def test_a_language_model_leaves_its_cache_out(tokens):
    model = language_model()
    with pytest.raises(CaptureError, match=r"an output is of type DynamicCache.*model\(\*\*batch, use_cache=False\)"):
        compress(model, [{"input_ids": tokens}])
    small = compress(model, [{"input_ids": tokens}], forward=lambda model, batch: model(**batch, use_cache=False))
    want = model(input_ids=tokens, use_cache=False)
    for got in (small(tokens), small(input_ids=tokens), small(input_ids=tokens, use_cache=False)):
        assert type(got) is type(want)
        assert got.past_key_values is None
        torch.testing.assert_close(got.logits, want.logits)
    with pytest.raises(AssertionError, match="'use_cache' was False when the graph was captured"):
        small(input_ids=tokens, use_cache=True)


def test_with_labels_in_the_batches_the_result_returns_the_loss(tokens):
    model = language_model(use_cache=False)
    small = compress(model, [{"input_ids": tokens, "labels": tokens}])
    some = tokens[:5]
    want, got = model(input_ids=some, labels=some), small(input_ids=some, labels=some)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits)
    with pytest.raises(TypeError, match="labels"):
        small(input_ids=some)


@pytest.mark.parametrize("length", [2, 5, 13])
def test_sequences_may_have_any_length(tokens, length):
    model = language_model(use_cache=False)
    whole, small = (compress(model, [{"input_ids": tokens}], params=share) for share in (1.0, 0.6))
    other = torch.randint(WORDS, (3, length))
    torch.testing.assert_close(whole(input_ids=other).logits, model(input_ids=other).logits)
    longer = small(input_ids=torch.cat([other, other], 1)).logits
    torch.testing.assert_close(small(input_ids=other).logits, longer[:, :length])  # what follows is not seen


@pytest.mark.parametrize("captured", [3, 8])
def test_attention_to_the_last_few_tokens_alone_stays_so_at_any_length(captured):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TINY_TEXT, num_key_value_heads=2, sliding_window=5, use_cache=False)
    model = transformers.MistralForCausalLM(config).eval()
    graph_module = compress(model, [{"input_ids": torch.randint(WORDS, (16, captured))}])
    for length in (2, 4, 5, 6, 12):
        tokens = torch.randint(WORDS, (3, length))
        torch.testing.assert_close(graph_module(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_lengths_that_the_model_does_not_know_are_refused(encoded):
    small = compress(classifier(max_position_embeddings=12), [encoded])
    for length in (1, 13):
        batch = {"input_ids": torch.zeros(2, length, dtype=torch.int64), "attention_mask": torch.ones(2, length)}
        with pytest.raises(AssertionError, match="has 2 to 12 in dimension 1"):
            small(**batch)


def test_batches_of_several_lengths_calibrate(tokens):
    batches = [{"input_ids": tokens[:, :length]} for length in (8, 5, 6)]
    small = compress(language_model(use_cache=False), batches, params=0.7, effort="best")
    assert torch.isfinite(small(input_ids=tokens).logits).all()


def test_adapters_on_the_factors_of_a_language_model_train(tokens):
    peft = pytest.importorskip("peft")
    batch = {"input_ids": tokens, "labels": tokens}
    small = compress(language_model(use_cache=False), [batch], params=None, flops=0.5)
    names = list(balf_fx.report(small).factor_layers)
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=4, target_modules=names))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = adapted(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, adapted(**batch).logits)


def test_a_file_is_loaded_into_a_model_made_from_its_configuration(tokens, tmp_path):
    model, batches = language_model(), [{"input_ids": tokens}]
    small = compress(model, batches, params=0.7, forward=lambda net, batch: net(**batch, use_cache=False))
    balf_fx.save(small, tmp_path / "small.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    loaded = balf_fx.load(tmp_path / "small.safetensors", other)
    assert torch.equal(loaded(input_ids=tokens).logits, small(input_ids=tokens).logits)


@pytest.mark.parametrize("result", ["graph", "module"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_language_models_have_one_factor(tied, result, monkeypatch, tmp_path):
    """It goes into the head, or the norm before a tied one, and folders hold it."""
    monkeypatch.setattr(tempering, "closest_to_one", lambda *_: 0.7)
    model = language_model(tie_word_embeddings=tied, use_cache=result == "module")
    batches = [{"input_ids": torch.randint(WORDS, (32, TOKENS))} for _ in range(2)]
    options = {"params": 0.8, "effort": "balanced", "result": result}
    plain, small = (compress(model, batches, temperature=each, **options) for each in (False, None))
    with torch.no_grad():
        logits = small(**batches[0]).logits
        torch.testing.assert_close(logits, 0.7 * plain(**batches[0]).logits, rtol=1e-4, atol=1e-4)
        if result == "module":
            small.save_pretrained(tmp_path)
            again = type(model).from_pretrained(tmp_path)
            assert torch.equal(again(**batches[0]).logits, logits)
            assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
