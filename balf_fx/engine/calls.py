"""The calls of a program on its calibration batches, as walks over its blocks run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from balf_fx.calibration.batches import Calibration, is_empty, ordinary, run_batch, telling
from balf_fx.calibration.calls import KnownOutputs, placeholder_values
from balf_fx.calibration.describing import describe
from balf_fx.calibration.gradients import Wanted, differentiable, loss_of, outputs, recording
from balf_fx.calibration.observers import SensitivityObserver, observer_of
from balf_fx.calibration.pieces import Piece, pieces_for_blocks
from balf_fx.calibration.weights import CallWeights, check_fit, weighing
from balf_fx.engine.program import Program
from balf_fx.engine.weighing import call_weights
from balf_fx.graph.blocks import Block
from balf_fx.refit.offload import Shelved


class Calls:
    """The calls of a program on some batches, and what is to be known of each while it runs.

    Args:
        blocks: where gradients are observed, the blocks of the graph; batches are then run in pieces that fit.
    """

    def __init__(
        self,
        program: Program,
        calibration: Calibration,
        batches: Iterable[Any],
        blocks: Sequence[Block] | None = None,
    ) -> None:
        self._program, self._calibration, self._batches, self._blocks = program, calibration, batches, blocks
        self._known: list[tuple[int, str, Tensor | None, CallWeights]] = []
        self._run = Shelved(calibration.memory)  # the batches, for the backward pass
        self._first: Any = None  # the first batch
        self._generator = torch.Generator("cpu").manual_seed(calibration.seed + calibration.group.rank)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        graph_module = self._program.graph_modules[0]
        for index, (batch, given) in self._pieces():
            words = describe(batch)
            with telling(words, index):
                values = placeholder_values(graph_module, batch, self._calibration.forward)
                self._known.append((index, words, given, call_weights(self._program, batch, given)))
            if self._blocks is not None:
                self._run.append([batch])
            if len(self._known) == 1:
                self._first = batch
            yield values

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """What is run at once, with the index of its batch."""
        graph_module, calibration = self._program.graph_modules[0], self._calibration
        fitting = None if self._blocks is None else pieces_for_blocks(graph_module, calibration, self._blocks)
        for index, made in enumerate(self._batches):
            batch = ordinary(made)
            if is_empty(batch):
                continue
            piece = batch, calibration.given(index, batch)
            yield from ((index, own) for own in ([piece] if fitting is None else fitting.of(piece, index)))

    @contextmanager
    def around(self, call: int) -> Iterator[None]:
        """The context in which a call runs."""
        index, words, _, weights = self._known[call]
        with telling(words, index), weighing(self._program.graph_modules, weights):
            yield

    @contextmanager
    def differentiated(self, block: Block, call: int) -> Iterator[Callable[[], Iterable[Wanted]]]:
        """The context in which a block runs for a call in the backward pass."""
        graph_module = self._program.graph_modules[0]
        targets = dict.fromkeys(str(node.target) for node in block.nodes if node.op == "call_module")
        observers = [observer_of(graph_module, target, SensitivityObserver) for target in targets]
        with (  # the model has run this call before, so errors are those of the user's loss
            weighing(self._program.graph_modules, self._known[call][-1]),
            recording([each for each in observers if each is not None], self._run[call][0], call) as records,
            differentiable(graph_module),
        ):
            yield lambda: outputs(records)

    def loss(self, call: int, output: Any) -> Tensor:
        """The scalar whose gradients are observed in a call."""
        (index, _, _, weights), (batch,) = self._known[call], self._run[call]
        final = self._user_output(batch, output, index)
        return loss_of(final, batch, self._calibration, index, self._generator, weights.outputs)

    def check(self, outputs: Iterable[Any]) -> None:
        """Raise if the user's weights are no weights of the positions in a call, or one batch takes several calls.

        Args:
            outputs: the outputs of the calls, which are read once.
        """
        for call, output in enumerate(outputs):
            index, _, given, weights = self._known[call]
            check_fit(given, weights, index)
            if not call:
                self._user_output(self._first, output, index)

    def _user_output(self, batch: Any, output: Any, index: int) -> Any:
        """What the user's `forward` returns where the program returns this output."""
        stand_in = KnownOutputs(self._program.graph_modules[0], [output])
        return run_batch(stand_in, batch, self._calibration.forward, index, gradients=True)
