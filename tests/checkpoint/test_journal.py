import pytest
import torch

from balf_fx.checkpoint import journal as module
from balf_fx.checkpoint.folder import Folder
from balf_fx.checkpoint.journal import NO_JOURNAL, FolderJournal, difference
from balf_fx.errors import CheckpointError

RUN = {"option": {"flops": "0.5"}}


@pytest.fixture
def opened(tmp_path):
    """Opens the journal as another run would."""
    return lambda: FolderJournal(Folder(tmp_path, RUN), ())


@pytest.mark.parametrize("value", [None, 0.1, (1, {"a": 2})])
def test_a_finished_stage_is_not_computed_again(opened, value):
    assert opened().cached("stage", lambda: value) == value
    assert opened().cached("stage", pytest.fail) == value
    assert opened().within("part").cached("stage", lambda: 3) == 3
    assert opened().within("part").within("a").cached("stage", lambda: 4) == 4
    assert opened().within("part").last("stage") == 3
    assert opened().last("stage") == value


def test_the_base_class_remembers_nothing():
    assert [NO_JOURNAL.within("part").cached("stage", lambda n=n: n) for n in range(2)] == [0, 1]
    NO_JOURNAL.write("stage", pytest.fail)
    assert NO_JOURNAL.last("stage") is None
    batches = [torch.ones(2)]
    assert NO_JOURNAL.checked(batches) is batches
    assert NO_JOURNAL.folder is None


def test_an_unfinished_stage_is_written_from_time_to_time(opened, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    journal, written = opened(), []
    for second in range(0, 200, 10):
        clock[0] = float(second)
        journal.write("stage", lambda second=second: written.append(second) or second, due=False)
    assert written == [60, 120, 180]
    assert journal.last("stage") == 180
    journal.write("stage", lambda: 7)
    assert journal.last("stage") == 7

    def slow():
        clock[0] += 30.0
        return 8

    journal.write("stage", slow)
    clock[0] += 599.0
    journal.write("stage", pytest.fail, due=False)  # writing takes at most a twentieth of the time
    clock[0] += 2.0
    journal.write("stage", lambda: 9, due=False)
    assert journal.last("stage") == 9


def test_batches_are_compared_with_those_of_the_run_before(opened):
    batches = list(torch.randn(4, 3))
    assert all(one is other for one, other in zip(batches, opened().checked(batches), strict=True))
    assert list(opened().checked(iter(batches))) == batches
    for other, message in [
        (batches[:3], "there were 4 calibration batches, and now there are 3"),
        ([*batches, batches[0]], "there were 4 calibration batches, and now there are more"),
        ([batches[0], batches[2], batches[1], batches[3]], "calibration batch 1 differs"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            list(opened().checked(other))
    assert len(list(opened().checked(batches[:2], "validation batch"))) == 2


def test_batches_of_a_run_that_stopped_while_it_read_them_are_compared(opened):
    batches = list(torch.randn(4, 3))
    journal = opened()
    reading = journal.checked(iter(batches))
    next(reading), next(reading)
    journal.write("statistics", lambda: 1)
    with pytest.raises(CheckpointError, match="calibration batch 1 differs"):
        list(opened().checked([batches[0], batches[3]]))
    with pytest.raises(CheckpointError, match="there were 2 calibration batches, and now there are 1"):
        list(opened().checked(batches[:1]))
    assert len(list(opened().checked(batches))) == 4  # the others were not read before
    with pytest.raises(CheckpointError, match="calibration batch 3 differs"):
        list(opened().checked([*batches[:3], batches[0]]))


def test_an_unknown_class_in_a_file_is_told(opened, tmp_path):
    Folder(tmp_path, RUN).put("stage", [{"record": "Popen", "fields": {}}], {})
    with pytest.raises(CheckpointError, match=r"stage 'stage' in .* is damaged"):
        opened().last("stage")


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {}, None),
        ({"option": {"a": "1"}}, {"option": {"a": "1"}}, None),
        ({"option": {"a": "1"}}, {"option": {"a": "2"}}, "option a was 1, and is 2 now"),
        ({"option": {"a": "1"}}, {"option": {}}, "option a was 1, and is missing now"),
        ({"version": {}}, {"version": {"torch": "3"}}, "version torch was missing, and is 3 now"),
        ({"model": {"0.bias": "a"}}, {"model": {"0.bias": "b"}}, "the model's 0.bias differs"),
        ({"model": {"0.bias": "a"}}, {"model": {}}, "the model's 0.bias differs"),
    ],
)
def test_the_first_difference_is_named(before, now, words):
    assert difference(before, now) == words
