"""Names that a GraphModule reserves, and words of Python."""

import copy
import pickle

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.capture.names import legal_path
from balf_fx.capture.normal_form import capture
from balf_fx.errors import CaptureError

X = torch.randn(20, 16)


class Named(nn.Module):
    def __init__(self, *names) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(16, 16))
        self.heads = nn.ModuleDict({"class": nn.Linear(16, 16), "lambda": nn.BatchNorm1d(16)})
        self.register_parameter("global", nn.Parameter(torch.ones(16)))
        self.register_buffer("import", torch.ones(16))

    def forward(self, x):
        for name, module in self.named_children():
            x = x if name == "heads" else module(x).relu()
        x = self.heads["lambda"](self.heads["class"](x))
        return x * self._parameters["global"] + self._buffers["import"]


@pytest.mark.parametrize("names", [("code",), ("graph", "meta"), ("recompile", "training_"), ("class", "class_")])
def test_any_name_of_a_submodule_is_possible(names, tmp_path):
    model = Named(*names).eval()
    dense = balf_fx.compile(model, X, params=1.0, effort="fast", progress=False)
    torch.testing.assert_close(dense(X), model(X))
    small = balf_fx.compile(model, X, params=0.9, effort="fast", progress=False)
    balf_fx.save(small, tmp_path / "small.safetensors")
    others = (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        balf_fx.load(tmp_path / "small.safetensors", model),
    )
    for other in others:
        assert torch.equal(other(X), small(X))
        assert list(other.state_dict()) == list(small.state_dict())


def test_other_names_stay():
    model = Named("code", "code_", "block").eval()
    found = list(capture(model, X).state_dict())
    assert {"code__.weight", "code_.weight", "block.weight", "heads.class_.weight", "global_", "import_"} <= set(found)
    assert "code.weight" in model.state_dict()
    assert legal_path("code.graph.lambda") == "code_.graph.lambda_"


def test_torch_export_has_a_word_on_it():
    with pytest.raises(CaptureError, match="no module called 'code'"):
        capture(Named("code").eval(), X, method="export")
