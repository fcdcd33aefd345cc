"""Where and how a graph uses a site."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import site_input
from balf_fx.graph.parameters import bias_takes_time, get_tensor
from balf_fx.graph.site import Site
from balf_fx.latency.operations import Use


def use_of(graph_module: fx.GraphModule, site: Site, node: fx.Node, compiled: bool = False) -> Use:
    """How a node uses a site, from the shapes of its input and output.

    Args:
        compiled: whether inductor compiles the graph: on a CPU, it gives images to convolutions features last. It also
            fuses the biases of low-rank maps with what follows.
    """
    weight: Tensor = get_tensor(graph_module, site.weight)
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    before, after = annotation(site_input(node)).shape or (), annotation(node).shape or ()
    layout = (last and not weight.is_contiguous()) or (compiled and weight.dim() == 4 and weight.device.type == "cpu")
    apart = compiled and bias_takes_time(weight)
    return Use(_positions(site, before), _positions(site, after), weight.dtype, weight.device, layout, apart)


def _positions(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of a value without its features."""
    if site.conv is None:
        return (max(torch.Size(shape[:-1]).numel(), 1),)
    axes = len(site.conv.kernel_size)
    samples = shape[: len(shape) - axes - 1]  # a convolution takes a sample without a batch, too
    return (torch.Size(samples).numel(), *shape[len(shape) - axes :])
