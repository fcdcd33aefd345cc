"""Pure tensor functions that compute spectra and factors from statistics and a weight.

Shapes (see `graph.site`): a weight is [G, O, D], covariances are [G, O, O] of the output W x or [G, D, D] of the input
x, energies are [G, m] with m = min(O, D) or O. Everything is float64 on the device of its input.

The one-shot optimum. Let y = W x + b, and let U_r be the leading r eigenvectors of C = Cov(W x). The rank-r affine map
y' = W' x + b' that minimises E|y - y'|^2 is

    W' = U_r U_r^T W,    b' = b + (I - U_r U_r^T) E[W x],

and its error is the sum of the dropped eigenvalues of C. Whitening x, truncating the SVD and unwhitening (BALF, arXiv
2509.25136) gives the same subspace and the same error, but needs an inverse. Here nothing is inverted, so singular
statistics need no special case.

Sensitivity. Let g be the gradient of the loss at the output and S S = E[g g^T]. Then E|S (y - y')|^2 weights errors by
the sensitivity of the loss to them. With U_r the leading eigenvectors of S C S, the optimum is

    W' = S^-1 U_r U_r^T S W.

S is damped, so that it is invertible, and scaled to a mean square of 1, so that energies are comparable with those of
the plain optimum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balf_fx.graph.curves import Spectrum
from balf_fx.ranks.hulls import lower_hull, segments

_SINGULAR = 1e-6
"""Pivots of a Cholesky factor below this share of the largest one are rounding errors of zeros."""


_DEPENDENT = 1e-3
"""Where some diagonal entry of R is below this share of the largest one, Q R is not computed from W^T W."""


def in_parts(value: Tensor, parts: int) -> Tensor:
    """[G, O, ...] split along O into [G * parts, O / parts, ...]."""
    return value.reshape(value.shape[0] * parts, value.shape[1] // parts, *value.shape[2:])


def diagonal_blocks(matrix: Tensor, parts: int) -> Tensor:
    """The blocks [G * parts, O / parts, O / parts] on the diagonal of [G, O, O]."""
    groups, size = matrix.shape[0], matrix.shape[1] // parts
    blocks = matrix.reshape(groups, parts, size, parts, size).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1).reshape(groups * parts, size, size)


def thin_qr(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q [..., O, m] and R [..., m, D] with W = Q R, where R has no negative number on its diagonal.

    For a tall W of full rank, R is the Cholesky factor of W^T W and Q = W R^-1: products of matrices, up to three times
    as fast as reflections. The rounding error of Q^T Q grows with the square of W's condition (Yamamoto et al. 2015,
    "Roundoff error analysis of the CholeskyQR2 algorithm"), so others are decomposed by reflections.
    """
    triangle = _tall_triangle(weight)
    if triangle is None:
        return _reflected(weight)
    identity = torch.eye(triangle.shape[-1], dtype=weight.dtype, device=weight.device).expand_as(triangle)
    return weight @ torch.linalg.solve_triangular(triangle, identity, upper=True), triangle


def thin_triangle(weight: Tensor) -> Tensor:
    """R of `thin_qr` alone."""
    triangle = _tall_triangle(weight)
    if triangle is not None:
        return triangle
    reflected: Tensor = torch.linalg.qr(weight, mode="r")[1]
    return reflected * _signs(reflected).unsqueeze(-1)


