"""Kills one of two processes that compress a model block by block, again and again, and compares what they find.

Run as a script, so that the forked processes have one thread: python tests/distributed/killing.py FOLDER KILLS. It
prints JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from killed import digest, forked, tiny

import balf_fx
from balf_fx.checkpoint import journal

SIZE, MEMORY = 2, 6000
_MOST = 4  # times as many kills as are wanted


def compressed(rank: int, folder: Path, meeting: Path) -> str:
    """The digest of the compressed model and of its plan in one of the processes."""
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=limit)
    model, batches = tiny()
    options = {"flops": 0.4, "memory": MEMORY, "checkpoint": folder, "progress": False}
    return digest(balf_fx.compile(model, batches[rank::SIZE], **options))


def run(folder: Path, victim: int | None, seconds: float) -> bool:
    """Whether all processes have ended with a model, one of them killed after a time."""
    meeting = folder.with_suffix(".meeting")
    meeting.unlink(missing_ok=True)
    processes = [
        forked(partial(compressed, rank, folder, meeting), folder.with_suffix(f".{rank}")) for rank in range(SIZE)
    ]
    if victim is not None:
        time.sleep(seconds)
        os.kill(processes[victim], signal.SIGKILL)
    return all([os.waitpid(process, 0)[1] == 0 for process in processes])  # noqa: C419 (waits for all of them)


def results(folder: Path) -> list[str]:
    """What each process has found."""
    return [folder.with_suffix(f".{rank}").read_text() for rank in range(SIZE)]


def main(folder: Path, wanted: int) -> None:
    """Print how many runs were killed, how many began with finished stages, and the results of the others.

    How far a run has come when it is killed depends on what else the machine does, so that more are killed until as
    many as wanted have begun with finished stages.
    """
    torch.set_num_threads(1)
    journal.EVERY, journal._SHARE = 0.0, float("inf")  # write after every batch
    assert run(folder, None, 0.0)
    shutil.rmtree(folder)
    start = time.perf_counter()
    assert run(folder, None, 0.0)
    longest = time.perf_counter() - start
    expected = results(folder)
    shutil.rmtree(folder)
    moments = random.Random(0)
    kills, resumed, found = 0, 0, []
    while (wants := resumed < wanted and kills < _MOST * wanted) or not found:
        resumed += any(folder.glob("stages/*.safetensors"))
        victim = moments.randrange(SIZE) if wants else None
        kills += victim is not None
        if run(folder, victim, moments.uniform(0.1, 0.9) * longest):
            found.append(results(folder))
            shutil.rmtree(folder)
    json.dump({"kills": kills, "resumed": resumed, "results": found, "expected": expected}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
