import pytest
import torch
from torch import fx, nn

from balf_fx.graph.annotation import annotate
from balf_fx.graph.flops import profile
from balf_fx.graph.masks import OTHER, argument_name, main_mask, mask_inputs, mask_names


class Translator(nn.Module):
    """An encoder of the width of the decoder, and cross-attention without the softmax."""

    def __init__(self):
        super().__init__()
        self.encoder, self.own, self.cross, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.table = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Linear(6, 6)

    def forward(self, x, attention_mask, decoder_x, decoder_attention_mask):
        hidden = self.encoder(x) * attention_mask[..., None]
        own = self.own(decoder_x) * decoder_attention_mask[..., None]
        keys = self.cross(hidden)
        return self.head(own @ keys.mT @ hidden) + self.bias(self.table).sum() + x.size(1)


def named(graph_module):
    names = mask_names(graph_module)
    return {node.name: names.get(node) for node in graph_module.graph.nodes if node.op == "call_module"}


def test_a_value_has_the_mask_of_the_inputs_that_it_depends_on():
    graph_module = fx.symbolic_trace(Translator())
    values = [torch.randn(2, 4, 6), torch.ones(2, 4), torch.randn(2, 4, 6), torch.ones(2, 4)]
    profile(graph_module, values)
    own, decoder = "attention_mask", "decoder_attention_mask"
    assert named(graph_module) == {"encoder": own, "own": decoder, "cross": own, "head": decoder, "bias": None}
    assert list(mask_inputs(graph_module)) == [own, decoder]
    assert main_mask(graph_module) == decoder


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.both = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, pixels, hidden, attention_mask):
        return self.both(self.image(pixels) @ self.text(hidden * attention_mask[..., None]).mT)


def test_an_image_has_not_the_mask_of_the_text():
    graph_module = fx.symbolic_trace(Vision())
    profile(graph_module, [torch.randn(2, 9, 6), torch.randn(2, 6, 6), torch.ones(2, 6)])
    assert named(graph_module) == {"image": OTHER, "text": "attention_mask", "both": "attention_mask"}


def test_a_graph_without_a_mask_may_be_given_one():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6)))
    assert named(graph_module) == {"_0": "attention_mask"}
    assert mask_inputs(graph_module) == {}
    assert main_mask(graph_module) == "attention_mask"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("attention_mask", "attention_mask"),
        ("L_attention_mask_", "attention_mask"),
        ("L_kwargs_attention_mask_", "attention_mask"),
        ("l_kwargs_decoder_attention_mask_", "decoder_attention_mask"),
        ("pixel_attention_mask", "pixel_attention_mask"),
        ("x", "x"),
    ],
)
def test_arguments_are_known_by_the_names_that_captures_give_them(target, name):
    node = fx.Graph().placeholder(target)
    annotate(node, shape=(2, 3))
    assert argument_name(node) == name
