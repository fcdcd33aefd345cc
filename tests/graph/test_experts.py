import copy

import pytest
import torch
from expert_models import (
    CHOSEN,
    EXPERTS,
    FORMS,
    INPUTS,
    OUTPUTS,
    BatchedWithBias,
    Einsum,
    ExpertLayer,
    Grouped,
    Mixture,
    Product,
    Selected,
    SelectedTwo,
)
from torch import fx, nn

from balf_fx.capture.normal_form import capture
from balf_fx.graph.curves import Solution
from balf_fx.graph.expert_factors import build_experts, keeping
from balf_fx.graph.experts import leads_to_experts, read_experts
from balf_fx.graph.layers import read_site
from balf_fx.graph.parameters import get_tensor, grouped_weight
from balf_fx.graph.site import Reason, Refusal, Site
from balf_fx.graph.substitute import replace_site


def captured(form, inputs_first=True, method="symbolic_trace"):
    torch.manual_seed(0)
    model, x = form(inputs_first).eval(), torch.randn(4, 6, INPUTS)
    if form is not Grouped:  # its kernel takes no float64
        model, x = model.double(), x.double()
    graph_module = capture(model, x, method=method)
    (node,) = [each for each in graph_module.graph.nodes if read_experts(each) is not None]
    return model, x, graph_module, node


class Values(fx.Interpreter):
    def run_node(self, n):
        self.seen = {**getattr(self, "seen", {}), n: super().run_node(n)}
        return self.seen[n]


@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_site_whose_rows_are_found(form, inputs_first):
    _, x, graph_module, node = captured(form, inputs_first)
    site, product = read_site(graph_module, node), read_experts(node)
    assert isinstance(site, Site)
    assert site.kind == "experts"
    assert site.shape == (OUTPUTS, INPUTS, EXPERTS)
    values = Values(graph_module)
    values.run(x)
    assignment = None if product.assignment is None else values.seen[product.assignment]
    read = product.rows.split(values.seen[product.input], "input", assignment)
    written = product.rows.split(values.seen[node], "output", assignment)
    bias = graph_module.get_parameter("bias").detach() if "Bias" in form.__name__ else torch.zeros(EXPERTS, 1, 1)
    assert sum(map(len, written)) * OUTPUTS == values.seen[node].numel()
    for own, y, weight, added in zip(read, written, grouped_weight(graph_module, site), bias, strict=True):
        torch.testing.assert_close(own @ weight.mT.to(own) + added, y)


CASES = [(form, inputs_first, "symbolic_trace") for form in FORMS for inputs_first in (True, False)]
EXPORTED = [(form, True, "export") for form in (Selected, SelectedTwo, BatchedWithBias, Product, Einsum)]


@pytest.mark.parametrize(("form", "inputs_first", "method"), [*CASES, *EXPORTED])
def test_factors_of_full_rank_are_the_layer(form, inputs_first, method):
    model, x, graph_module, node = captured(form, inputs_first, method)
    site = read_site(graph_module, node)
    weight = grouped_weight(graph_module, site)
    solution = Solution(weight, torch.eye(INPUTS, dtype=weight.dtype).expand(EXPERTS, -1, -1), None)
    replace_site(graph_module, [node], site, build_experts(get_tensor(graph_module, site.weight), site, solution))
    graph_module.recompile()
    graph_module.graph.lint()
    torch.testing.assert_close(graph_module(x), model(x))
    more = torch.cat([x, -x]) if method == "symbolic_trace" else x
    torch.testing.assert_close(graph_module(more), model(more))
    held = {name for name, _ in graph_module.named_parameters() if name.startswith(site.name)}
    assert held == {f"{site.name}.0", f"{site.name}.1"}


