import pytest
import torch
from torch import fx, nn

from balf_fx.graph.curves import Solution
from balf_fx.graph.layers import read_layer
from balf_fx.graph.substitute import build, replace_site


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def factorized(rank, outputs=6, bias=True):
    return Solution(random(1, outputs, rank), random(1, rank, 8), random(1, outputs) if bias else None)


def dense(outputs=6, bias=True):
    return Solution(None, random(1, outputs, 8), random(1, outputs) if bias else None)


SOLUTIONS = {
    "dense": ((dense(),), (None,), [""]),
    "dense without a bias": ((dense(bias=False),), (None,), [""]),
    "factorized": ((factorized(3),), (3,), [".0", ".1"]),
    "parts": ((factorized(2, 2), dense(2), factorized(1, 2, False)), (2, None, 1), [".0", ".1.0", ".1.1", ".1.2"]),
    "parts of full rank": ((factorized(8, 3), factorized(8, 3)), (8, 8), [".0", ".1.0", ".1.1"]),
}


@pytest.mark.parametrize("kind", SOLUTIONS)
def test_calls_in_the_graph_compute_the_solution(kind):
    solution, ranks, calls = SOLUTIONS[kind]
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 6), nn.Tanh()).double().eval())
    node = graph_module.graph.find_nodes(op="call_module")[0]
    site = read_layer(graph_module, node)
    substitute = build(graph_module, site, solution)
    x, outputs = random(4, 5, 8), []
    for part in solution:
        product = part.right if part.left is None else part.left @ part.right
        outputs.append(x @ product[0].mT + (0 if part.bias is None else part.bias[0]))
    expected = torch.cat(outputs, -1)
    torch.testing.assert_close(substitute.run(x), expected)
    torch.testing.assert_close(substitute.run_second(substitute.run_first(x)), expected)
    for part, output, rank, found in zip(solution, outputs, ranks, substitute.run_first(x), strict=True):
        torch.testing.assert_close(found, output if rank is None else x @ part.right[0].mT)
    assert substitute.ranks == ranks
    assert substitute.biased == tuple(part.bias is not None for part in solution)

    replace_site(graph_module, [node], site, substitute)
    graph_module.graph.lint()
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), expected.tanh())
    targets = [call.target for call in graph_module.graph.find_nodes(op="call_module")]
    assert targets == [*(f"0{call}" for call in calls), "1"]
    assert not any(module.training for module in graph_module.modules())
