"""The result in the folder of a checkpoint: a file as `save` writes it, with which the run is complete."""

from __future__ import annotations

import logging
from functools import partial

from torch import fx, nn

from balf_fx.calibration.observers import OBSERVERS
from balf_fx.checkpoint.folder import Folder
from balf_fx.checkpoint.journal import Journal
from balf_fx.distributed.group import ALONE, Group
from balf_fx.engine.program import copy_graph
from balf_fx.engine.rewriting import fill, find_features, finish, rewrite_as
from balf_fx.errors import CheckpointError, FileError
from balf_fx.files.restore import Stored, restore
from balf_fx.files.storage import read, write
from balf_fx.passes.observe import remove_observers

_LOGGER = logging.getLogger(__name__)
_NAME = "model.safetensors"


def read_result(journal: Journal, group: Group = ALONE) -> Stored | None:
    """The result of a run, from the folder of process 0; None if it is not complete.

    Raises:
        FileError: the file was changed.
    """
    return None if journal.folder is None else group.once(partial(_read, journal.folder))


def write_result(journal: Journal, found: Stored, group: Group = ALONE) -> None:
    """Write the result of a run, in place of the statistics and layers from which it was made.

    Raises:
        CheckpointError: the disk is full, for instance.
    """
    if journal.folder is not None and group.once(partial(_write, journal.folder, found)):
        journal.folder.clear()


def _read(folder: Folder) -> Stored | None:
    path = folder.path / _NAME
    return read(path) if path.exists() else None


def _write(folder: Folder, found: Stored) -> bool:
    """Write the result; False if a file cannot hold it."""
    try:
        with folder.writing():
            write(found, folder.path / _NAME)
    except CheckpointError:
        raise
    except FileError as error:  # a quantized weight; the stages stay, so that another call takes little time
        _LOGGER.warning("the checkpoint has no finished model: %s", error)
        return False
    return True


def rebuild(found: Stored, prepared: fx.GraphModule, model: nn.Module | None) -> nn.Module:
    """The model of a result, from the graph that was compressed or, for result="module", from the model."""
    if found.plan.modules is not None and model is not None:
        return restore(found, model)
    graph_module = copy_graph(prepared)
    if hasattr(graph_module, OBSERVERS):
        remove_observers(graph_module)
    find_features(graph_module, found.plan)
    rewrite_as(graph_module, found.plan)
    fill(graph_module, found.tensors)
    return finish(graph_module, found.plan)
