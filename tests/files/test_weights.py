"""Weights from safetensors files are those of a model that has them in memory, and stay in their files."""

import json

import pytest
import torch
from architectures import Mlp, make
from safetensors.torch import save_file
from small_models import TINY_TEXT
from torch import nn

import balf_fx
from balf_fx.calibration.pages import Pages
from balf_fx.errors import FileError, ModelError, OptionError
from balf_fx.files.weights import read_tensors, with_weights

pytestmark = pytest.mark.cpu


class Tied(nn.Module):
    """Two names of one weight, of which files have one, and buffers, one of which is in no file."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.rand(16) + 0.5)
        self.register_buffer("shift", torch.arange(16.0), persistent=False)

    def forward(self, x):
        return self.head(self.layer(self.table(x)) * self.scale + self.shift)


def without_weights(build):
    """A model whose parameters, not its buffers, are on the meta device."""
    model = build().eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    return model


def tied_without_weights():
    model = without_weights(Tied)
    model.head.weight = model.table.weight
    return model


def write(model, folder, shards=1):
    """Save a model in so many files, with an index if there are several."""
    folder.mkdir(exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if isinstance(model, Tied):
        del tensors["head.weight"]
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_are_read_as_they_were_written(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(2, 1, 7).to(dtype), "d": torch.ones(()).to(dtype)}
    tensors["empty"] = torch.zeros(0, 4, dtype=dtype)
    save_file(tensors, tmp_path / "x.safetensors", {"some": "metadata"})
    found = read_tensors(tmp_path / "x.safetensors", Pages())
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in tensors.items()
    }
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_has_the_weights_of_its_files(tmp_path, shards):
    torch.manual_seed(1)
    model = Tied().eval()
    blank = tied_without_weights()
    found, pages = with_weights(blank, write(model, tmp_path, shards))
    assert found.head.weight is found.table.weight
    assert all(pages.has(parameter) for parameter in found.parameters())
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randint(30, (2, 5))
    assert torch.equal(found(x), model(x))
    assert all(parameter.is_meta for parameter in blank.parameters())


@pytest.mark.parametrize("result", ["graph", "module"])
def test_the_compressed_model_is_that_of_weights_in_memory(tmp_path, result):
    torch.manual_seed(1)
    model, batches = Tied().eval(), list(torch.randint(30, (3, 8, 6)))
    folder, blank = write(model, tmp_path / "weights", 2), tied_without_weights()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = {"params": 0.85, "effort": "fast", "progress": False, "result": result}
    small = balf_fx.compile(model, batches, **options)
    lazy = balf_fx.compile(blank, batches, safetensors=folder, memory="1GiB", **options)
    assert balf_fx.plan(small).ranks == balf_fx.plan(lazy).ranks
    assert set(balf_fx.plan(small).ranks.values()) != {None}
    torch.testing.assert_close(lazy.state_dict(), small.state_dict())
    assert all(parameter.is_meta for parameter in blank.parameters())
    with torch.no_grad():
        for parameter in lazy.parameters():
            parameter.zero_()  # the result is the user's, the files are not
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_factors_of_every_kind_and_conversion_take_weights_from_files(tmp_path):
    torch.manual_seed(1)
    model, batches = make("mlp")
    folder = write(model, tmp_path)
    torch.manual_seed(2)
    blank = without_weights(lambda: make("mlp")[0])
    plain = balf_fx.compile(model, batches, params=0.7, progress=False)
    lazy = balf_fx.compile(blank, batches, params=0.7, progress=False, safetensors=folder)
    torch.testing.assert_close(lazy.state_dict(), plain.state_dict())
    prepared = balf_fx.prepare(blank, batches[0], safetensors=folder, result="module")
    balf_fx.calibrate(prepared, batches, progress=False)
    options = {"params": 0.7, "effort": "fast", "progress": False, "result": "module"}
    again = balf_fx.convert(prepared, model=blank, safetensors=folder, **options)
    plain = balf_fx.compile(model, batches, **options)
    assert type(again) is type(model)
    assert balf_fx.plan(again).ranks == balf_fx.plan(plain).ranks
    torch.testing.assert_close(again.state_dict(), plain.state_dict())


def test_new_layers_are_in_files_too(tmp_path, monkeypatch):
    kept, plain = [], Pages.keep

    def keep(self, module):
        plain(self, module)
        kept.extend(self.has(parameter) for parameter in module.parameters())

    monkeypatch.setattr(Pages, "keep", keep)
    model, batches = make("transformer")
    folder = write(model, tmp_path)
    blank = without_weights(lambda: make("transformer")[0])
    balf_fx.compile(blank, batches, params=0.7, effort="fast", progress=False, safetensors=folder)
    assert kept
    assert all(kept)


def test_a_model_that_does_not_fit_is_refused(tmp_path):
    model, batches = make("mlp")
    folder = write(model, tmp_path)
    blank, other = (without_weights(lambda hidden=hidden: Mlp(hidden=hidden)) for hidden in (32, 16))
    with pytest.raises(ModelError, match=r"up \(Linear\) is on the meta device: load its weights first, or pass safet"):
        balf_fx.compile(blank, batches, params=0.7)
    for given, message in (
        (model, r"up.weight has values already, on cpu: safetensors= is for a model on the meta device"),
        (other, r"up.weight has shape \(16, 12\) in the model, \(32, 12\) in safetensors="),
    ):
        with pytest.raises(ModelError, match=message):
            balf_fx.compile(given, batches, params=0.7, safetensors=folder)
    blank.extra = nn.Linear(3, 3, device="meta")
    with pytest.raises(FileError, match=r"has no extra.weight, extra.bias: is it a checkpoint of this architecture\?"):
        balf_fx.compile(blank, batches, params=0.7, safetensors=folder)
    with pytest.raises(OptionError, match="'safetensors' is not an option here: the model runs, so it must have its"):
        torch.compile(model, backend="balf", options={"params": 0.7, "safetensors": folder})(batches[0])


def test_files_that_are_damaged_are_refused(tmp_path):
    save_file({"a": torch.ones(8)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    damaged = {"text": b"some text that is no header", "cut": whole[:-8], "short": whole[:4], "other": whole[8:]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=f"{name} is truncated or not a safetensors file"):
            read_tensors(tmp_path / name, Pages())
    with pytest.raises(FileError, match=r"nothing cannot be read: No such file"):
        read_tensors(tmp_path / "nothing", Pages())
    with pytest.raises(FileError, match="has no safetensors files"):
        read_tensors(tmp_path, Pages())
    for text in ("{}", "[]", '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(FileError, match=r"index.json is not an index of safetensors files"):
            read_tensors(tmp_path, Pages())


def test_a_buffer_without_values_is_refused(tmp_path):
    folder = write(Tied(), tmp_path)
    with torch.device("meta"):
        blank = Tied().eval()
    with pytest.raises(
        ModelError, match=r"has no shift, which the model computes when it is made: .* accelerate.init_emp"
    ):
        with_weights(blank, folder)


def test_a_language_model_goes_from_its_folder_to_another_one(tmp_path):
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(**TINY_TEXT, tie_word_embeddings=True, use_cache=False)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "weights", max_shard_size="20KB")
    with accelerate.init_empty_weights():
        blank = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": ids} for ids in torch.randint(96, (3, 4, 8))]
    options = {"params": 0.8, "effort": "fast", "progress": False, "result": "module"}
    lazy = balf_fx.compile(blank, batches, safetensors=tmp_path / "weights", memory=1, **options)
    torch.testing.assert_close(lazy.state_dict(), balf_fx.compile(model, batches, **options).state_dict())
    lazy.save_pretrained(tmp_path / "small")
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(small(**batches[0]).logits, lazy(**batches[0]).logits)


@pytest.mark.parametrize("spaces", range(4))
def test_files_of_other_writers_are_not_aligned(tmp_path, spaces):
    value = torch.randn(3, 5, dtype=torch.float64)
    header = json.dumps({"a": {"dtype": "F64", "shape": [3, 5], "data_offsets": [0, 120]}}) + " " * spaces
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + value.numpy().tobytes())
    found = read_tensors(path, Pages())["a"]
    assert torch.equal(found, value)
