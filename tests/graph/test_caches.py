"""A narrow cache stores the first features of each head, and returns all of them."""

import torch
from torch import nn

from balf_fx.graph.caches import NarrowCache, takes_cache


class Growing:
    """Keys and values of all positions."""

    keys = values = None

    def update(self, keys, values, layer):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], -2)
        self.values = values if self.values is None else torch.cat([self.values, values], -2)
        return self.keys, self.values

    def get_seq_length(self):
        return 0 if self.keys is None else self.keys.shape[-2]


class Attention(nn.Module):
    def forward(self, x, cache=None):
        return cache.update(x, 2 * x, 0), cache.get_seq_length()


def test_zeros_are_not_stored():
    cache, attention = Growing(), Attention()
    attention.register_forward_pre_hook(NarrowCache(None, 3), with_kwargs=True)
    x = torch.randn(2, 4, 5, 8)
    x[..., 3:] = 0
    for given in ({"cache": cache}, {"cache": cache}):
        (keys, values), length = attention(x, **given)
    assert cache.keys.shape == (2, 4, 10, 8)
    assert cache.values.shape == (2, 4, 10, 3)
    assert length == 10
    assert torch.equal(keys, torch.cat([x, x], -2))
    assert torch.equal(values, 2 * keys)


def test_other_arguments_and_pairs_of_caches_pass():
    pair = Growing()
    pair.cross_attention_cache = Growing()
    x = torch.randn(3)
    args, kwargs = NarrowCache(2, 3)(nn.Identity(), (x, pair), {"cache": pair, "scale": 2})
    assert args == (x, pair)
    assert kwargs == {"cache": pair, "scale": 2}


def test_attention_is_known_by_its_arguments():
    assert takes_cache(Attention())
    assert not takes_cache(nn.Linear(2, 2))