@pytest.mark.parametrize("form", [form for form in CHOSEN if form is not SelectedTwo])
def test_experts_that_keep_their_matrices_run_on_their_rows_only(form):
    model, x, graph_module, node = captured(form)
    site, experts = read_site(graph_module, node), (0, 2)
    weight = grouped_weight(graph_module, site)
    poor = Solution(torch.zeros(EXPERTS, OUTPUTS, 4), torch.zeros(EXPERTS, 4, INPUTS), None)
    solution = keeping(poor, weight, experts)
    before = model.weight.detach().clone()
    replace_site(graph_module, [node], site, build_experts(get_tensor(graph_module, site.weight), site, solution))
    graph_module.recompile()
    y, whole = graph_module(x), model(x)
    chosen = model.router(x.reshape(-1, INPUTS)).argmax(-1)
    torch.testing.assert_close(y, torch.where((chosen != 1).unsqueeze(-1), whole, torch.zeros_like(whole)))
    kept = graph_module.get_parameter(f"{site.name}.2")
    assert torch.equal(kept, before[list(experts)])
    only_one = torch.where((chosen == 1).unsqueeze(-1), x.reshape(-1, INPUTS), 0)[chosen == 1].reshape(1, -1, INPUTS)
    assert graph_module(only_one).abs().max() == 0
    assert torch.equal(copy.deepcopy(graph_module)(x), y)


class Weighted(ExpertLayer):
    """A mixture of matrices, which is one matrix for each row and not a product with each expert's."""

    def combine(self, x, scores):
        return torch.einsum("be,edo,bd->bo", scores.softmax(-1), self.weight, x)


class Contracted(ExpertLayer):
    """The sum of all experts' outputs: one linear layer on all their inputs together."""

    def combine(self, x, scores):
        return torch.einsum("bed,edo->bo", x.unsqueeze(1) * scores.unsqueeze(-1), self.weight)


@pytest.mark.parametrize("form", [Weighted, Contracted])
def test_other_products_are_refused(form):
    graph_module = capture(form().eval(), torch.randn(2, 5, INPUTS))
    assert not any(read_experts(node) for node in graph_module.graph.nodes)
    marks = [read_site(graph_module, node) for node in graph_module.graph.nodes]
    refusals = [mark for mark in marks if isinstance(mark, Refusal) and mark.name == "weight"]
    assert [refusal.reason for refusal in refusals] == [Reason.NOT_LINEAR]


def test_a_selected_embedding_is_no_product():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6, 8))

        def forward(self, ids):
            return self.table[ids].sum(1)

    graph_module = capture(Table().eval(), torch.tensor([0, 3, 1]))
    assert not any(read_experts(node) for node in graph_module.graph.nodes)


def test_a_long_chain_of_other_operations_is_not_looked_through():
    """Of thousands of nodes, beyond the depth to which Python calls functions."""
    graph = fx.Graph()
    node = graph.get_attr("weight")
    for _ in range(5000):
        node = graph.call_function(torch.relu, (node,))
    product = graph.call_function(torch.matmul, (graph.placeholder("x"), node))
    assert not leads_to_experts(node)
    assert read_experts(product) is None


def test_the_rows_of_each_expert_on_the_example_are_counted():
    torch.manual_seed(0)
    model, x = Selected().eval(), torch.randn(4, 6, INPUTS)
    graph_module = capture(model, x)
    (product,) = filter(None, map(read_experts, graph_module.graph.nodes))
    counts = torch.bincount(model.router(x.reshape(-1, INPUTS)).argmax(-1), minlength=EXPERTS)
    assert product.loads == tuple(counts.tolist())


def test_experts_in_a_row_are_separate_sites():
    graph_module = capture(Mixture().eval(), torch.randn(2, 5, 16))
    marks = [read_site(graph_module, node) for node in graph_module.graph.nodes]
    assert [mark.name for mark in marks if isinstance(mark, Site) and mark.has_experts] == ["up", "down"]


def test_few_outputs_that_include_a_bias_are_left_alone():
    model, x = BatchedWithBias(outputs=8).eval(), torch.randn(5, INPUTS)
    graph_module = capture(model, x)
    assert not any(read_experts(node) for node in graph_module.graph.nodes)
