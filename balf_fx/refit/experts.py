"""The regression of a layer of experts: each expert on the rows that it sees."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.graph.experts import ExpertProduct
from balf_fx.graph.operators import operation
from balf_fx.refit.lockstep import Batch, Lockstep
from balf_fx.refit.regression import best
from balf_fx.refit.sums import Joint, JointSums, Shares

_HELD_OUT = 4  # one row in four


def refit_experts(
    walk: Lockstep, product: ExpertProduct, weight: Tensor, prior: Solution, spectrum: Spectrum
) -> Solution:
    """The factors of each expert, solved for the compressed model's inputs; as before where that is no better.

    An expert's last rows in each batch, a quarter of all, are held out. All rows count alike, and the target is the
    original's output. An expert that keeps its matrix or has seen fewer than four rows is not solved, and neither is a
    product that adds a bias.

    Args:
        weight: [E, O, D], toward which the ridge shrinks.
        prior: the solution so far, with factors.
    """
    biased = operation(product.node) == "baddbmm"
    same = all(_same_rows(product, batch) for batch in walk.batches())
    if prior.left is None or biased or not all(walk.group.gathered(same)):
        return prior
    shares = _sums(walk, product, (weight.shape[1], weight.shape[2]))
    left, right = prior.left.clone(), prior.right.clone()
    kept = () if prior.kept is None else prior.kept.experts
    for sums in (*shares[0], *shares[1]):
        sums.merge(walk.group)
    solved = [each for each in range(len(left)) if each not in kept and all(share[each].count for share in shares)]

    def solve(expert: int) -> Solution:
        own = slice(expert, expert + 1)
        old = Solution(left[own], right[own], None)
        train, held_out = (share[expert].joint() for share in shares)
        return _best(train, held_out, weight[own], old, spectrum.only(expert))

    for expert, found in zip(solved, walk.group.shared_out(solved, [1.0] * len(solved), solve), strict=True):
        if found.left is not None:
            left[expert], right[expert] = found.left[0], found.right[0]
    return Solution(left, right, prior.bias, prior.kept)


def _best(train: Joint, held_out: Joint, toward: Tensor, prior: Solution, spectrum: Spectrum) -> Solution:
    (found,) = best(Shares(train.uncentred(), held_out.uncentred()), toward, (prior,), (spectrum,)).solution
    return found


def _same_rows(product: ExpertProduct, batch: Batch) -> bool:
    """Whether both models send the same rows to each expert."""
    return product.assignment is None or torch.equal(
        batch.before(product.assignment), batch.current(product.assignment)
    )


def _sums(walk: Lockstep, product: ExpertProduct, shape: tuple[int, int]) -> tuple[list[JointSums], list[JointSums]]:
    """The sums over each expert's training and held-out rows.

    Args:
        shape: O and D.
    """
    outputs, inputs = shape
    node: fx.Node = product.node
    device = walk.graph_module.get_parameter(str(product.source.target)).device
    train, held_out = (
        [JointSums((1, inputs), (1, outputs), device) for _ in range(product.rows.experts)] for _ in range(2)
    )
    seen = [0] * product.rows.experts
    for batch in walk.batches():
        assignment = None if product.assignment is None else batch.before(product.assignment)
        read = product.rows.split(batch.current(product.input), "input", assignment)
        wanted = product.rows.split(batch.before(node), "output", assignment)
        for expert, (x, y) in enumerate(zip(read, wanted, strict=True)):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).mT.unsqueeze(0)
            y = y.to(x.dtype).mT.unsqueeze(0)
            rows = x.shape[-1]
            cut = rows - ((seen[expert] + rows) // _HELD_OUT - seen[expert] // _HELD_OUT)
            seen[expert] += rows
            for sums, part in ((train[expert], slice(None, cut)), (held_out[expert], slice(cut, None))):
                if x[..., part].shape[-1]:
                    sums.add(x[..., part], y[..., part], None)
    return train, held_out
