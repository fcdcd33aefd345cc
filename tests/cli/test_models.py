"""Models by name: the library's own model, its weights, and errors that say what to do."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("PIL")

from balf_fx.cli.data import Preprocessing
from balf_fx.cli.models import default_preprocessing, load_model, needs_weights
from balf_fx.errors import MissingExtraError, ModelError, OptionError

FACTORY = """
import torch

def net():
    return torch.nn.Linear(4, 3)

class Holder:
    net = net

def broken():
    return torch.nn.Linear(4)

def number():
    return 5
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """The name of a module of the user's."""
    (tmp_path / "balf_fx_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "balf_fx_factory"
    sys.modules.pop("balf_fx_factory", None)


@pytest.fixture
def vit(tmp_path):
    """A folder as transformers writes it, and the model in it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model


def assert_same_weights(model, wanted):
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())


def test_torchvision_and_timm_build_their_own_models():
    models = pytest.importorskip("torchvision").models
    timm = pytest.importorskip("timm")
    for name, wanted in (
        ("torchvision:squeezenet1_1", models.SqueezeNet),
        ("timm:test_vit", type(timm.create_model("test_vit"))),
    ):
        model = load_model(name)
        assert type(model) is wanted
        assert not model.training
        assert needs_weights(name)


def test_pretrained_asks_the_library_for_its_weights(monkeypatch):
    asked = []
    models = SimpleNamespace(get_model=lambda name, weights: asked.append((name, weights)) or nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    load_model("torchvision:net", pretrained=True)
    load_model("torchvision:net")
    assert asked == [("net", "DEFAULT"), ("net", None)]


def test_a_factory_of_the_user_is_called(factory):
    model = load_model(f"{factory}:net")
    assert isinstance(model, nn.Linear)
    assert not model.training
    assert isinstance(load_model(f"{factory}:Holder.net"), nn.Linear)
    assert not needs_weights(f"{factory}:net")


def test_transformers_loads_the_class_with_the_head(vit):
    folder, wanted = vit
    model = load_model(f"hf:{folder}")
    assert type(model) is type(wanted)
    assert_same_weights(model, wanted)
    assert default_preprocessing(f"hf:{folder}", model) == Preprocessing(16, 16)


def test_transformers_can_do_without_weights_of_its_own(vit):
    folder, wanted = vit
    (folder / "model.safetensors").unlink()
    save_file(wanted.state_dict(), folder.parent / "apart.safetensors")
    assert_same_weights(load_model(f"hf:{folder}", folder.parent / "apart.safetensors"), wanted)
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(f"hf:{folder}")


def test_the_image_processor_of_a_folder_is_followed(vit):
    transformers = pytest.importorskip("transformers")
    folder, model = vit
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    wanted = Preprocessing(16, 16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert default_preprocessing(f"hf:{folder}", model) == wanted


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".safetensors", lambda state: state),
        (".pt", lambda state: state),
        (".pth", lambda state: {"state_dict": state, "epoch": 3}),
        (".pt", lambda state: {f"module.{name}": value for name, value in state.items()}),
    ],
)
def test_weights_come_from_a_file(factory, tmp_path, suffix, wrap):
    wanted, path = nn.Linear(4, 3), tmp_path / f"weights{suffix}"
    state = wrap(wanted.state_dict())
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_same_weights(load_model(f"{factory}:net", path), wanted)


def test_weights_are_never_unpickled_as_code(factory, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="cannot read weights"):
        load_model(f"{factory}:net", tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_damaged_weights_are_an_error(factory, tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot read weights"):
        load_model(f"{factory}:net", tmp_path / name)


@pytest.mark.parametrize(
    ("value", "message"), [(nn.Linear(5, 3).state_dict(), "does not fit"), ([1, 2], "no state dict")]
)
def test_weights_of_something_else_are_an_error(factory, tmp_path, value, message):
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=message):
        load_model(f"{factory}:net", tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["resnet18", ":resnet18", "torchvision:", "no_such_module:net"])
def test_what_names_nothing_is_an_error(name):
    with pytest.raises(OptionError, match="torchvision:NAME"):
        load_model(name)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_unknown_names_are_an_error(source):
    pytest.importorskip(source)
    with pytest.raises(OptionError, match=rf"Unknown model.*{source}.*list_models"):
        load_model(f"{source}:no_such_model")


def test_factories_that_fail_are_an_error(factory):
    with pytest.raises(ModelError, match="failed, TypeError"):
        load_model(f"{factory}:broken")
    with pytest.raises(ModelError, match="returned int"):
        load_model(f"{factory}:number")
    with pytest.raises(OptionError, match="only torchvision and timm"):
        load_model(f"{factory}:net", pretrained=True)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file", "net.pt"), ImportError("no module 'fast'")])
def test_factories_that_miss_a_file_or_a_library_are_an_error(monkeypatch, error):
    def net():
        raise error

    monkeypatch.setitem(sys.modules, "balf_fx_missing", SimpleNamespace(net=net))
    with pytest.raises(ModelError, match=rf"balf_fx_missing:net\(\) failed, {type(error).__name__}: "):
        load_model("balf_fx_missing:net")


@pytest.mark.parametrize(("source", "function"), [("torchvision", "models.get_model"), ("timm", "create_model")])
def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch, source, function):
    library = pytest.importorskip(source)

    def offline(*args, **options):
        raise URLError("no network")

    owner = library.models if source == "torchvision" else library
    monkeypatch.setattr(owner, function.rpartition(".")[2], offline)
    with pytest.raises(ModelError, match=r"cannot download the weights of resnet18: .*no network.* as --weights"):
        load_model(f"{source}:resnet18", pretrained=True)


def test_two_sources_of_weights_are_one_too_many(tmp_path):
    with pytest.raises(OptionError, match="drop one"):
        load_model("torchvision:resnet18", tmp_path / "weights.pt", pretrained=True)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r'pip install "balf-fx\[cli\]"'):
        load_model("timm:test_vit")


def test_libraries_know_how_their_images_are_prepared():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    found = default_preprocessing("torchvision:resnet18", nn.Identity())
    assert found == Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    name = "timm:vit_tiny_patch16_224"
    half = (0.5, 0.5, 0.5)
    assert default_preprocessing(name, load_model(name)) == Preprocessing(224, 248, half, half, "bicubic")
    assert default_preprocessing("torchvision:fcn_resnet50", nn.Identity()) == Preprocessing()
    assert default_preprocessing("mine:net", nn.Identity()) == Preprocessing()