def _reflected(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of `thin_qr` by reflections."""
    basis, triangle = torch.linalg.qr(weight)
    signs = _signs(triangle)
    return basis * signs.unsqueeze(-2), triangle * signs.unsqueeze(-1)


def _signs(triangle: Tensor) -> Tensor:
    """The signs [..., m] on the diagonal of R; 1 for zero."""
    signs: Tensor = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return signs.to(triangle)


def _tall_triangle(weight: Tensor) -> Tensor | None:
    """R, if W has at least twice as many rows as columns and is so well-conditioned that R is that of W^T W."""
    rows, columns = weight.shape[-2:]
    if rows < 2 * columns:
        return None
    lower, failed = torch.linalg.cholesky_ex(weight.mT @ weight)
    sizes = lower.diagonal(dim1=-2, dim2=-1)
    independent = not bool(failed.any()) and bool((sizes.amin(-1) > _DEPENDENT * sizes.amax(-1)).all())
    triangle: Tensor = lower.mT
    return triangle if independent else None


def _descending_eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., m], descending and clamped at zero, and eigenvectors [..., m, m] as columns in that order."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def damped_roots(gradient: Tensor, damping: float, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A root S of the damped second moment M of gradients, S^T S = M, and its inverse.

    It is the transposed Cholesky factor, or the symmetric root where M is singular up to rounding, with the smallest
    eigenvalues raised so that it has an inverse. Roots differ by rotations, which change no energy and no product of
    factors.

    Args:
        gradient, damping, unit: as in `damped`.

    Returns:
        S and S^-1, [G, m, m].
    """
    metric = damped(gradient, damping, unit)
    lower, failed = torch.linalg.cholesky_ex(metric)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    if not bool(failed.any()) and bool((pivots.amin(-1) > _SINGULAR * pivots.amax(-1)).all()):
        identity = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device).expand_as(metric)
        return lower.mT, torch.linalg.solve_triangular(lower, identity, upper=False).mT
    values, vectors = _descending_eigh(metric)
    roots = torch.maximum(values, _SINGULAR**2 * values[..., :1]).sqrt().unsqueeze(-2)
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT


