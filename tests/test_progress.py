"""One bar for all of compression: shares of it, and what a user sees."""

import itertools
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import balf_fx
from balf_fx import progress
from balf_fx.backend import balf
from balf_fx.progress import SILENT, progress_bar

STAGES = ["calibrating", "scoring", "trying allocations", "solving layers"]
WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=4)
TREES = st.recursive(WEIGHTS, lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=6)


class Bar:
    """Notes where the bar stands, in place of drawing it."""

    last = None
    disable = False

    def __init__(self, total, **_):
        self.total, self.n, self.desc, self.places, self.names = total, 0.0, "", [], []
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def set_description_str(self, name, refresh=True):
        self.desc = name
        self.names.append(name)

    def update(self, step):
        assert step >= 0
        self.n += step
        self.places.append(self.n)


@pytest.fixture
def bar(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    return lambda: Bar.last


def work(share, tree):
    """Lists of numbers are tracked, lists of lists are divided further."""
    if all(isinstance(each, float) for each in tree):
        assert list(share.track(range(len(tree)), tree)) == list(range(len(tree)))
        return
    for span, inner in zip(share.spans([1.0] * len(tree)), tree, strict=True):
        work(span, inner)
    share.done()


@given(TREES)
def test_shares_add_up_and_never_go_back(tree):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "tqdm", Bar)
        with progress_bar(True, "working") as share:
            work(share, tree)
    places = Bar.last.places
    assert places == sorted(places)
    assert places[-1] == pytest.approx(100, abs=1e-9)
    assert Bar.last.total == 100


def test_calibration_and_scores_of_blocks_take_turns(bar):
    model, batches = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(9, 8)]
    balf_fx.compile(model, batches, params=0.7, effort="fast", memory=1)
    names = [name for name, _ in itertools.groupby(bar().names)]
    assert names[:5] == ["capturing", *["calibrating", "scoring"] * 2]
    assert bar().places[-1] == pytest.approx(100)


@given(WEIGHTS)
def test_a_share_is_as_long_as_its_weight(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "tqdm", Bar)
        with progress_bar(True, "working") as share:
            first, second = share.spans([1.0, 3.0], ["first", "second"])
            first.done()
            assert Bar.last.n == pytest.approx(25)
            done = 0.0
            for weight, _ in zip(weights, second.track(iter(weights), weights), strict=True):
                assert Bar.last.n == pytest.approx(25 + 75 * done / (sum(weights) or 1.0))
                done += weight
            second.done()
    assert Bar.last.names[0] == "working"
    assert set(Bar.last.names[2:]) == {"second"}


def test_without_a_known_length_a_share_is_done_at_the_end(bar):
    with progress_bar(True, "working") as share:
        for _ in share.track(each for each in range(3)):
            assert bar().n == 0
    assert bar().n == 100


def test_silence_writes_nothing(capfd, bar):
    Bar.last = None
    with progress_bar(False, "working") as share:
        assert share is SILENT
        first, second = share.spans([1.0, 2.0], ["first", "second"])
        assert [*first.track(range(3)), *second.track(iter("ab"))] == [0, 1, 2, "a", "b"]
        share.done()
    assert Bar.last is None
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 10)).eval()


def test_bars_that_are_disabled_for_all_of_tqdm_stay_silent(model, monkeypatch, capfd):
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, disable=True))  # as the environment's TQDM_DISABLE=1 does
    balf_fx.compile(model, torch.randn(64, 12), flops=0.5)
    assert capfd.readouterr() == ("", "")


def test_one_bar_for_all_of_compression(model, bar):
    balf_fx.compile(model, torch.randn(3, 48, 12).unbind(), flops=0.6)
    places, names = bar().places, list(dict.fromkeys(bar().names))
    assert places == sorted(places)
    assert places[-1] == pytest.approx(100)
    ends = [index for index, place in enumerate(places) if place > 100 - 1e-6]
    assert ends == list(range(ends[0], len(places)))
    assert set(bar().names[ends[0] :]) <= {"solving layers", "compressing"}  # nothing starts at 100 %
    assert [name for name in names if name in STAGES] == STAGES
    for stage in STAGES:  # none is shown as if it took no time
        last = max(index for index, name in enumerate(bar().names) if name == stage)
        first = bar().names.index(stage)
        assert places[last] > places[first]


@pytest.mark.parametrize("load", [list, lambda batches: DataLoader(batches, batch_size=None)], ids=["list", "loader"])
def test_batches_that_are_read_once_advance_the_bar(model, bar, load):
    places = []

    def forward(model, batch):
        places.append(bar().n)
        return model(batch)

    options = {"effort": "fast", "allocation": "uniform"}  # of which nothing is measured afterwards
    balf_fx.compile(model, load(torch.randn(8, 48, 12)), flops=0.6, forward=forward, **options)
    calibration = places[-8:]
    steps = [after - before for before, after in itertools.pairwise(calibration)]
    assert min(steps) > 0
    assert min(steps) == pytest.approx(max(steps))


def test_stages_are_shown_on_stderr(model, capsys):
    batches = torch.randn(3, 48, 12).unbind()
    balf_fx.compile(model, batches, flops=0.6, progress=True)
    shown = capsys.readouterr()
    found = list(dict.fromkeys(re.findall("|".join(STAGES), shown.err)))
    assert found == STAGES
    assert shown.out == ""
    balf_fx.compile(model, batches, flops=0.6, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_backend_shows_nothing_while_it_calibrates(model, capsys):
    torch.compiler.reset()
    batches = torch.randn(3, 48, 12).unbind()
    options = {"flops": 0.6, "calibration_steps": 2, "inner": "eager"}
    compiled = torch.compile(model, backend=balf, options=options)
    with torch.no_grad():
        for batch in batches[:2]:
            compiled(batch)
        assert capsys.readouterr() == ("", "")
        compiled(batches[2])
        assert "solving layers" in capsys.readouterr().err
        compiled(batches[2])
    assert capsys.readouterr() == ("", "")
    torch.compiler.reset()
