"""Convolutions as two whose kernels read strips of pixels, and what was read at several places.

A kernel [O, C, h, w] is a matrix M with a row for each output and each of the w columns of the kernel, and a column for
each channel and each of its h rows. A rank r of M is a convolution of h x 1 to r channels, then one of 1 x w to the
outputs: W[o, c, i, j] = sum_r left[(o, j), r] right[r, (c, i)]. It has r (h C + w O) numbers (Jaderberg et al.,
arXiv 1405.3866). With all pixels of the kernel in one row, h = 1, the first convolution is 1 x 1, and the second has
the whole kernel: the pixels under it are read in fewer channels.

Such a convolution reads strips of h pixels, one for each j, and adds up what it makes of them. If the strips are
uncorrelated, with the same second moment S, the output error is that of M on strips, which its singular value
decomposition in the metric of S minimises. Where patches are known, which need not be uncorrelated, both factors are
then found by least squares in turn: the second exactly, the first by a few steps of conjugate gradients.

Everything is float64; kernels have one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.ranks.spectra import convex_energies

ROUNDS = 1
"""Of least squares for the first factor, then the second; more of them gain little."""

_STEPS = 3  # of conjugate gradients in a round, likewise
_SINGULAR = 1e-7  # directions in which strips vary less than this share of the most do not count


def strips_of(weight: Tensor, taps: tuple[int, int]) -> Tensor:
    """M [1, O w, C h] of kernels [1, O, C h w]."""
    h, w = taps
    kernel = weight.reshape(1, weight.shape[1], -1, h, w)
    return kernel.permute(0, 1, 4, 2, 3).reshape(1, weight.shape[1] * w, -1)


def kernels_of(matrix: Tensor, taps: tuple[int, int]) -> Tensor:
    """The inverse of `strips_of`: [1, O, C h w]."""
    h, w = taps
    kernel = matrix.reshape(1, matrix.shape[1] // w, w, -1, h)
    return kernel.permute(0, 1, 3, 4, 2).reshape(1, matrix.shape[1] // w, -1)


def whole(solution: Solution) -> Solution:
    """A solution with a divided kernel as a dense one; others as they are."""
    if not solution.divided or solution.left is None:
        return solution
    return Solution(None, kernels_of(solution.left @ solution.right, solution.taps), solution.bias)


def moment_of_strips(moment: Tensor, taps: tuple[int, int]) -> Tensor:
    """The second moment of strips [1, C h, C h] from that of patches [1, C h w, C h w], averaged over their columns."""
    h, w = taps
    channels = moment.shape[-1] // (h * w)
    columns = moment.reshape(channels, h, w, channels, h, w).diagonal(dim1=2, dim2=5)
    return columns.mean(-1).reshape(1, channels * h, channels * h)


def strips_spectrum(
    matrix: Tensor, moment: Tensor, mean: Tensor | None, taps: int, metric: Tensor | None, energy_metric: Tensor | None
) -> Spectrum:
    """The optimum for uncorrelated strips: of rank r, A = M left[..., :r] and B = right[..., :r, :].

    Args:
        matrix: M [1, O w, C h].
        moment: S [1, C h, C h], centred or not.
        mean: that of the strips [1, C h], for the correction of the bias; None leaves the bias unchanged.
        taps: w.
        metric: [1, O, O], that of errors of the outputs; None for plain squared errors.
        energy_metric: the metric in which energies are measured; None for the same.
    """
    values, left, right = _directions(_seen(matrix, metric, taps), moment)
    if energy_metric is not None:
        values = (left * (_seen(matrix, energy_metric, taps) @ left)).sum(-2)
        values = convex_energies(F.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1)))
    return Spectrum(values, left, mean, right)


def _seen(matrix: Tensor, metric: Tensor | None, taps: int) -> Tensor:
    """M^T (G x I) M [1, C h, C h], for a metric G of outputs at each of the columns."""
    if metric is None:
        return matrix.mT @ matrix
    weighed = metric @ matrix.reshape(1, -1, taps * matrix.shape[-1])
    return matrix.mT @ weighed.reshape(matrix.shape)


def _directions(seen: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies [1, m], descending, and L [1, C h, m] and R [1, m, C h], for which M L_r R_r is the best map of rank r.

    With a root K of the moment, L and R are K V and V^T K^-1 for the right singular vectors V of M K.

    Args:
        seen: M^T M [1, C h, C h], or M^T G M for a metric G of errors.
    """
    root, failed = torch.linalg.cholesky_ex(moment)
    sizes = root.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((sizes.amin(-1) > _SINGULAR * sizes.amax(-1)).all()):
        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        sizes = values.clamp_min(0).sqrt().unsqueeze(-2)
        root = vectors * sizes
        inverse = (vectors * torch.where(sizes > _SINGULAR * sizes.amax(-1, keepdim=True), 1 / sizes, 0.0)).mT
    else:
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    inner = root.mT @ seen @ root
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    turned = vectors.flip(-1)
    return values.flip(-1).clamp_min(0), root @ turned, turned.mT @ inverse