def damped(gradient: Tensor, damping: float, unit: Tensor | None = None) -> Tensor:
    """The metric M [G, m, m] of errors: the second moment of gradients, scaled and with a share of the unit added.

    Args:
        gradient: E[g g^T] [G, m, m]; where its unit is zero, M is the identity.
        damping: the share of the unit that is added to each eigenvalue.
        unit: [G, 1], the eigenvalue that is scaled to 1; None for the mean eigenvalue, so that M has trace m.
    """
    unit = gradient.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) if unit is None else unit
    unit = unit.unsqueeze(-1)
    identity = torch.eye(gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    scaled = (gradient + gradient.mT) / (2 * torch.where(unit > 0, unit, 1.0))
    return torch.where(unit > 0, (scaled + damping * identity) / (1 + damping), identity)


def held_out_errors(spectrum: Spectrum, covariance: Tensor, mean: Tensor | None, metric: Tensor) -> Tensor:
    """The error of each rank on other samples than those of the spectrum, [G, m + 1].

    The error is E tr M (y - L_r R_r y)(y - L_r R_r y)^T around the spectrum's own mean. It is computed for all r at
    once, since its three terms are cumulative sums.

    Args:
        covariance, mean: the moments of y on the other samples, [G, m, m] and [G, m]; the covariance is uncentred if
            the spectrum has no mean.
        metric: M [G, m, m], the metric of errors on the other samples.
    """
    left, right = spectrum.maps(spectrum.energies.shape[-1])
    if mean is not None and spectrum.mean is not None:
        shift = (mean - spectrum.mean).unsqueeze(-1)
        covariance = covariance + shift @ shift.mT
    whole = (metric * covariance).sum((-2, -1)).unsqueeze(-1)
    seen, weighed = right @ covariance, metric @ left
    crossed = (seen * weighed.mT).sum(-1).cumsum(-1)
    squared = (left.mT @ weighed) * (seen @ right.mT)
    squared = squared.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    return torch.cat([whole, whole - 2 * crossed + squared], -1).clamp_min(0)


def convex_energies(errors: Tensor) -> Tensor:
    """Descending energies [G, m] whose tail sums are the largest convex function below the errors [G, m + 1]."""
    energies = torch.zeros_like(errors[..., 1:])
    ranks = range(errors.shape[-1])
    for own, row in zip(energies, errors.tolist(), strict=True):
        hull = lower_hull(ranks, row)
        for (gain, right), left in zip(segments(ranks, row, hull), hull, strict=False):
            own[left:right] = gain
    return energies


def spectrum_from_output(
    covariance: Tensor, mean: Tensor | None, roots: tuple[Tensor, Tensor] | None = None
) -> Spectrum:
    """The optimum from the second moment of W x itself.

    Args:
        covariance: [G, O, O], centred or not.
        mean: E[W x] [G, O], for the correction of the bias; None leaves the bias unchanged.
        roots: S and S^-1 [G, O, O], which weight errors by the sensitivity of the loss: the error e costs |S e|^2;
            None for plain squared errors.
    """
    if roots is None:
        energies, left = _descending_eigh(covariance)
        return Spectrum(energies, left, mean)
    root, inverse = roots
    energies, vectors = _descending_eigh(root @ covariance @ root.mT)
    return Spectrum(energies, inverse @ vectors, mean, vectors.mT @ root)


def spectrum_from_input(
    weight: Tensor, covariance: Tensor, mean: Tensor | None, roots: tuple[Tensor, Tensor] | None = None
) -> Spectrum:
    """The same optimum from the second moment of x, cheaper where D < O.

    With W = Q R from `thin_qr`, the output W x lies in the m-dimensional range of Q, m = min(O, D), and
    |W x| = |R x|. So if V are the eigenvectors of R Cov(x) R^T [G, m, m], Q V are those of Cov(W x).

    Args:
        weight: W [G, O, D].
        covariance: [G, D, D], centred or not; or [1, D, D] for all groups of the weight.
        mean: E[x] [G, D] or [1, D], for the correction of the bias; None leaves the bias unchanged.
        roots: S and S^-1 [G, m, m] of the gradient Q^T g in the range of Q.
    """
    output_mean = None if mean is None else (weight @ mean.unsqueeze(-1)).squeeze(-1)
    if roots is None and weight.shape[-2] <= weight.shape[-1]:  # Q is square: a rotation, which changes nothing
        return spectrum_from_output(weight @ covariance @ weight.mT, output_mean)
    triangle = _tall_triangle(weight)
    tall = triangle is not None
    if triangle is None:
        weight, triangle = _reflected(weight)  # Q in place of W, which is large for a layer with many outputs
    inner = spectrum_from_output(triangle @ covariance @ triangle.mT, output_mean, roots)
    left, right = inner.left, inner.right
    if tall:  # Q V = W R^-1 V: one product with W in place of one with W and one with Q
        left = torch.linalg.solve_triangular(triangle, left, upper=True)
        right = None if right is None else torch.linalg.solve_triangular(triangle, right.mT, upper=True).mT
    return Spectrum(inner.energies, weight @ left, output_mean, None if right is None else right @ weight.mT)


def lifted(spectrum: Spectrum, weight: Tensor) -> Spectrum:
    """The spectrum of W x, given that of R x, for W = Q R from `thin_qr`: W is [G, O, D]."""
    basis = thin_qr(weight)[0]
    mean = None if spectrum.mean is None else (basis @ spectrum.mean.unsqueeze(-1)).squeeze(-1)
    right = None if spectrum.right is None else spectrum.right @ basis.mT
    return Spectrum(spectrum.energies, basis @ spectrum.left, mean, right)


def spectrum_from_weight(weight: Tensor) -> Spectrum:
    """The plain truncated SVD of W [G, O, D], as if x were white: energies are squared singular values."""
    left, singular, _ = torch.linalg.svd(weight, full_matrices=False)
    return Spectrum(singular.square(), left, None)


def tail_energies(energies: Tensor) -> list[float]:
    """Distortion at ranks 0, 1, .., m: the sum of the dropped energies [G, m] over all groups."""
    dropped = energies.sum(0).flip(0).cumsum(0).flip(0)
    return [*dropped.tolist(), 0.0]


def shared_energies(energies: Tensor, count: float | Tensor, kept: Sequence[int]) -> Tensor:
    """The energies of groups with different positions, [G, m], as means over the positions of all groups.

    Args:
        count: the number of positions of each group, [G].
        kept: groups without an error, since they keep their matrices.
    """
    counts = torch.as_tensor(count, dtype=energies.dtype, device=energies.device).expand(len(energies))
    shared = energies * (counts / counts.sum()).unsqueeze(-1)
    shared[list(kept)] = 0
    return shared


def factors(weight: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r factors A [G, O, r] and B [G, r, D] with W' = A B."""
    left, right = spectrum.maps(rank)
    return left, right @ weight


def corrected_bias(bias: Tensor | None, spectrum: Spectrum, rank: int) -> Tensor | None:
    """b + (I - L R) E[W x] with W' = L R W, float64 [G, O].

    The mean contribution of the dropped components is added to the bias.

    Args:
        bias: [G, O] float64 or None.
    """
    if spectrum.mean is None:
        return bias
    left, right = spectrum.maps(rank)
    mean = spectrum.mean.unsqueeze(-1)
    lost = (mean - left @ (right @ mean)).squeeze(-1)
    return lost if bias is None else bias + lost
