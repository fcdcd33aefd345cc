import gc
import tempfile
from pathlib import Path

import pytest
import torch

from balf_fx.errors import FileError
from balf_fx.refit.offload import Shelf, Shelved, resident


def test_what_comes_back_is_what_was_parked(tmp_path):
    shelf, base = Shelf(tmp_path, frozenset()), torch.randn(4, 6)
    values = {"base": base, "rows": base[1:3], "turned": (base.mT, 7), "other": torch.arange(5), "none": torch.empty(0)}
    expected = {"base": base.clone(), "rows": base[1:3].clone(), "turned": base.mT.clone()}
    parked = shelf.park(values)
    assert len(list(tmp_path.iterdir())) == 2
    loaded = shelf.load(parked)
    assert torch.equal(loaded["base"], expected["base"])
    assert torch.equal(loaded["rows"], expected["rows"])
    assert torch.equal(loaded["turned"][0], expected["turned"])
    assert loaded["turned"][0].stride() == (1, 6)
    assert loaded["other"].tolist() == [0, 1, 2, 3, 4]


def test_what_shares_a_storage_still_does_after_changes(tmp_path):
    shelf, base = Shelf(tmp_path, frozenset()), torch.zeros(4, 6)
    loaded = shelf.load(shelf.park([base, base[1]]))
    loaded[0].add_(1)
    loaded = shelf.load(shelf.park(loaded))
    assert loaded[1].tolist() == [1] * 6
    assert len(list(tmp_path.iterdir())) == 1


def test_files_go_with_their_values(tmp_path):
    shelf = Shelf(tmp_path, frozenset())
    parked = shelf.park([torch.zeros(3), torch.ones(3)])
    assert shelf.used
    loaded = shelf.load(parked[:1])
    assert len(list(tmp_path.iterdir())) == 1
    assert shelf.nbytes(loaded) == 12
    assert shelf.park([]) == []
    assert not shelf.used
    assert not list(tmp_path.iterdir())


def test_pinned_storages_stay(tmp_path):
    base = torch.zeros(3)
    shelf = Shelf(tmp_path, {base.data_ptr()})
    assert shelf.nbytes([base]) == 0
    assert shelf.park([base])[0] is base


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_values_beyond_the_memory_are_in_files_at_once(folder):
    values = [{"x": torch.randn(4, 6), "rest": (torch.arange(3), "word", None)} for _ in range(3)]
    nbytes = 4 * 24 + 8 * 3
    with Shelved(memory=2 * nbytes) as shelved:
        for value in values:
            shelved.append(value)
        assert len(files(folder)) == 2  # two tensors of the third value
        assert len(shelved) == 3
        assert shelved[0] is not values[0]
        assert shelved[0]["x"] is values[0]["x"]
        assert [tensor is values[i // 2]["x"] for i, tensor in enumerate(resident(shelved))] == [True, False] * 2
        for found, expected in zip(shelved, values, strict=True):
            assert torch.equal(found["x"], expected["x"])
            assert torch.equal(found["rest"][0], expected["rest"][0])
            assert found["rest"][1:] == ("word", None)
        assert torch.equal(shelved[-1]["x"], values[2]["x"])
        assert [value["x"].shape for value in shelved[1:]] == [(4, 6)] * 2
        with pytest.raises(IndexError):
            shelved[3]
    assert not list(folder.iterdir())
    assert len(shelved) == 0


@pytest.mark.parametrize("memory", [0, 10**6])
def test_files_go_with_the_sequence(folder, memory):
    shelved = Shelved(memory)
    shelved.append(torch.zeros(5))
    value = shelved[0]
    del shelved
    gc.collect()
    assert not list(folder.iterdir())
    assert value.tolist() == [0] * 5


def test_pieces_of_a_batch_are_written_without_the_rest_of_it(folder):
    batch = torch.randn(64, 7, dtype=torch.float64)
    with Shelved(0) as shelved:
        for start in range(3, 64, 20):
            shelved.append([batch[start : start + 20], batch[start : start + 20].mT, batch[start].view(torch.float32)])
        written = sum(path.stat().st_size for path in files(folder))
        assert written < 61 * 7 * 8 + 4 * 64  # whose starts are aligned
        for start, (rows, turned, halves) in zip(range(3, 64, 20), shelved, strict=True):
            assert torch.equal(rows, batch[start : start + 20])
            assert torch.equal(turned, batch[start : start + 20].mT)
            assert torch.equal(halves, batch[start].view(torch.float32))


def test_what_shares_a_storage_changes_together_until_it_is_read_again(folder):
    base = torch.zeros(4, 6)
    with Shelved(0) as shelved:
        shelved.append({"base": base, "row": base[1]})
        base.fill_(7)
        found = shelved[0]
        found["base"].add_(1)
        assert found["row"].tolist() == [1] * 6
        assert shelved[0]["row"].tolist() == [0] * 6


def test_no_folder_is_made_where_everything_fits(folder):
    with Shelved(100) as kept:
        kept.append([torch.zeros(3)])
        assert not list(folder.iterdir())
        kept.append([torch.zeros(40)])
        assert len(files(folder)) == 1
    assert not list(folder.iterdir())


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def write_bytes(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(FileError, match=r"No space left on device.*TMPDIR"):
        Shelf(tmp_path, frozenset()).park(torch.zeros(3))
