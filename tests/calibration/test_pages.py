"""Parked tensors have the values of the originals, and give their memory back."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from balf_fx.calibration.pages import Pages

pytestmark = pytest.mark.cpu

MAPPED, FULL = Path("/proc/self/smaps_rollup"), Path("/dev/full")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_values_stay_when_memory_is_given_back(dtype):
    pages, tensor = Pages(), torch.randn(3, 5, 4).to(dtype).transpose(0, 2)
    parked = pages.park(tensor)
    pages.release()
    assert torch.equal(parked, tensor)
    assert parked.dtype == dtype
    assert pages.has(parked)
    assert not pages.has(tensor)


def test_a_parked_tensor_can_be_changed_and_outlives_its_pages():
    pages = Pages()
    parked = pages.park(torch.zeros(4))
    parked.add_(1.0)
    pages.release()
    del pages
    gc.collect()
    assert torch.equal(parked, torch.ones(4))


def test_what_has_no_bytes_in_memory_of_the_cpu_stays():
    for tensor in (torch.zeros(0, 3), torch.zeros(3, device="meta"), nn.Parameter(torch.ones(2))):
        assert Pages().park(tensor) is tensor


def test_the_parameters_of_a_module_are_parked():
    pages, layer = Pages(), nn.Linear(4, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    pages.keep(layer)
    assert all(pages.has(parameter) for parameter in layer.parameters())
    assert isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def resident():
    return sum(int(line.split()[1]) for line in MAPPED.read_text().splitlines() if line.startswith("Rss:")) << 10


@pytest.mark.skipif(not MAPPED.exists(), reason="the kernel does not tell what is resident")
def test_memory_is_given_back():
    pages = Pages()
    parked = [pages.park(torch.ones(4 << 20, dtype=torch.uint8)) for _ in range(4)]
    before = resident()
    assert sum(int(each.sum()) for each in parked) == 16 << 20
    assert resident() - before > 15 << 20
    pages.release()
    assert resident() - before < 1 << 20


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")
def test_a_full_disk_is_an_error(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: FULL.open("r+b", buffering=0))
    with pytest.raises(OSError, match="No space left"):
        Pages().park(torch.ones(8))
