"""Blocks: cuts with the fewest bytes alive, against all choices; run one after another, they are the graph."""

import itertools
import random

import pytest
import torch
from architectures import Transformer
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.fx import Interpreter
from torch.fx.node import map_arg
from torch.nn import functional as F

from balf_fx.capture.normal_form import capture
from balf_fx.graph.blocks import alive_bytes, cut_positions, find_blocks, weight_bytes


class UNet(nn.Module):
    """A skip connection at each of two scales."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)])
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def forward(self, x):
        first = F.relu(self.down[0](x))
        second = F.relu(self.down[1](first))
        x = self.up[0](torch.cat([F.relu(self.middle(second)), second], 1))
        return self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))


class EncoderDecoder(nn.Module):
    """Each layer of the decoder reads what the encoder has computed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.decoder = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.cross = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x, y):
        for layer in self.encoder:
            x = F.relu(layer(x))
        for own, other in zip(self.decoder, self.cross, strict=True):
            y = F.relu(own(y) + other(x))
        return y


class Tied(nn.Module):
    """The first and the last layer have one weight, and a constant is computed from it."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(self.table(x))
        return x @ (self.table.weight.t() * 2.0)


IMAGE, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)
MODELS = {
    "chain": (lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4), nn.Linear(4, 8)), (ROWS,)),
    "residual": (lambda: randomise_batchnorm(ConvNet(8)), (IMAGE,)),
    "u-net": (UNet, (IMAGE,)),
    "encoder and decoder": (EncoderDecoder, (ROWS, ROWS + 1)),
    "tied": (Tied, (torch.randint(16, (2, 5)),)),
    "attention": (Transformer, (torch.randn(2, 6, 32),)),
}


def captured(name):
    build, batch = MODELS[name]
    model = build().eval()
    return capture(model, batch), model, batch


def run(graph_module, blocks, inputs):
    """The graph's output, where each block has only the values that it reads."""
    interpreter, handed = Interpreter(graph_module), {}
    given = iter(inputs)
    for block in blocks:
        values = {node: handed[node] for node in block.reads}
        for node in (*block.constants, *block.nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            own = node.op == "placeholder"
            values[node] = next(given) if own else getattr(interpreter, node.op)(node.target, args, kwargs)
        handed |= {node: values[node] for node in block.writes}
    return handed[blocks[-1].writes[0]]


@pytest.mark.parametrize("bound", [0, 300, 10**9])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_blocks_one_after_another_compute_what_the_graph_does(name, bound):
    graph_module, model, batch = captured(name)
    sizes = weight_bytes(graph_module)
    blocks = find_blocks(graph_module, sizes, bound)
    torch.testing.assert_close(run(graph_module, blocks, batch), model(*batch), rtol=0, atol=0)
    for block in blocks:
        own = [sizes[node] for node in block.nodes if node in sizes]
        assert sum(own) <= bound or len(own) == 1
    assert (len(blocks) == 1) == (bound == 10**9)


def widest(graph_module, blocks):
    """For each cut, the nodes whose values are alive there."""
    known, found = set(), []
    for index, block in enumerate(blocks[:-1]):
        known |= set(block.writes)
        found.append({node for node in known for later in blocks[index + 1 :] if node in later.reads})
    return found


def test_a_chain_is_cut_where_it_is_narrow():
    graph_module, _, _ = captured("chain")
    ((cut,),) = widest(graph_module, find_blocks(graph_module, weight_bytes(graph_module), 1700))
    assert str(cut.target) == "2"  # 4 features, in place of 32


@pytest.mark.parametrize("bound", [0, 3000, 10**9])
def test_bonded_nodes_stay_with_the_node_before_them(bound):
    graph_module = capture(Transformer().eval(), torch.randn(2, 6, 32))
    nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
    bonds = set(nodes[2::3])
    blocks = find_blocks(graph_module, weight_bytes(graph_module), bound, bonds)
    home = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    assert all(home[one] == home[other] for one, other in itertools.pairwise(nodes) if other in bonds)
    free = find_blocks(graph_module, weight_bytes(graph_module), bound)
    assert len(blocks) < len(free) if bound == 0 else len(blocks) <= len(free)
    assert [node for block in blocks for node in block.nodes] == [node for block in free for node in block.nodes]


def test_a_u_net_is_cut_where_one_skip_connection_is_open():
    graph_module, _, _ = captured("u-net")
    (cut,) = widest(graph_module, find_blocks(graph_module, weight_bytes(graph_module), 5300))
    assert {node.name for node in cut} == {"relu", "down_1"}  # before the middle, where the image is smallest


def test_the_encoders_output_is_handed_to_each_block_of_the_decoder():
    graph_module, _, _ = captured("encoder and decoder")
    blocks = find_blocks(graph_module, weight_bytes(graph_module), 300)
    cross = {node: node.all_input_nodes[0] for node in graph_module.graph.nodes if "cross" in str(node.target)}
    (memory,) = set(cross.values())
    assert len([block for block in blocks if memory in block.reads]) == len(cross) == 3
    assert len([block for block in blocks if memory in block.writes]) == 1


def test_a_tied_weight_counts_in_each_node_that_reads_it():
    graph_module, model, _ = captured("tied")
    table = model.table.weight.nbytes
    found = sorted(weight_bytes(graph_module).values())
    assert found == sorted([table, table, model.layer.weight.nbytes + model.layer.bias.nbytes])
    blocks = find_blocks(graph_module, weight_bytes(graph_module), table)
    assert len(blocks) == 3
    assert [node.name for node in blocks[-1].constants] == ["table_weight", "t", "mul"]


def test_alive_are_the_values_that_are_read_later():
    graph_module, _, (x,) = captured("chain")
    alive = alive_bytes(graph_module, list(graph_module.graph.nodes))
    assert alive == [0, *(x.nbytes // 8 * width for width in (8, 32, 32, 4, 8)), 0]


def all_cuts(alive, sizes, bound):
    """The fewest bytes of all choices of cuts."""
    best = None
    for chosen in itertools.product([False, True], repeat=len(sizes) - 1):
        cuts = [place + 1 for place, cut in enumerate(chosen) if cut]
        edges = [0, *cuts, len(sizes)]
        spans = [sizes[start:stop] for start, stop in itertools.pairwise(edges)]
        if all(sum(span) <= bound or len(span) == 1 for span in spans):
            cost = sum(alive[cut] for cut in cuts)
            best = cost if best is None else min(best, cost)
    return best


def test_no_other_cuts_have_fewer_bytes_alive():
    rng = random.Random(0)
    for _ in range(60):
        count = rng.randint(1, 9)
        sizes = [rng.choice([0, 0, 1, 2, 5]) for _ in range(count)]
        alive = [rng.randint(0, 9) for _ in range(count + 1)]
        bound = rng.randint(0, 8)
        cuts = cut_positions(alive, sizes, bound)
        edges = [0, *cuts, count]
        assert edges == sorted(set(edges))
        assert all(sum(sizes[start:stop]) <= bound or stop == start + 1 for start, stop in itertools.pairwise(edges))
        assert sum(alive[cut] for cut in cuts) == all_cuts(alive, sizes, bound)
