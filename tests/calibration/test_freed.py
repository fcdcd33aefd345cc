import types

import pytest

from balf_fx.calibration import freed


@pytest.fixture
def library(monkeypatch):
    """A C library of glibc's kind that holds `.free` bytes, and counts how often it gives them back."""
    found = types.SimpleNamespace(free=0, given=[])

    def count():
        return types.SimpleNamespace(free=found.free)

    own = types.SimpleNamespace(malloc_trim=found.given.append, mallinfo2=count)
    monkeypatch.setattr(freed.sys, "platform", "linux")
    monkeypatch.setattr(freed.ctypes, "CDLL", lambda name: own)
    found.own = own
    return found


@pytest.mark.parametrize(("free", "given"), [(freed._MUCH - 1, []), (freed._MUCH, [0])])
def test_only_much_memory_is_given_back(library, free, given):
    library.free = free
    freed.give_back()
    assert library.given == given
    freed.give_back(free)
    assert library.given == [*given, 0]


def test_after_small_layers_nothing_is_given_back(library):
    library.free = freed._MUCH
    freed.give_back(freed=freed._FEW - 1)
    assert library.given == []
    freed.give_back(freed=freed._FEW)
    assert library.given == [0]


def test_a_library_that_does_not_count_is_only_asked_for_all_that_is_free(library):
    library.free = 2 * freed._MUCH
    del library.own.mallinfo2
    freed.give_back()
    assert library.given == []
    freed.give_back(0)
    assert library.given == [0]


def test_another_library_is_left_alone(library, monkeypatch):
    library.free = 2 * freed._MUCH
    del library.own.malloc_trim
    freed.give_back()
    freed.give_back(0)
    monkeypatch.setattr(freed.sys, "platform", "win32")
    monkeypatch.setattr(freed.ctypes, "CDLL", None)
    freed.give_back()
    assert library.given == []


def test_what_is_counted_is_what_glibc_holds():
    library = freed.ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("not a recent glibc")
    library.mallinfo2.restype = freed._Counts
    counts = library.mallinfo2()
    assert counts.others[0] == counts.others[7] + counts.free  # arena = uordblks + fordblks
