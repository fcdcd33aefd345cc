import json
import os

import pytest
import torch

from balf_fx.checkpoint.folder import Folder
from balf_fx.errors import CheckpointError

RUN = {"option": {"flops": "0.5"}}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "made" / "here", RUN)


def stage(folder):
    (path,) = folder.path.glob("stages/*.safetensors")
    return path


def test_a_stage_is_read_as_it_was_written(folder):
    assert folder.get("layer 0") is None
    folder.put("layer 0", {"a": [1, None]}, {"0": torch.eye(3), "1": torch.ones(2, dtype=torch.bfloat16)})
    value, tensors = folder.get("layer 0")
    assert value == {"a": [1, None]}
    assert torch.equal(tensors["0"], torch.eye(3))
    assert tensors["1"].dtype == torch.bfloat16
    folder.put("layer 0", 2, {})
    assert Folder(folder.path, {"other": {}}).get("layer 0") == (2, {})  # of the run that began it
    assert Folder(folder.path, {"other": {}}).before == RUN


def test_stages_whose_names_look_alike_have_files_of_their_own(folder):
    names = ["part 0, layer a", "part 0, layer/a", "part 0 layer a", "x" * 300, "x" * 301]
    for name in names:
        folder.put(name, name, {})
    assert [folder.get(name) for name in names] == [(name, {}) for name in names]


def test_a_file_that_was_changed_is_told(folder):
    folder.put("layer", 1, {"0": torch.ones(4)})
    content = stage(folder).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place, byte in enumerate(content):
        if place < header and chr(byte).isspace():
            continue  # that fills up the header, and says nothing
        stage(folder).write_bytes(content[:place] + bytes([byte ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            folder.get("layer")


def test_a_file_of_another_run_is_told(folder, tmp_path):
    folder.put("layer", 1, {})
    other = Folder(tmp_path / "other", {"option": {"flops": "0.6"}})
    os.link(stage(folder), other.path / "stages" / stage(folder).name)
    with pytest.raises(CheckpointError, match="not written by the run of this checkpoint"):
        other.get("layer")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"run": {}, "format": 99}'])
def test_a_damaged_manifest_is_told(folder, text):
    (folder.path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"damaged|another version"):
        Folder(folder.path, RUN)


def test_the_manifest_is_json(folder):
    assert json.loads((folder.path / "manifest.json").read_text()) == {"format": 12, "run": RUN}


@pytest.mark.parametrize("fails", ["fsync", "replace", "save"])
def test_what_cannot_be_written_leaves_what_was_there(folder, monkeypatch, fails):
    folder.put("layer", 1, {"0": torch.zeros(4)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    targets = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "save": "balf_fx.checkpoint.folder.save_file"}
    with monkeypatch.context() as patched:
        patched.setattr(targets[fails], full)
        with pytest.raises(CheckpointError, match=r"cannot be written.*No space left.*make room and call again"):
            folder.put("layer", 2, {"0": torch.ones(4)})
    value, tensors = folder.get("layer")
    assert value == 1
    assert not tensors["0"].any()
    folder.put("layer", 3, {})
    assert folder.get("layer") == (3, {})


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Folder(tmp_path / "file", RUN)


def test_large_files_go_and_small_ones_stay(folder):
    folder.put("statistics", 1, {"0": torch.ones(4)})
    folder.put("trial", 0.5, {})
    folder.clear()
    assert folder.get("statistics") is None
    assert folder.get("trial") == (0.5, {})
    assert len(list((folder.path / "stages").iterdir())) == 1


def test_what_a_killed_run_left_unfinished_goes(folder):
    """A file of ours, and one of safetensors, which writes to a file of its own first."""
    folder.put("statistics", 1, {"0": torch.ones(4)})
    for left in ("left.tmp", ".tmpAbC123"):
        (folder.path / "stages" / left).write_bytes(bytes(8))
    again = Folder(folder.path, RUN)
    assert [path.name for path in (folder.path / "stages").iterdir()] == [again._path("statistics").name]
    again.clear()
    assert again.get("statistics") is None


def test_a_folder_of_others_is_refused_and_stays(tmp_path):
    (tmp_path / "stages").mkdir()
    for name in ("stages/build.py", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=r"no checkpoint, but holds 'notes.txt'"):
        Folder(tmp_path, RUN)
    assert {path.name for path in tmp_path.rglob("*")} == {"stages", "build.py", "notes.txt"}


def test_what_a_killed_run_left_is_removed(folder):
    folder.put("layer", 1, {})
    for name in ("stages/layer.tmp", "stages/.tmpAbC12", "stages/note.txt", ".balf_fx-1"):
        (folder.path / name).write_text("") if "." in name[1:] else (folder.path / name).mkdir()
    Folder(folder.path, RUN)
    assert {path.name for path in folder.path.iterdir()} == {"manifest.json", "stages"}
    assert {path.suffix for path in (folder.path / "stages").iterdir()} == {".safetensors", ".txt"}


def test_a_run_that_was_killed_before_its_manifest_begins_again(tmp_path):
    (tmp_path / ".manifest.json.tmp").write_text("{")
    assert Folder(tmp_path, RUN).before == RUN


def test_a_manifest_of_another_program_is_refused_before_anything_is_deleted(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "mine.tmp").write_text("mine")
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(CheckpointError, match="of another program: pass another folder"):
        Folder(tmp_path, RUN)
    assert (tmp_path / "stages" / "mine.tmp").read_text() == "mine"


def test_another_process_may_have_made_its_folder_first(tmp_path):
    Folder(tmp_path / "process-1", RUN)
    assert Folder(tmp_path, RUN).before == RUN
