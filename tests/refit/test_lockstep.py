"""What a walk over two models leaves out."""

from torch import fx, nn

from balf_fx.refit.lockstep import without_ends


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
