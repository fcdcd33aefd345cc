import copy
import json
import os
import pickle
import struct

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ConvNet
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import FileError, ModelError, OptionError, PassError, PlanError
from balf_fx.files.storage import read
from balf_fx.graph.plan import Plan


class Tied(nn.Module):
    """A token embedding whose weight is the output projection, and constants that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)
        self.register_buffer("scale", torch.rand(96) + 0.5, persistent=False)

    def forward(self, tokens, mask=None):
        x = self.embedding(tokens)
        x = x if mask is None else x * mask.unsqueeze(-1)
        x = x + self.down(self.scale * F.relu(self.up(x)))
        return {"logits": F.linear(x, self.embedding.weight), "hidden": x}


def fresh(model):
    """The same architecture with other weights; constants stay as they are."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.1)
    return other


@pytest.fixture
def small(conv_net, images):
    return balf_fx.compile(conv_net, images, flops=0.6, progress=False, effort="fast")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize(("effort", "capture"), [("fast", "symbolic_trace"), ("best", "export")])
@pytest.mark.parametrize("name", sorted(architectures.EVERYTHING))
def test_what_is_loaded_computes_the_same_bit_for_bit(name, effort, capture, path):
    model, batches = architectures.make(name)
    options = {"params": 0.7, "effort": effort, "capture": capture, "strict": False, "progress": False}
    small = balf_fx.compile(model, batches, **options)
    balf_fx.save(small, path)
    loaded = balf_fx.load(path, fresh(model))
    for batch in batches:
        assert torch.equal(loaded(batch), small(batch))
    assert balf_fx.report(loaded) == balf_fx.report(small)
    assert balf_fx.plan(loaded) == balf_fx.plan(small) == balf_fx.plan(path)
    assert {name: value.requires_grad for name, value in loaded.named_parameters()} == {
        name: value.requires_grad for name, value in small.named_parameters()
    }


@pytest.mark.parametrize("masked", [False, True])
def test_tied_weights_constants_and_keyword_arguments(masked, path):
    model = Tied().eval()
    batches = [{"tokens": torch.randint(0, 50, (4, 7))} for _ in range(3)]
    if masked:
        batches = [{**batch, "mask": torch.ones(4, 7)} for batch in batches]
    small = balf_fx.compile(model, batches, params=0.8, progress=False)
    balf_fx.save(small, path)
    loaded = balf_fx.load(path, fresh(model))
    one, other = small(**batches[0]), loaded(**batches[0])
    assert all(torch.equal(one[key], other[key]) for key in ("logits", "hidden"))
    assert len(list(loaded.parameters())) == len(list(small.parameters()))


def test_what_became_of_a_model_afterwards_is_saved_too(small, conv_net, images, path):
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.1)
    balf_fx.save(small.double(), path)
    loaded = balf_fx.load(path, conv_net)
    assert torch.equal(loaded(images[0].double()), small(images[0].double()))
    balf_fx.save(loaded, path)
    assert torch.equal(balf_fx.load(path, conv_net)(images[0].double()), small(images[0].double()))


def test_the_model_that_is_given_stays_as_it_is(small, path):
    balf_fx.save(small, path)
    model = ConvNet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balf_fx.load(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "balf_plan")


def test_copies_and_pickles_are_saved_as_well(small, conv_net, images, path):
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        balf_fx.save(other, path)
        assert torch.equal(balf_fx.load(path, conv_net)(images[0]), small(images[0]))


def test_an_example_takes_the_place_of_the_recorded_call(images, path):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ConvNet()

        def forward(self, image, options):
            return self.net(image) * options.factor

    class Options:
        factor = 2.0

    def forward(model, batch):
        return model(batch, Options())

    model = Called().eval()
    small = balf_fx.compile(model, images, flops=0.7, effort="fast", forward=forward, progress=False)
    balf_fx.save(small, path)
    with pytest.raises(PlanError, match="pass example="):
        balf_fx.load(path, model)
    loaded = balf_fx.load(path, fresh(model), example=images[0], forward=forward)
    assert torch.equal(forward(loaded, images[0]), forward(small, images[0]))


