import torch

from balf_fx.refit.offload import Shelf


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
