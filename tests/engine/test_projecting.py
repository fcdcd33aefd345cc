"""What projected outputs give is what the factors give."""

import pytest
import torch
from architectures import make
from torch import nn

import balf_fx
from balf_fx.budget.problem import pose
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.engine.program import whole_program
from balf_fx.engine.projecting import bytes_read, projected
from balf_fx.engine.solving import carry_out, settled, without_observers
from balf_fx.graph.blocks import weight_bytes
from balf_fx.passes import Allocate, Score, ScoreWidths


class Layers(nn.Module):
    """Convolutions of all kinds, and a fused projection."""

    def __init__(self, bias):
        super().__init__()
        self.plain = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=bias)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=bias)
        self.transposed = nn.ConvTranspose2d(16, 12, 3, groups=2, bias=bias)
        self.line = nn.Conv1d(12, 10, 1, bias=bias)
        self.fused = nn.Linear(10, 36, bias=bias)

    def forward(self, x):
        x = self.transposed(self.grouped(self.plain(x).tanh()).tanh()).tanh()
        x = self.line(x.flatten(2)).mT
        q, k, v = self.fused(x.tanh()).chunk(3, -1)
        return q * k + v


def scored(model, batches, factors, centred=True):
    prepared = balf_fx.prepare(model, batches[0], factors=factors)
    balf_fx.calibrate(prepared, batches, progress=False)
    with torch.no_grad():
        Score(factors, centred=centred)(prepared)
    return whole_program(prepared, forward_for(model))


def both(program, allocation, batch):
    """The outputs with projections, and those of the factors."""
    problem = pose(program.counted, program.totals())
    solved = allocation.solve(problem)
    tried = projected(without_observers(program), solved)
    built = settled(program, problem, solved)
    with torch.no_grad():
        carry_out(built, None, Calibration([], None))
        return tried.module(batch), built.module(batch)


@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_projected_outputs_are_those_of_the_factors(bias, centred, factors):
    torch.manual_seed(0)
    model, batches = Layers(bias).double().eval(), [torch.randn(4, 6, 8, 8).double() + 0.3 for _ in range(3)]
    program = scored(model, batches, factors, centred)
    ranks = {"plain": 3, "grouped": 2, "transposed": 3, "line": 4, "fused": (2, None, 5)}
    given, wanted = both(program, Allocate(ranks=ranks), batches[0])
    torch.testing.assert_close(given, wanted)
    assert (given - model(batches[0])).norm() > 0.01 * given.norm()


def test_layers_that_are_called_twice_and_unbatched_values_are_projected_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.layer(self.layer(x).tanh())
            return self.conv(x.mT[0])

    torch.manual_seed(0)
    model, batches = Twice().double().eval(), [torch.randn(1, 9, 8).double() for _ in range(3)]
    given, wanted = both(scored(model, batches, "activations"), Allocate(ranks={"layer": 2, "conv": 3}), batches[0])
    torch.testing.assert_close(given, wanted)


def test_narrower_widths_are_not_projected():
    model, batches = make("mlp")
    program = scored(model, batches, "sensitivity")
    with torch.no_grad():
        ScoreWidths()(program.graph_modules[0])
    solved = Allocate(flops=0.5, importance=0.6).solve(pose(program.counted, program.totals()))
    assert solved.sizes
    assert projected(without_observers(program), solved) is None


def test_nothing_is_changed_but_the_copy():
    torch.manual_seed(0)
    model, batches = Layers(True).eval(), [torch.randn(4, 6, 8, 8) for _ in range(3)]
    program = without_observers(scored(model, batches, "activations"))
    code, names = program.graph_modules[0].code, set(program.graph_modules[0].state_dict())
    tried = projected(program, Allocate(flops=0.6).solve(pose(program.counted, program.totals())))
    assert program.graph_modules[0].code == code
    assert tried.graph_modules[0].code != code
    assert set(tried.graph_modules[0].state_dict()) == names


@pytest.mark.parametrize(("ranks", "maps"), [({"fused": 3}, 2 * 36 * 10), ({"fused": (2, None, 5)}, 2 * 3 * 12 * 10)])
def test_the_spectra_that_a_projection_reads_count_with_its_node(ranks, maps):
    """L and R of all ranks up to full, and E[W x]: in files they are read by the page."""
    torch.manual_seed(0)
    model, batches = Layers(False).double().eval(), [torch.randn(4, 6, 8, 8).double() + 0.3 for _ in range(3)]
    program = scored(model, batches, "sensitivity")
    solved = Allocate(ranks={"plain": None, "grouped": None, "transposed": None, "line": None, **ranks}).solve(
        pose(program.counted, program.totals())
    )
    (graph_module,) = projected(without_observers(program), solved).graph_modules
    (node,) = (each for each in graph_module.graph.nodes if str(each.target).startswith("balf_projection"))
    found, plain = bytes_read(graph_module), weight_bytes(graph_module)
    assert 8 * maps < found.pop(node) <= 8 * (maps + 2 * 36)
    assert found == plain
