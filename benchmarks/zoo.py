"""Every architecture within reach: captured, compressed to 60 % of its FLOPs and checked against the original.

python benchmarks/zoo.py --compile --json benchmarks/results/zoo.json

Weights are random, so nothing is said about accuracy. Models are examined in a separate process, which a crash or a
time limit ends without ending the sweep.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import click
import torch
from common import write_json
from tabulate import tabulate
from tqdm import tqdm
from zoo_checks import BUDGET, Examination, Row, examine_subject
from zoo_subject import Case, Skip, Source, Subject, randomise
from zoo_transformers import transformers_cases, transformers_subject
from zoo_vision import matches, timm_cases, timm_subject, torchvision_cases, torchvision_subject

COMPILED = ("resnet18", "mobilenet_v3_small", "test_vit", "test_convnext", "bert", "gpt2")
"""Models that --compile hands to torch.compile."""


def cases(source: Source, patterns: Sequence[str] = (), known: Collection[str] = ()) -> Iterator[Case | Skip]:
    """The models of a source whose names match any of the patterns and are not known, one by one: selecting is slow."""
    if importlib.util.find_spec(source) is None:
        return iter([Skip(source, "*", "not installed")])
    timm = partial(timm_cases, known=known)
    select = {"torchvision": torchvision_cases, "timm": timm, "transformers": transformers_cases}
    return (case for case in select[source](patterns) if matches(case.name, patterns) and case.name not in known)


def build(case: Case) -> Subject:
    """The model with random weights, in evaluation mode, and its batches."""
    torch.manual_seed(0)
    make = {"torchvision": torchvision_subject, "timm": timm_subject, "transformers": transformers_subject}
    subject = make[case.source](case.name, dict(case.options))
    subject.model.eval()
    randomise(subject)
    return subject


def examine(case: Case, compiled: bool = False) -> Row:
    """Build a model and examine it."""
    started = time.perf_counter()
    examination = Examination()
    with examination.check("build"):
        examine_subject(build(case), examination, compiled)
    return examination.row(case, time.perf_counter() - started)


class Worker:
    """A process that examines models one after the other, and is replaced when it crashes or takes too long."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self._process: Any = None
        self._connection: Any = None

    def examine(self, case: Case, compiled: bool) -> Row:
        """As the function, within the time limit."""
        if self._process is None:
            self._start()
        started = time.perf_counter()
        try:
            self._connection.send((case, compiled))
            if self._connection.poll(self.time_limit):
                return self._connection.recv()
            problem = f"process: TimeoutError: took more than {self.time_limit:g} s"
        except (EOFError, OSError):
            self._process.join()
            problem = f"process: crash: exit code {self._process.exitcode}"
        self.stop()
        seconds = round(time.perf_counter() - started, 1)
        return Row(case.source, case.name, dict(case.options), seconds=seconds, problems=(problem,))

    def stop(self) -> None:
        """End the process, which leaves by itself where it has nothing to do."""
        if self._process is not None:
            self._connection.close()
            self._process.join(timeout=1)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end,), daemon=True)
        self._process.start()
        other_end.close()


def _serve(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(examine(*task))


class Results:
    """Rows and skips, those of an earlier run included, kept in a JSON file where there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.rows: list[Row] = []
        self.skips: list[Skip] = []

    def known(self, source: Source) -> set[str]:
        """The models that an earlier run got to."""
        old = (*self._old.get("results", []), *self._old.get("skipped", []))
        return {one["name"] for one in old if one["source"] == source}

    def add(self, entry: Row | Skip) -> None:
        """Take the place of what was known of this model."""
        (self.rows if isinstance(entry, Row) else self.skips).append(entry)
        if self.path is not None:
            versions = {name: importlib.metadata.version(name) for name in {row.source for row in self.rows}}
            results = {
                "versions": {**self._old.get("versions", {}), **dict(sorted(versions.items()))},
                "budget": BUDGET,
                "results": self._merged("results", self.rows),
                "skipped": self._merged("skipped", self.skips),
            }
            keeps_some = bool(self._kept("results") or self._kept("skipped"))
            write_json(self.path, results, self._old if keeps_some else None)

    def _merged(self, key: str, entries: Iterable[Row | Skip]) -> list[dict[str, Any]]:
        new = [asdict(entry) for entry in entries]
        return sorted([*self._kept(key), *new], key=lambda entry: (entry["source"], entry["name"]))

    def _kept(self, key: str) -> list[dict[str, Any]]:
        """Entries of the earlier run that this one has not replaced."""
        replaced = {(entry.source, entry.name) for entry in (*self.rows, *self.skips)}
        return [entry for entry in self._old.get(key, []) if (entry["source"], entry["name"]) not in replaced]


def table(rows: Sequence[Row]) -> str:
    """One line for each model."""
    lines = [
        (
            row.name,
            row.captured,
            row.flops_in_sites,
            row.flops_kept,
            row.minimum,
            None if row.relative_deviation is None else f"{row.relative_deviation:.1e}",
            row.seconds,
            "; ".join(row.problems)[:100] or "ok",
        )
        for row in rows
    ]
    headers = ("model", "captured", "in sites", f"kept at {BUDGET:g}", "minimum", "deviation", "seconds", "problems")
    return tabulate(lines, headers, floatfmt=("", "", ".3f", ".4f", ".4f", "", ".0f", ""))


def summary(rows: Sequence[Row], skips: Sequence[Skip]) -> str:
    """Counts by source, and why models were left out."""
    sources = dict.fromkeys(entry.source for entry in (*rows, *skips))
    lines = []
    for source in sources:
        mine = [row for row in rows if row.source == source]
        failed = sum(bool(row.problems) for row in mine)
        lines.append((source, len(mine) - failed, failed, sum(skip.source == source for skip in skips)))
    reasons = Counter((skip.source, skip.reason.partition(":")[0]) for skip in skips)
    skipped = [f"{source}: {count} left out: {reason}" for (source, reason), count in reasons.items()]
    return "\n".join([tabulate(lines, ("source", "ok", "failed", "left out")), *skipped])


@click.command()
@click.option(
    "--source", "sources", multiple=True, type=click.Choice(get_args(Source)), help="Repeatable; default: all."
)
@click.option("--only", "patterns", multiple=True, help="Glob of model names; repeatable.")
@click.option("--limit", type=int, help="At most this many models of each source.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile a sample of the compressed models.")
@click.option("--time-limit", default=240.0, show_default=True, help="Seconds for each model.")
@click.option("--resume", is_flag=True, help="Leave out what the results file already holds.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Merge the results into this file.")
def main(
    sources: Sequence[Source],
    patterns: Sequence[str],
    limit: int | None,
    compiled: bool,
    time_limit: float,
    resume: bool,
    output: Path | None,
) -> None:
    """Capture, compress and check the architectures of torchvision, timm and transformers."""
    results, worker = Results(output), Worker(time_limit)
    try:
        for source in sources or get_args(Source):
            wanted = cases(source, patterns, results.known(source) if resume else ())
            found = itertools.islice(wanted, limit)
            for case in (bar := tqdm(found, desc=source, unit="model", leave=False)):
                bar.set_postfix_str(case.name)
                known = isinstance(case, Skip)
                results.add(case if known else worker.examine(case, compiled and case.name in COMPILED))
    finally:
        worker.stop()
    click.echo(table(results.rows) + "\n\n" + summary(results.rows, results.skips))


if __name__ == "__main__":
    main()
