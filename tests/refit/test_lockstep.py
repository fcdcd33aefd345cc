import torch
from torch import fx, nn

from balf_fx.refit.lockstep import Lockstep, without_ends


class Ends(nn.Module):
    """Ends in values of one value and of two, and changes a value in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x).relu()
        z = self.second(y)
        y.neg_()
        return {"one": z.double().exp(), "two": y.sigmoid() + z, "layer": z}


def test_nodes_that_only_make_the_output_of_one_value_are_left_out():
    graph_module = fx.symbolic_trace(Ends())
    nodes = list(graph_module.graph.nodes)
    layers = {node for node in nodes if node.op == "call_module"}
    (output,) = graph_module.graph.find_nodes(op="output")
    kept = [node.name for node in without_ends(graph_module, nodes[:-1], layers, {output})]
    assert kept == ["x", "first", "relu", "second", "neg_", "sigmoid", "add"]


def test_layers_and_what_others_read_stay():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    nodes = list(graph_module.graph.nodes)[:-1]
    (output,) = graph_module.graph.find_nodes(op="output")
    assert without_ends(graph_module, nodes, {nodes[1], nodes[3]}, {output}) == nodes
    assert without_ends(graph_module, nodes, {nodes[1], nodes[3]}, set()) == nodes


def test_a_placeholder_that_one_batch_is_not_handed_has_its_own_value_there():
    class Doubled(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    graph_module = fx.symbolic_trace(Doubled())
    x, doubled, added, _ = graph_module.graph.nodes
    seen = []
    walk = Lockstep(graph_module, [{"x": torch.ones(1)}, {"x": torch.ones(1)}], [{"x": torch.zeros(1)}, {}])

    def replace(node):
        assert walk.moved == {x, doubled}
        seen.extend((float(batch.before(doubled)), float(batch.current(doubled))) for batch in walk.batches())

    walk.run([x, doubled, added], {added}, replace)
    assert seen == [(2, 0), (2, 2)]