@dataclass(frozen=True)
class Patches:
    """The second moment C = P / n - m m^T + c I of patches; it is not formed, since it is large.

    Attributes:
        products: P [1, C h w, C h w].
        count: n.
        mean: m [1, C h w].
        added: c [1, 1, 1].
        taps: h and w.
    """

    products: Tensor
    count: float
    mean: Tensor
    added: Tensor
    taps: tuple[int, int]

    def strips(self) -> Tensor:
        """The second moment of strips [1, C h, C h], averaged over their columns."""
        w = self.taps[1]
        columns = self.mean.reshape(1, -1, w)
        found = moment_of_strips(self.products, self.taps) / self.count - columns @ columns.mT / w
        found.diagonal(dim1=-2, dim2=-1).add_(self.added.squeeze(-1))
        return found

    def after(self, rows: Tensor) -> Tensor:
        """Rows [m, C h w] times C."""
        mean, found = self.mean[0], rows @ self.products[0] / self.count
        return found.sub_(torch.outer(rows @ mean, mean)).add_(rows * self.added[0])

    def read(self, right: Tensor) -> Tensor:
        """What the first factor [1, r, C h] makes of C at each column, [1, w r, C h w]."""
        found, mean = _read(right, self.products, self.taps), _read(right, self.mean.unsqueeze(-1), self.taps)
        found.baddbmm_(mean, self.mean.unsqueeze(-2), beta=1 / self.count, alpha=-1)
        w = self.taps[1]
        own = found.view(w, right.shape[1], -1, w).diagonal(dim1=0, dim2=3)  # a column reads its own pixels
        own += (self.added * right)[0].unsqueeze(-1)
        return found


def divided_factors(
    full: Tensor, product: Tensor, patches: Patches, metric: Tensor, rank: int, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Factors [1, O w, r] and [1, r, C h] near a map M, for patches with the second moment C.

    Args:
        full, product: M and M C, [1, O, C h w].
        patches: C, positive definite.
        metric: R [1, m, O]; the first factor depends on the error R (y - y').
        rounds: how often both factors are found in turn, after the optimum for uncorrelated strips.
    """
    taps = patches.taps
    seen = _seen(strips_of(metric @ full, taps), None, taps[1])
    right = _directions(seen, patches.strips())[-1][..., :rank, :]
    left = _second_factor(right, product, patches)
    for _ in range(rounds):
        right = _first_factor(left, right, product, patches, metric)
        left = _second_factor(right, product, patches)
    return left.reshape(1, -1, rank), right


def _second_factor(right: Tensor, product: Tensor, patches: Patches) -> Tensor:
    """The best second factor [1, O, w r] behind a first one [1, r, C h]."""
    inner = _read(right, patches.read(right).mT, patches.taps)
    size = inner.diagonal(dim1=-2, dim2=-1).mean(-1)
    inner.diagonal(dim1=-2, dim2=-1).add_(1e-10 * size.unsqueeze(-1) + torch.finfo(inner.dtype).tiny)  # for zeros, too
    left: Tensor = torch.linalg.solve(inner, _read(right, product.mT, patches.taps)).mT
    return left


def _first_factor(left: Tensor, right: Tensor, product: Tensor, patches: Patches, metric: Tensor) -> Tensor:
    """A better first factor [1, r, C h] before a second one [1, O, w r]: a few steps of conjugate gradients."""
    (h, w), rank = patches.taps, right.shape[1]
    seen = (metric @ left)[0].reshape(-1, w, rank)

    def on_patches(first: Tensor) -> Tensor:
        """R left right [m, C h w]."""
        return torch.einsum("mjr,rci->mcij", seen, first.reshape(rank, -1, h)).flatten(1)

    def adjoint(value: Tensor) -> Tensor:
        return torch.einsum("mjr,mcij->rci", seen, value.reshape(len(seen), -1, h, w)).flatten(1)

    found = right[0]
    residual = adjoint((metric @ product)[0] - patches.after(on_patches(found)))
    direction, square = residual, residual.square().sum()
    least = torch.finfo(square.dtype).eps * square
    for _ in range(_STEPS):
        image = adjoint(patches.after(on_patches(direction)))
        curvature = (direction * image).sum()
        if square <= least or curvature <= 0:  # nothing is left to improve
            break
        step = square / curvature
        found, residual = found + step * direction, residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return found.unsqueeze(0)


def _read(right: Tensor, patches: Tensor, taps: tuple[int, int]) -> Tensor:
    """What the first factor [1, r, C h] makes of patches [1, C h w, n] at each column, [1, w r, n]."""
    (h, w), n = taps, patches.shape[-1]
    pixels = patches[0].reshape(-1, h, w, n)
    return torch.cat([right @ pixels[:, :, column].reshape(1, -1, n) for column in range(w)], 1)


def by_patch(left: Tensor, outputs: int) -> Tensor:
    """The second factor [1, O w, r] as a map of patches [1, O, r w]."""
    return left.reshape(outputs, -1, left.shape[-1]).transpose(1, 2).reshape(1, outputs, -1)


def by_column(weight: Tensor, taps: int) -> Tensor:
    """The inverse of `by_patch`: [1, O w, r]."""
    outputs = weight.shape[1]
    return weight.reshape(outputs, -1, taps).transpose(1, 2).reshape(1, outputs * taps, -1)