def test_another_architecture_is_refused(small, path):
    balf_fx.save(small, path)
    with pytest.raises(PlanError):
        balf_fx.load(path, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).eval())
    with pytest.raises(PlanError):
        balf_fx.load(path, ConvNet(width=24).eval())


def test_a_truncated_file_is_refused(small, conv_net, path):
    balf_fx.save(small, path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="truncated"):
            balf_fx.load(path, conv_net)


@pytest.mark.parametrize("where", ["tensors", "plan"])
def test_a_changed_file_is_refused(where, small, conv_net, path):
    balf_fx.save(small, path)
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    if where == "tensors":
        content[8 + header + 5] ^= 1
    else:
        start = content.index(b"distortion")
        content[start : start + 10] = b"distorsion"
    path.write_bytes(content)
    with pytest.raises(FileError, match="checksum"):
        balf_fx.load(path, conv_net)


def test_other_files_are_refused(conv_net, path):
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FileError, match=r"no plan: was it written by balf_fx\.save"):
        balf_fx.load(path, conv_net)
    torch.save(conv_net.state_dict(), path)
    with pytest.raises(FileError, match="not a safetensors file"):
        balf_fx.load(path, conv_net)
    with pytest.raises(FileError, match=r"nowhere\.safetensors cannot be read"):
        balf_fx.load(path.with_name("nowhere.safetensors"), conv_net)


