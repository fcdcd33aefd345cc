"""The method is registered as soon as transformers is imported, before balf_fx or after it."""

import sys

import pytest

pytest.importorskip("transformers")

from balf_fx.huggingface import registry


@pytest.fixture
def registered(monkeypatch):
    found = []
    monkeypatch.setattr(registry, "_register", lambda: found.append(True))
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, registry._Finder)])
    return found


def test_transformers_is_imported_already(registered, monkeypatch):
    monkeypatch.setitem(sys.modules, registry._AWAITED, sys)
    registry.watch()
    assert registered == [True]
    assert not any(isinstance(each, registry._Finder) for each in sys.meta_path)


def test_transformers_is_imported_later(registered, monkeypatch):
    import transformers.quantizers

    monkeypatch.delitem(sys.modules, registry._AWAITED, raising=False)
    registry.watch()
    registry.watch()
    (finder,) = (each for each in sys.meta_path if isinstance(each, registry._Finder))
    assert finder.find_spec("transformers", None) is None
    assert registered == []
    spec = finder.find_spec(registry._AWAITED, transformers.quantizers.__path__)
    assert finder not in sys.meta_path
    monkeypatch.setattr(spec.loader, "_own", type("Own", (), {"exec_module": lambda self, module: None})())
    spec.loader.exec_module(sys)
    assert registered == [True]


def test_an_earlier_version_of_transformers_goes_on_working(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "balf_fx.huggingface.quantizer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    registry._register()
    assert "need transformers 5" in caplog.text
