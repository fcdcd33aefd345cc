"""Layers with one matrix for each expert, in the forms in which models write them."""

import torch
from torch import nn
from torch.nn import functional as F

EXPERTS, INPUTS, OUTPUTS = 3, 16, 24


class ExpertLayer(nn.Module):
    """Experts on rows of [..., INPUTS], chosen or weighted by a router.

    Args:
        inputs_first: whether the weight is [E, D, O] rather than [E, O, D].
    """

    def __init__(self, inputs_first=True, outputs=OUTPUTS):
        super().__init__()
        self.inputs_first = inputs_first
        shape = (INPUTS, outputs) if inputs_first else (outputs, INPUTS)
        self.router = nn.Linear(INPUTS, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, *shape) / 4)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 1, outputs))

    def columns(self):
        """The weight as [E, D, O]."""
        return self.weight if self.inputs_first else self.weight.transpose(1, 2)

    def rows(self):
        """The weight as [E, O, D]."""
        return self.weight.transpose(1, 2) if self.inputs_first else self.weight

    def forward(self, x):
        flat = x.reshape(-1, INPUTS)
        return self.combine(flat, self.router(flat))


class Selected(ExpertLayer):
    def combine(self, x, scores):
        return torch.bmm(x.unsqueeze(1), self.columns()[scores.argmax(-1)]).squeeze(1)


class SelectedLeft(ExpertLayer):
    def combine(self, x, scores):
        return torch.bmm(torch.index_select(self.rows(), 0, scores.argmax(-1)), x.unsqueeze(-1)).squeeze(-1)


class SelectedTwo(ExpertLayer):
    def combine(self, x, scores):
        best, chosen = scores.topk(2, -1)
        equation = "bd,bkdo->bko" if self.inputs_first else "bd,bkod->bko"
        return (torch.einsum(equation, x, self.weight[chosen]) * best.softmax(-1).unsqueeze(-1)).sum(1)


class Grouped(ExpertLayer):
    def combine(self, x, scores):
        chosen = scores.argmax(-1)
        order = torch.argsort(chosen, stable=True)
        ends = torch.cumsum(F.one_hot(chosen, EXPERTS).sum(0), 0, dtype=torch.int32)
        y = F.grouped_mm(x[order], self.columns(), offs=ends)
        return torch.zeros_like(y).index_copy(0, order, y)


class Dense(ExpertLayer):
    """Every expert runs on all rows."""

    def combine(self, x, scores):
        return (self.every(x) * scores.softmax(-1).t().unsqueeze(-1)).sum(0)


class Batched(Dense):
    def every(self, x):
        return torch.bmm(x.unsqueeze(0).expand(EXPERTS, -1, -1), self.columns())


class BatchedLeft(Dense):
    def every(self, x):
        return torch.bmm(self.rows(), x.t().unsqueeze(0).expand(EXPERTS, -1, -1)).transpose(1, 2)


class BatchedWithBias(Dense):
    def every(self, x):
        return torch.baddbmm(self.bias, x.unsqueeze(0).expand(EXPERTS, -1, -1), self.columns())


class BatchedLeftWithBias(Dense):
    def every(self, x):
        return torch.baddbmm(self.bias.mT, self.rows(), x.t().expand(EXPERTS, -1, -1)).transpose(1, 2)


class Product(Dense):
    def every(self, x):
        return x @ self.columns()


class Broadcast(Dense):
    def every(self, x):
        return (x.reshape(2, 1, -1, INPUTS) @ self.columns().unsqueeze(0)).transpose(0, 1).flatten(1, 2)


class Einsum(Dense):
    def every(self, x):
        return torch.einsum("bd,edo->ebo" if self.inputs_first else "bd,eod->ebo", x, self.weight)


class EinsumLeft(Dense):
    def every(self, x):
        return torch.einsum("edo,bd->beo" if self.inputs_first else "eod,bd->beo", self.weight, x).transpose(0, 1)


class EinsumOwn(Dense):
    def every(self, x):
        own = x.expand(EXPERTS, -1, -1)
        return torch.einsum("ebd,edo->ebo" if self.inputs_first else "ebd,eod->ebo", own, self.weight)


CHOSEN = [Selected, SelectedLeft, SelectedTwo, *([Grouped] if hasattr(F, "grouped_mm") else [])]
DENSE = [Batched, BatchedLeft, BatchedWithBias, BatchedLeftWithBias, Product, Broadcast, Einsum, EinsumLeft, EinsumOwn]
FORMS = [*CHOSEN, *DENSE]


class Mixture(nn.Module):
    """A small classifier of sequences with a layer of gated experts, each [E, O, D], on a residual stream."""

    def __init__(self, features=24, hidden=32, experts=4, grouped=False):
        super().__init__()
        self.experts, self.grouped = experts, grouped
        self.stem = nn.Linear(16, features)
        self.router = nn.Linear(features, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, features) / features**0.5)
        self.down = nn.Parameter(torch.randn(experts, features, hidden) / hidden**0.5)
        self.head = nn.Linear(features, 10)

    def forward(self, x):
        h = self.stem(x)
        flat = h.reshape(-1, h.shape[-1])
        best, chosen = self.router(flat).softmax(-1).topk(2, -1)
        run = self.in_groups if self.grouped else self.in_rows
        y = run(flat, chosen) * best.unsqueeze(-1)
        return self.head((h + y.sum(1).reshape(h.shape)).mean(1))

    def in_rows(self, x, chosen):
        ids = chosen.reshape(-1)
        rows = x.repeat_interleave(2, dim=0).unsqueeze(-1)
        hidden = torch.relu(torch.bmm(self.up[ids], rows))
        return torch.bmm(self.down[ids], hidden).squeeze(-1).reshape(-1, 2, x.shape[-1])

    def in_groups(self, x, chosen):
        ids, order = torch.sort(chosen.reshape(-1), stable=True)
        ends = torch.cumsum(F.one_hot(ids, self.experts).sum(0), 0, dtype=torch.int32)
        hidden = torch.relu(F.grouped_mm(x[order // 2], self.up.transpose(1, 2), offs=ends))
        y = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=ends)
        return torch.zeros_like(y).index_copy(0, order, y).reshape(-1, 2, x.shape[-1])


class Loop(nn.Module):
    """Experts that are layers of their own: all run on every row or, with `chosen`, each on the rows that choose it."""

    def __init__(self, chosen, experts=4, features=24):
        super().__init__()
        self.chosen = chosen
        self.stem = nn.Linear(16, features)
        self.router = nn.Linear(features, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(features, 48), nn.ReLU(), nn.Linear(48, features)) for _ in range(experts)
        )
        self.head = nn.Linear(features, 10)

    def forward(self, x):
        h = self.stem(x).flatten(0, 1)
        scores = self.router(h).softmax(-1)
        if not self.chosen:
            return self.head(sum(expert(h) * scores[:, i : i + 1] for i, expert in enumerate(self.experts)))
        best, chosen = scores.topk(2, -1)
        y = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == index)
            y = y.index_add(0, rows, expert(h[rows]) * best[rows, place].unsqueeze(-1))
        return self.head(h + y)
