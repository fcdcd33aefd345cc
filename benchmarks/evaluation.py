"""How good a compressed model's answers are: against the right ones, and against the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from task import Task
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Figures:
    """Means over the answers: one for each image, or for each token of a text.

    Attributes:
        top1: share of right answers in percent.
        perplexity: exp of the mean negative log-likelihood of the right answers.
        kl: Kullback-Leibler divergence from the dense model's answers, in nats.
    """

    top1: float
    perplexity: float
    kl: float


class Judge:
    """The evaluation data with the dense model's answers.

    Attributes:
        answers: how many there are.
        dense: figures of the dense model.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._right = torch.cat([right.flatten() for _, right in task.evaluation])
        self._wanted = self._ask(task.model)
        self.answers = len(self._right)
        self.dense = self._compare(self._wanted)

    def figures(self, model: nn.Module) -> Figures:
        """Evaluate a model."""
        return self._compare(self._ask(model))

    def _compare(self, batches: Sequence[Tensor]) -> Figures:
        given = torch.cat(list(batches))
        right = (given.argmax(-1) == self._right).double().mean()
        nats = F.nll_loss(given, self._right)
        return Figures(float(100 * right), float(nats.double().exp()), divergence(self._wanted, [given]))

    def _ask(self, model: nn.Module) -> list[Tensor]:
        return answers(model, (inputs for inputs, _ in self._task.evaluation))


def answers(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Log-probabilities for each batch, [answers, classes]."""
    with torch.inference_mode():
        return [model(batch).flatten(0, -2).log_softmax(-1) for batch in batches]


def divergence(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the answers given from those wanted."""
    return float(F.kl_div(torch.cat(list(given)), torch.cat(list(wanted)), reduction="batchmean", log_target=True))
