"""What the benchmarks share: counting FLOPs, and the header of a results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import Tensor, nn

from balf_fx.graph.flops import flop_counter

ROOT = Path(__file__).resolve().parents[1]
Batch = Tensor | dict[str, Tensor]

_HEADER = ("torch", "cpu", "accelerator", "cores", "threads", "date", "commit", "command", "options", "continues")


def call(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch: a tensor, or keyword arguments."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def count_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of one call, as torch counts them.

    With gradients, since without them torch runs attention fused, which the counter does not know, and the counter
    fails on modules that are called with parameters.
    """
    with torch.enable_grad(), flop_counter() as counter:
        call(model, batch)
    return int(counter.get_total_flops())


def write_json(path: Path, results: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> None:
    """Write results under a header that says how they were made.

    Args:
        earlier: what the file of an earlier run held, where some of its rows are among these results: the header of
            that run is kept as "continues".
    """
    header = {**environment(), **invocation(click.get_current_context(silent=True))}
    if earlier is not None:
        header["continues"] = {key: earlier[key] for key in _HEADER if key in earlier}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, **results}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """The versions and the processor that a result comes from; no names of machines, users or folders."""
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        **({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": COMMIT,
    }


def run_apart(script: str, *words: Any) -> dict[str, Any]:
    """What a benchmark prints as JSON, in its last line, when it runs in a process of its own."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # linear algebra libraries may print, too
    return found


def cpu_name() -> str:
    """The processor's name, as far as the platform tells it, and the instruction set torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit(root: Path) -> str | None:
    """The commit that is checked out at a repository's root, followed by "-dirty" where tracked files differ from it.

    Results do not count, since a run changes them. None where the folder is not a repository's root.
    """
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    toplevel, head = found.splitlines()
    if Path(toplevel).resolve() != root.resolve():
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changes else head


def _git(root: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails, or where there is no git."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def invocation(context: click.Context | None) -> dict[str, Any]:
    """The command of a run, and all its options; paths are left out of both.

    Args:
        context: of the running command; None outside of one.
    """
    if context is None:
        return {"command": None, "options": {}}
    options = {name: value for name, value in context.params.items() if not isinstance(value, Path)}
    code = context.command.callback.__code__
    words = [word for parameter in context.command.params for word in _words(context, parameter)]
    return {"command": shlex.join(["python", f"benchmarks/{Path(code.co_filename).name}", *words]), "options": options}


def _words(context: click.Context, parameter: click.Parameter) -> Iterator[str]:
    """A parameter as it was given on the command line."""
    value = context.params[parameter.name]
    if context.get_parameter_source(parameter.name) is not ParameterSource.COMMANDLINE or isinstance(value, Path):
        return
    for one in value if parameter.multiple else [value]:
        yield parameter.opts[0]
        if not parameter.is_flag:
            yield str(one)


COMMIT = commit(ROOT)
"""What a run started from: the checkout may change while it lasts."""
