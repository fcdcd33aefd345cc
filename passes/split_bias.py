"""Add the biases of factors in operations of their own, which a compiler fuses with what follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import Replaced, annotate, graph_record, record_graph
from balf_fx.graph.edits import MODULE_STACK
from balf_fx.graph.parameters import bias_takes_time, get_tensor, locate, put
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class SplitBias(Pass):
    """Take the bias out of each linear layer that `Factorize` wrote last in a chain, and add it to what it returns.

    On a CPU, a product in single or double precision with a bias first writes the bias to all outputs, and then reads
    them again: for two thin layers, this is a good part of their time. A sum of its own is fused with what follows by
    inductor, and in eager mode it works in place. In half precision, products add the bias themselves.

    The parameter stays beside its layer: that of `name.1` becomes `name.1_bias`, and an nn.Sequential around them an
    nn.ModuleList. The sum is written as a difference, since inductor puts a sum back into the product.

    Attributes:
        layers: the records of another run, whose biases are split in the same way; None finds the biases to split.
    """

    layers: tuple[Replaced, ...] | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        layers = self.layers
        if layers is None:
            found = graph_record(graph_module).replaced
            layers = tuple(replace(each, apart=tuple(_found(graph_module, each))) for each in found)
            record_graph(graph_module, replaced=layers)
        paths = [f"{layer.name}.{name}" for layer in layers for name in layer.apart]
        for path in paths:
            _split(graph_module, path)
        return PassResult(graph_module, bool(paths))


def _found(graph_module: fx.GraphModule, layer: Replaced) -> Iterator[str]:
    """The linear layers of a replacement whose biases are added apart, by their paths within it.

    Their names are numbers; a layer with other names was stored there by the model. The first is one of them where
    heads have identity blocks; otherwise the others read what it returns.
    """
    if layer.rank is None and layer.form != "blocks":
        return
    for name, module in graph_module.get_submodule(layer.name).named_modules():
        last = name.replace(".", "").isdigit() and (name != "0" or layer.form == "blocks")
        biased = isinstance(module, nn.Linear) and module.bias is not None
        if last and biased and bias_takes_time(module.get_parameter("weight")):
            yield name


def _split(graph_module: fx.GraphModule, path: str) -> None:
    """Move the bias of a linear layer out of it, and add it after each of its calls."""
    graph = graph_module.graph
    layer, (owner, name) = graph_module.get_submodule(path), locate(graph_module, path)
    if isinstance(owner, nn.Sequential):  # called as a whole, it would leave the bias out
        owner = _as_list(owner)
        put(graph_module, path.rpartition(".")[0], owner)
    owner.register_parameter(f"{name}_bias", get_tensor(graph_module, f"{path}.bias"))
    layer.register_parameter("bias", None)
    for node in graph.find_nodes(op="call_module", target=path):
        with graph.inserting_after(node):
            bias = graph.get_attr(f"{path}_bias")
        with graph.inserting_after(bias):
            added = graph.call_function(torch.sub, (node, bias), {"alpha": -1})
        node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
        around = {key: (where, _) for key, (where, _) in node.meta.get(MODULE_STACK, {}).items() if where != path}
        added.meta = {**node.meta, MODULE_STACK: around}  # no part of the layer, whose product quantizers look for
        annotate(added, overwrites=("call_method", "sub_"))


def _as_list(owner: nn.Sequential) -> nn.ModuleList:
    """The same modules, and the tensors beside them, in a module that cannot be called."""
    found = nn.ModuleList().train(owner.training)
    for name, module in owner.named_children():
        found.add_module(name, module)
    for name, parameter in owner.named_parameters(recurse=False):
        found.register_parameter(name, parameter)
    for name, buffer in owner.named_buffers(recurse=False):
        found.register_buffer(name, buffer)
    return found
