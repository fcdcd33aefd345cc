"""Fixtures that several test files use: small models, the folder of real data, and benchmarks."""

from __future__ import annotations

import gc
import importlib
import os
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import hypothesis
import pytest
import torch
from small_models import ConvNet, randomise_batchnorm
from torch import nn

hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")

RANDOM_MODELS = 24
_GENERATOR = torch.Generator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", type=int, help="How many new random models to draw, in place of the fixed ones.")
    parser.addoption("--first", type=int, help="The seed of the first of them; by default, another one each time.")
    parser.addoption("--device", type=torch.device, help="Where models and values are made, such as cuda, not the CPU.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_seed" in metafunc.fixturenames:
        count, first = metafunc.config.getoption("--models"), metafunc.config.getoption("--first")
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(time.time()))  # the same in all workers
        start = 0 if count is None else zlib.crc32(run.encode()) if first is None else first
        metafunc.parametrize("model_seed", range(start, start + (count or RANDOM_MODELS)))


def _generator_on(device: torch.device) -> type[torch.Generator]:
    """A generator that draws there by default."""

    class Generator(torch.Generator):
        def __new__(cls, device=device):
            return super().__new__(cls, device)

    return Generator


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device is not None:
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False  # results are compared with those of the CPU
        torch.Generator = _generator_on(device)  # type: ignore[misc]
    gc.set_threshold(100_000, 20, 100)  # compilers make many objects that live on: walks over them take long
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of each would wait for those of others
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays, so that walks need not look at it


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Tests of what is on the CPU make everything there, whatever the device of the others."""
    if request.node.get_closest_marker("cpu") is None or request.config.getoption("--device") is None:
        yield
        return
    monkeypatch.setattr(torch, "Generator", _GENERATOR)
    with torch.device("cpu"):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times are kept for a run of the tests, not in the user's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "cache" / "torch"))


@pytest.fixture
def data_folder() -> Path:
    folder = Path(os.environ.get("BALF_FX_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "resnet20.pth").exists():
        pytest.skip("the trained ResNet-20 is not there: set BALF_FX_DATA to the folder that holds it")
    return folder


@pytest.fixture
def load_benchmark(monkeypatch):
    """Import a benchmark as Python does when it is run as a script."""
    for module in ("click", "numpy", "timm", "torchvision"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def load_task(load_benchmark, data_folder):
    """Load one of the trained models that benchmarks compress, where its files are there."""
    click, models = load_benchmark("click"), load_benchmark("models")

    def load(name, **source):
        try:
            return models.load(name, data=data_folder, **source)
        except click.ClickException as error:
            if "does not exist" in error.message:
                pytest.skip(error.message)
            raise

    return load


@pytest.fixture
def any_pivots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers have pivots at any rank, as with budgets of parameters, whatever time they take."""
    monkeypatch.setattr("balf_fx.engine.settings.MOVE", 0)


@pytest.fixture
def conv_net() -> nn.Module:
    return randomise_batchnorm(ConvNet()).eval()


@pytest.fixture
def images() -> list[torch.Tensor]:
    return list(torch.randn(4, 8, 3, 12, 12))


@pytest.fixture
def bottleneck():
    """The depthwise layer is no site, but as wide as the layers around it."""
    layers = {
        "expand": nn.Conv2d(3, 64, 1),
        "relu": nn.ReLU(),
        "depthwise": nn.Conv2d(64, 64, 3, padding=1, groups=64),
        "project": nn.Conv2d(64, 32, 1),
    }
    return nn.Sequential(OrderedDict(layers)).eval()
