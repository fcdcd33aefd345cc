"""A small Llama learns from a teacher, and is compressed by methods that differ as they say."""

import pytest
import torch


@pytest.fixture
def llama(load_benchmark):
    pytest.importorskip("transformers")
    return load_benchmark("llama")


def test_training_follows_the_teacher_and_only_mlps_become_narrower(llama):
    model = llama.build(width=24, hidden=48, layers=1)
    tokens = torch.randint(1, 512, (16, 12))
    wanted = torch.full((512,), -8.0).index_fill(0, torch.arange(4), 4.0)
    repeated = torch.randint(0, 4, (3, 1, 12))
    before = llama.perplexity(model, repeated)
    llama.train(model, lambda batch: wanted.expand(*batch.shape, -1), tokens, epochs=20)
    assert not model.training
    assert llama.perplexity(model, repeated) < 0.1 * before
    nats = llama.next_token(model(input_ids=repeated[0]), {"input_ids": repeated[0]})
    assert float(nats.exp()) == pytest.approx(llama.perplexity(model, repeated[:1]), rel=1e-5)

    small = llama.compress(model, [{"input_ids": tokens}], "mlp", 0.95)
    assert small.num_parameters() <= 0.95 * model.num_parameters()
    old = dict(model.named_parameters())
    changed = {name for name, value in small.named_parameters() if name not in old or value.shape != old[name].shape}
    assert changed
    assert all(".mlp." in name for name in changed)
