import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as Python does when it is run as a script."""
    for module in ("click", "numpy", "timm", "torchvision"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def load(benchmark, data_folder):
    """Load one of the trained models, where its files are there."""
    click, models = benchmark("click"), benchmark("models")

    def load(name, **source):
        try:
            return models.load(name, data=data_folder, **source)
        except click.ClickException as error:
            pytest.skip(error.message)

    return load
