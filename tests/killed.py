"""Kills a compression at random moments, again and again, and compares what it returns in the end.

Run as a script, so that the forked processes have one thread: python tests/killed.py FOLDER KILLS. It prints JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import balf_fx
from balf_fx.checkpoint import journal
from balf_fx.checkpoint.digests import digest_of


def tiny() -> tuple[nn.Module, list[Tensor]]:
    """A model and its calibration batches."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(24, 8)).eval(), list(torch.randn(6, 8, 12))


def compressed(folder: Path | None) -> str:
    """The digest of the compressed model and of its plan."""
    model, batches = tiny()
    return digest(balf_fx.compile(model, batches, flops=0.4, checkpoint=folder, progress=False))


def digest(small: nn.Module) -> str:
    """The digest of a compressed model and of its plan."""
    return digest_of([dict(small.state_dict()), small.code, balf_fx.plan(small).to_json()])


def forked(compute: Callable[[], str], result: Path) -> int:
    """Start a function in a process of its own, whose result is in a file; returns the id of the process."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            result.write_text(compute())
            status = 0
        except BaseException:  # noqa: BLE001 (the process ends without the interpreter, which would print it)
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def main(folder: Path, wanted: int) -> None:
    """Print how many runs were killed, how many of these found finished stages, and the results of the others."""
    torch.set_num_threads(1)
    journal.EVERY, journal._SHARE = 0.0, float("inf")  # write after every batch
    compressed(None)
    start = time.perf_counter()
    expected = compressed(None)
    longest = time.perf_counter() - start
    moments = random.Random(0)
    kills, resumed, results = 0, 0, []
    while kills < wanted or not results:
        process = forked(partial(compressed, folder), folder.with_suffix(".txt"))
        found = any(folder.glob("stages/*.safetensors"))
        if kills < wanted:
            time.sleep(moments.uniform(0.1, 0.7) * longest)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            kills, resumed = kills + 1, resumed + found
        else:
            assert os.WEXITSTATUS(status) == 0
            results.append(folder.with_suffix(".txt").read_text())
            shutil.rmtree(folder)
    json.dump({"kills": kills, "resumed": resumed, "results": results, "expected": expected}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