def test_a_crash_while_writing_leaves_the_old_file_whole(small, conv_net, images, path, monkeypatch):
    balf_fx.save(small, path)
    before = path.read_bytes()

    def crash(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="full"):
        balf_fx.save(balf_fx.compile(conv_net, images, flops=0.9, effort="fast", progress=False), path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_places_where_no_file_can_be_are_refused(small, conv_net, tmp_path):
    for shard in (None, 100):
        with pytest.raises(FileError, match=r"there is no folder .*missing\. Make it first"):
            balf_fx.save(small, tmp_path / "missing" / "small.safetensors", shard=shard)
    with pytest.raises(FileError, match="is a folder: pass the name of a file"):
        balf_fx.save(small, tmp_path)
    for shard in (0.5, "0.5", "much"):
        with pytest.raises(OptionError, match="shard must be a number of bytes, such as 2147483648 or '2G', not"):
            balf_fx.save(small, tmp_path / "folder", shard=shard)
    assert not list(tmp_path.iterdir())
    for name in ("missing.json", "missing.safetensors", "missing"):
        with pytest.raises(FileError, match=f"{name} cannot be read"):
            balf_fx.plan(tmp_path / name)
    with pytest.raises(FileError, match="cannot be read"):
        balf_fx.load(tmp_path / "missing", conv_net)


@pytest.mark.parametrize("result", ["graph", "module"])
def test_a_file_is_read_for_a_module(conv_net, images, path, result):
    options = {"flops": 0.6, "effort": "fast", "progress": False, "result": result}
    balf_fx.save(balf_fx.compile(conv_net, images, **options), path)
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, not a str: load it first"):
        balf_fx.load(path, "conv_net")


def test_others_may_read_it_as_any_new_file(small, path, tmp_path):
    (tmp_path / "new").touch()
    balf_fx.save(small, path)
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_what_safetensors_cannot_hold_is_an_error(small, conv_net, path):
    with pytest.raises(PassError, match="no plan"):
        balf_fx.save(torch.fx.symbolic_trace(conv_net), path)
    small.stem.register_parameter("bias", nn.Parameter(torch.zeros(16).to_sparse()))
    with pytest.raises(FileError, match="not a plain tensor"):
        balf_fx.save(small, path)
    assert not path.exists()


def test_the_plan_can_be_read_without_the_model(small, path, tmp_path):
    balf_fx.save(small, path)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    metadata = json.loads(path.read_bytes()[8 : 8 + header])["__metadata__"]
    assert json.loads(metadata["balf_fx.plan"])["allocation"]["method"] == "budget"
    written = tmp_path / "plan.json"
    written.write_text(Plan.of(small).to_json())
    assert balf_fx.plan(written) == balf_fx.plan(str(path)) == Plan.of(small)


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_order_of_tensors_in_memory_is_kept(dimensions, effort, path):
    conv, layout = {2: (nn.Conv2d, torch.channels_last), 3: (nn.Conv3d, torch.channels_last_3d)}[dimensions]
    model = nn.Sequential(conv(4, 16, 3), nn.ReLU(), conv(16, 16, 1), nn.ReLU(), conv(16, 8, 3)).eval()
    batch = torch.randn(2, 4, *(7,) * dimensions)
    plain = balf_fx.compile(model, batch, flops=0.6, effort=effort, progress=False)
    model = model.to(memory_format=layout)
    small = balf_fx.compile(model, batch, flops=0.6, effort=effort, progress=False)
    balf_fx.save(small, path)
    loaded = balf_fx.load(path, fresh(model).to(memory_format=torch.contiguous_format))
    assert all(kernel.stride(1) == 1 for kernel in small.parameters() if kernel.dim() > 2)
    assert all(kernel.is_contiguous() and kernel.stride(-1) == 1 for kernel in plain.parameters())
    for copied in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert [p.stride() for p in copied.parameters()] == [p.stride() for p in small.parameters()]
        assert torch.equal(copied(batch), small(batch))


@pytest.mark.parametrize("shard", [1, 700, "1GiB"])
def test_a_folder_of_files_is_read_as_one_file(conv_net, small, tmp_path, shard):
    balf_fx.save(small, tmp_path / "small", shard=shard)
    held = [load_file(path) for path in (tmp_path / "small").glob("*.safetensors")]
    assert len(held) == (1 if shard == "1GiB" else len(small.state_dict()) if shard == 1 else len(held))
    assert (len(held) > 1) == (shard != "1GiB")
    if shard == 700:  # but for a tensor that is larger
        assert all(len(own) == 1 or sum(value.nbytes for value in own.values()) <= 700 for own in held)
    loaded = balf_fx.load(tmp_path / "small", fresh(conv_net))
    torch.testing.assert_close(loaded.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert balf_fx.plan(tmp_path / "small").to_json() == balf_fx.plan(small).to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == small.state_dict().keys()
    with pytest.raises(FileError, match="small exists already: pass the path of a new folder"):
        balf_fx.save(small, tmp_path / "small", shard=shard)


def test_a_folder_that_is_not_as_it_was_written_is_refused(conv_net, small, images, tmp_path):
    other = balf_fx.compile(conv_net, images, flops=0.5, progress=False, effort="fast")
    balf_fx.save(small, tmp_path / "small", shard=2000)
    balf_fx.save(other, tmp_path / "other", shard=2000)
    first = min((tmp_path / "small").glob("*.safetensors"))
    written = min((tmp_path / "other").glob("*.safetensors"))
    first.write_bytes(written.read_bytes())
    with pytest.raises(FileError, match="are not those of one model: some have been replaced"):
        balf_fx.load(tmp_path / "small", conv_net)
    (tmp_path / "small" / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match=r"has no model.safetensors.index.json that balf_fx.save has written"):
        balf_fx.load(tmp_path / "small", conv_net)
    with pytest.raises(OptionError, match="shard must be a number of bytes"):
        balf_fx.save(small, tmp_path / "again", shard="many")


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(40, 48), nn.Linear(48, 96), nn.Linear(96, 48)
        self.head = nn.Linear(48, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def test_weights_that_differ_do_not_load_into_tied_ones(path):
    batches, options = [torch.randint(40, (4, 10)) for _ in range(3)], {"effort": "fast", "result": "module"}
    small = balf_fx.compile(Language(False).eval(), batches, params=0.9, exclude=["head"], progress=False, **options)
    balf_fx.save(small, path)
    with pytest.raises(PlanError, match=r"embedding\.weight and head\.weight are one tensor in this model, but differ"):
        balf_fx.load(path, Language(True).eval())
    assert torch.equal(balf_fx.load(path, Language(False).eval())(batches[0]), small(batches[0]))


def test_files_are_read_to_the_cpu_whatever_the_default_device(conv_net, images, path):
    channels_last = conv_net.to(memory_format=torch.channels_last)
    small = balf_fx.compile(channels_last, images, flops=0.6, effort="fast", progress=False)
    balf_fx.save(small, path)
    with torch.device("meta"):
        found = read(path).tensors
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in found.items())
