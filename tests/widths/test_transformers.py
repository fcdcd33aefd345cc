"""The widths of transformers in `benchmarks/zoo.py`, without twins, and what is left when they are narrowed."""

from collections import Counter

import pytest
import torch
from architectures import rewritten
from families import make_redundant

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import Score

HIDDEN, POOLED, WIDE = ("channels", 128, 1), ("channels", 64, 1), ("channels", 256, 1)
QUERIES, VALUES = ("queries", 16, 4), ("values", 16, 4)
GROUPED = ("values", 16, 2)  # two heads of keys and values for four of queries
ATTENTION = (QUERIES, VALUES)
FOUND = {  # kind, features and heads of each width, worked out by hand for one layer
    "albert": (POOLED,),  # both layers have the same weights
    "bart": (HIDDEN, HIDDEN, *ATTENTION * 3),  # of the encoder, of the decoder, and between them
    "bert": (HIDDEN, POOLED, *ATTENTION),
    "bloom": (WIDE, *ATTENTION),
    "clip_text": (HIDDEN, *ATTENTION),
    "clip_vision": (HIDDEN, *ATTENTION),
    "convnext": (HIDDEN, WIDE),
    "deberta_v2": (HIDDEN, POOLED, VALUES),  # two products read its queries
    "deit": (HIDDEN, *ATTENTION),
    "dinov2": (WIDE, *ATTENTION),
    "gemma2": (HIDDEN, GROUPED),  # rotary embeddings fix the basis of queries and keys, here and below
    "gpt2": (WIDE, *ATTENTION),
    "gpt_neox": (HIDDEN, VALUES),
    "llama": (HIDDEN, GROUPED),
    "modernbert": (HIDDEN, VALUES),
    "opt": (HIDDEN, *ATTENTION),
    "phi": (HIDDEN, GROUPED),
    "phi3": (HIDDEN, GROUPED),
    "qwen3": (HIDDEN, GROUPED),
    "resnet": (*(("channels", 8, 1),) * 2, *(("channels", 16, 1),) * 2, ("channels", 64, 1)),  # and the last stream
    "segformer": (
        *(POOLED, HIDDEN),
        *(("queries", 32, 1), ("queries", 32, 2), ("values", 32, 1), ("values", 32, 2)),
    ),
    "siglip_vision": (HIDDEN, HIDDEN, *ATTENTION * 2),  # its head has both too
    "swin": (*(HIDDEN, WIDE) * 2, *ATTENTION * 2, *(("queries", 16, 2), ("values", 16, 2)) * 2),
    "t5_encoder": (HIDDEN, *ATTENTION),
    "vit": (HIDDEN, *ATTENTION),
    "whisper_encoder": (POOLED, HIDDEN, WIDE, *ATTENTION),  # the first of two convolutions, and what is pooled
    "xlnet": (HIDDEN, POOLED),  # its projections have weights of three dimensions
}
DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers")


@pytest.mark.parametrize("name", FOUND)
def test_the_widths_of_an_architecture(name, load_benchmark):
    transformers, zoo = pytest.importorskip("transformers"), load_benchmark("zoo_transformers")
    class_name, reads, options = zoo.TRANSFORMERS[name]
    options = {key: 1 if key in DEPTHS and name != "albert" else value for key, value in options.items()}
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**options)).eval().requires_grad_(False)
    subject = zoo.transformers_subject(name, {})
    prepared = balf_fx.prepare(model, subject.batch(2), factors="sensitivity")
    found = graph_record(prepared).widths
    assert Counter((width.kind, width.features, width.heads) for width in found) == Counter(FOUND[name])
    sizes = make_redundant(prepared)
    Score("svd")(prepared)
    whole, narrow = rewritten(prepared, {}), rewritten(prepared, sizes)
    fresh = subject.batch(3)
    if reads == "text" and name != "xlnet":  # whose export fixes the length
        fresh = {key: value[:, :11] for key, value in fresh.items()}
    expected, actual = (next(iter(graph_module(**fresh).values())) for graph_module in (whole, narrow))
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)
