"""The sensitivity of a model's output to errors at every site: gradients of a loss without labels.

The loss is the divergence of the compressed model's output z from the original's. To second order it is
1/2 E (dz)^T H (dz), where dz is the error of z. Let L L^T = H and let v be random with E[v v^T] = I. Then the gradient
g of the probe (L v)^T z at a site's output satisfies E[g g^T] = J^T H J, where J is the Jacobian of z with respect to
that output: E[g g^T] is the Gauss-Newton matrix there.

For logits the loss is the Kullback-Leibler divergence of softmax(z), whose H = diag(p) - p p^T has the root
L = diag(sqrt p) - p sqrt(p)^T. Where the model is confident of its prediction, H is nearly zero, although an error
that is large enough to change the prediction costs much. So p is the softmax of z / 4, which is less confident. For
other outputs the loss is the squared error relative to the output's mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from balf_fx.calibration.batches import Calibration, graphs_of, run_batch, sample_count, samples_of
from balf_fx.calibration.observers import InfluenceObserver, Recorded, SensitivityObserver
from balf_fx.calibration.outputs import element_weights, find_logits, loss_given, real_leaves
from balf_fx.calibration.weights import Weights, counted
from balf_fx.errors import ModelError, NonFiniteError
from balf_fx.graph.parameters import get_tensor, is_quantized

TEMPERATURE = 4.0
"""What logits are divided by for the curvature of their loss; with 1, it would be that of infinitesimal errors."""


def observe_gradients(
    prepared: nn.Module,
    batch: Any,
    calibration: Calibration,
    index: int,
    generator: torch.Generator,
    weights: Weights | None = None,
) -> bool:
    """Run one batch through a prepared graph and observe the gradients of the loss at its sites and their weights.

    Args:
        index: the index of the batch, for messages.
        generator: a CPU generator that draws the probe.
        weights: the weights of the outputs; None if all positions count.

    Returns:
        Whether a gradient has reached any site or weight.

    Raises:
        CalibrationError: the model cannot run the batch, or the user's loss is not a scalar.
    """
    observers = [module for module in prepared.modules() if isinstance(module, SensitivityObserver)]
    with recording(observers, batch) as records, differentiable(prepared), torch.enable_grad():
        output = run_batch(prepared, batch, calibration.forward, index, gradients=True)
        scalar = loss_of(output, batch, calibration, index, generator, weights)
        share = 1.0 if calibration.loss is None else 1.0 / samples_of(batch)
        wanted = [*outputs(records), *_weights(prepared, share)]
        return take_gradients([(scalar, None)], wanted)


def loss_of(
    output: Any,
    batch: Any,
    calibration: Calibration,
    index: int,
    generator: torch.Generator,
    weights: Weights | None = None,
) -> Tensor:
    """The scalar whose gradients are observed: the sum of the user's loss over samples, or the probe.

    Arguments as in `observe_gradients`.
    """
    if calibration.loss is None:
        return probe(output, batch, generator, weights)
    scalar = loss_given(calibration.loss, output, batch)
    if not torch.isfinite(scalar).all():
        raise NonFiniteError(f"loss(output, batch) is {float(scalar.detach())} for calibration batch {index}")
    return scalar * samples_of(batch)  # of a mean: in a small batch, each sample's share of it is larger


def check_gradients(graph_module: fx.GraphModule) -> None:
    """Check that gradients flow through every layer.

    They do not flow through quantized layers that round their inputs too, so the sensitivity of earlier layers would
    be underestimated.

    Raises:
        ModelError: a layer lets no gradients through; names the first one.
    """
    for name, weight in graph_module.named_parameters():
        if is_quantized(weight) and not _passes_gradients(weight):
            raise ModelError(
                f"no gradient flows through {name} ({type(weight.data).__name__}), whose layer rounds its inputs: pass "
                "effort='fast', which needs no gradients, or compress the float model first and then quantize it"
            )


def _passes_gradients(weight: Tensor) -> bool:
    """Whether gradients flow through a linear layer with this weight; False for other layers, which are not tested."""
    if weight.dim() != 2:
        return False
    value = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        return F.linear(value, weight).requires_grad


Wanted = tuple[Tensor, Callable[[Tensor], None]]
"""A tensor, and the function that receives its gradient."""


Records = Sequence[tuple[SensitivityObserver, Sequence[Recorded]]]
"""Observers, each with what it has recorded."""


@contextmanager
def recording(observers: Iterable[SensitivityObserver], batch: Any, number: int | None = None) -> Iterator[Records]:
    """Let observers record the values of the calls on a batch during the context.

    Args:
        number: as in `SensitivityObserver.recording`.
    """
    samples = sample_count(batch)
    with ExitStack() as stack:
        yield [(observer, stack.enter_context(observer.recording(samples, number))) for observer in observers]


def take_gradients(ends: Sequence[tuple[Tensor, Tensor | None]], wanted: Sequence[Wanted]) -> bool:
    """Differentiate tensors and hand over the gradients.

    Args:
        ends: the tensors with the gradients at them, None for that of a scalar, 1.

    Returns:
        Whether there is a gradient at any wanted tensor.
    """
    if not wanted or not any(end.requires_grad for end, _ in ends):
        return False
    values, given = zip(*ends, strict=True)
    gradients = torch.autograd.grad(values, [tensor for tensor, _ in wanted], given, allow_unused=True)
    for (_, take), gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            take(gradient)
    return any(gradient is not None for gradient in gradients)


def outputs(records: Records) -> Iterator[Wanted]:
    """The outputs of the sites in the batch that has just run."""
    for observer, recorded in records:
        for values in recorded:
            yield values.output, partial(observer.take, values)


def _weights(prepared: nn.Module, share: float) -> Iterator[Wanted]:
    """The weights whose gradients are observed, times a share: of the mean loss of a batch, as AIR has them."""
    for graph_module in graphs_of(prepared):
        for observer in graph_module.modules():
            if isinstance(observer, InfluenceObserver):
                weight: Tensor = get_tensor(graph_module, observer.site.weight)
                if weight.requires_grad:
                    yield weight, partial(_take_share, observer, share)


def _take_share(observer: InfluenceObserver, share: float, gradient: Tensor) -> None:
    observer.take(gradient * share)


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Enable gradients, even if the parameters are frozen."""
    frozen = [p for p in module.parameters() if not (p.requires_grad or is_quantized(p)) and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def probe(output: Any, batch: Any, generator: torch.Generator, weights: Weights | None = None) -> Tensor:
    """A scalar whose gradient at the output is L v, for a random v (see the module's docstring).

    Args:
        weights: the weights of the output's positions, by which the loss is weighted; None if all count. Random
            numbers are only drawn for positions that count, so that padding does not change them.
    """
    logits = find_logits(output, batch)
    if logits is not None and logits.requires_grad:
        (rows,), scale = counted((logits,), None if weights is None else weights.of(logits, rows=True), rows=True)
        p = (rows.detach() / TEMPERATURE).softmax(-1)
        direction = _normal(rows, generator).mul_(p.sqrt())  # in place, since logits of many words are large
        direction -= p.mul_(direction.sum(-1, keepdim=True))
        return (rows * (direction if scale is None else direction * scale.sqrt().to(p).unsqueeze(-1))).sum()
    leaves = [leaf for leaf in real_leaves(output) if leaf.requires_grad]
    terms = []
    for leaf, own in zip(leaves, element_weights(leaves, weights), strict=True):
        (values,), counts = counted((leaf,), own)
        random, scale = _accurate(_normal(values, generator)), _scale(leaf, own)
        random = random if counts is None else random * counts.sqrt().to(random)
        if scale > 0:  # an output of zeros, as of a black image in a net without biases, has no gradient
            terms.append((values * (random / scale)).sum())
    if not terms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    return torch.stack([term.float() for term in terms]).sum()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers, drawn on the CPU in float32, so that a seed gives the same probe everywhere."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like.device, like.dtype)


def _accurate(value: Tensor) -> Tensor:
    """The value in float32, unless it is in float64."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _scale(leaf: Tensor, weights: Tensor | None) -> Tensor:
    """The square root of the sum of squares of a sample's outputs, averaged over samples, float64.

    Args:
        weights: those of the leaf's elements, flattened; None for 1 each.
    """
    squares, samples = leaf.detach().to(torch.float64), max(leaf.shape[0] if leaf.dim() else 1, 1)
    if weights is not None:
        samples = max(int((weights.reshape(samples, -1) > 0).any(1).sum()), 1)
        (squares,), weights = counted((squares,), weights)
    squares = squares.square() if weights is None else squares.square() * weights.to(squares)
    return squares.sum().div(samples).sqrt()
