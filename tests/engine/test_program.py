"""Programs of small graphs made by hand: what runs on what, what is one site, and what copies share."""

import dataclasses
import logging

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.observers import CovarianceObserver
from balf_fx.engine.program import (
    Link,
    Part,
    Program,
    Step,
    copy_graph,
    count_calls,
    join,
    linked,
    per_call,
    run_trace,
    share_observers,
)
from balf_fx.engine.rewriting import applicable
from balf_fx.graph.annotation import annotation, record_graph, sites
from balf_fx.graph.plan import Plan, PlannedWidth
from balf_fx.graph.widths import Width
from balf_fx.passes import Annotate, InsertObservers


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x * 2


class Product(nn.Module):
    def forward(self, values, scale):
        first, second = values
        return first * second * scale


@pytest.fixture
def graphs():
    return nn.ModuleList([fx.symbolic_trace(Pair()), fx.symbolic_trace(nn.ReLU())])


def traced(**layers):
    """A chain of layers by name, traced and annotated as a part of a model."""
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    graph_module = fx.symbolic_trace(model.eval())
    Annotate(partial=True)(graph_module)
    return graph_module


def part_of(graph_module, originals=None):
    return Part(graph_module, originals=dict(graph_module.named_parameters()) if originals is None else originals)


# What runs on what.


def test_links_take_the_place_of_what_the_original_gave():
    a, b, c = torch.arange(3.0).unbind()
    step = Step(0, ((a, {"key": b}), 5, c), (Link(0, 0, 1), Link(1, 2, 0), Link(3, 1, 0)))
    returned = [[torch.tensor(10.0), torch.tensor(11.0)], None, [torch.tensor(12.0)]]
    (first, named), number, last = linked(step, returned)
    assert (float(first), float(named["key"]), number) == (11.0, 12.0, 5)
    assert last is c  # of what is not known, the original's
    assert linked(step._replace(links=()), returned) is step.args


def test_a_trace_runs_on_what_its_steps_return_now(graphs):
    x, stale = torch.tensor([-1.0, 2.0]), torch.full((2,), torch.nan)
    trace = (Step(0, (x,)), Step(1, (stale,), (Link(0, 0, 1),)), Step(1, (stale,), (Link(0, 0, 0),)))
    first, second = run_trace(graphs, trace)
    assert first.tolist() == [0, 4]
    assert second.tolist() == [0, 3]


def test_a_single_answer_is_returned_as_it_is(graphs):
    x = torch.tensor([-1.0, 2.0])
    assert run_trace(graphs, (Step(1, (x,)),)).tolist() == [0, 2]
    assert run_trace(graphs[1], (Step(0, (x,)),)).tolist() == [0, 2]
    nested = nn.ModuleList([graphs[0], fx.symbolic_trace(Product())])
    trace = (Step(0, (x,)), Step(1, ((x, x), 3.0), (Link(0, 0, 0), Link(1, 0, 1))))
    assert run_trace(nested, trace).tolist() == (3 * (x + 1) * (x * 2)).tolist()


@pytest.mark.parametrize(
    ("calls", "codes", "found"),
    [
        ([4, 4], "ab", ([1, 1], 1)),
        ([6, 2, 4], "abc", ([3, 1, 2], 1)),
        ([3, 1], "ab", ([3, 1], 1)),
        ([5], "a", ([1], 1)),
        ([0, 3], "ab", ([0, 1], 1)),
        ([5, 1], "aa", ([5, 1], 6)),
        ([8, 4, 12], "aab", ([2, 1, 3], 3)),
        ([8, 4, 24], "aab", ([2, 1, 6], 3)),
    ],
)
def test_calls_are_those_of_one_call_of_the_model(calls, codes, found):
    assert per_call(calls, codes) == found


# What is one site.


def names(part):
    return [site.name for site in sites(part.graph_module)]


def test_the_same_weights_are_one_site_of_one_name():
    shared, own = nn.Linear(8, 8), nn.Linear(8, 8)
    parts = [part_of(traced(first=shared, other=own)), part_of(traced(second=shared))]
    assert join(parts) == {"first"}
    assert [names(part) for part in parts] == [["first", "other"], ["first"]]
    (site,), (first, _) = sites(parts[1].graph_module), sites(parts[0].graph_module)
    assert site.weight == "second.weight"  # where this graph holds it
    assert not site.keeps_weight
    assert not first.keeps_weight
    marks = {node.target: annotation(node).shared for node in parts[0].graph_module.graph.nodes if "call" in node.op}
    assert not marks["other"]


def test_calls_of_a_site_are_those_of_all_parts():
    shared, own = nn.Linear(8, 8), nn.Linear(8, 8)
    parts = [part_of(traced(first=shared, other=own)), part_of(traced(second=shared, again=shared))]
    parts = [parts[0], dataclasses.replace(parts[1], calls=3)]
    assert [annotation(node).calls for node in parts[1].graph_module.graph.nodes if node.op == "call_module"] == [2, 2]
    join(parts)
    count_calls(parts)
    found = {node.target: annotation(node).calls for part in parts for node in part.graph_module.graph.nodes}
    assert {name: found[name] for name in ("first", "other", "second")} == {"first": 7, "other": 1, "second": 7}


def test_aliases_stand_for_the_users_weights():
    shared = nn.Linear(8, 8)
    parts = []
    for name in ("first", "second"):
        layer = nn.Linear(8, 8)
        layer.load_state_dict(shared.state_dict())
        originals = {f"{name}.{key}": value for key, value in shared.named_parameters()}
        pairs = [(getattr(layer, key), value) for key, value in shared.named_parameters()]
        aliases = {id(own): (own, value) for own, value in pairs}
        parts.append(dataclasses.replace(part_of(traced(**{name: layer}), originals), aliases=aliases))
    assert join(parts) == {"first"}
    assert [names(part) for part in parts] == [["first"], ["first"]]


def test_other_weights_of_the_same_name_are_another_site():
    parts = [part_of(traced(layer=nn.Linear(8, 8))) for _ in range(3)]
    assert join(parts) == set()
    assert [names(part) for part in parts] == [["layer"], ["layer_1"], ["layer_2"]]


def test_a_weight_that_another_part_uses_otherwise_stays_there():
    weight = nn.Parameter(torch.randn(8, 8))
    plain, biased = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
    plain.weight = biased.weight = weight
    parts = [part_of(traced(plain=plain)), part_of(traced(biased=biased))]
    assert join(parts) == set()
    assert [names(part) for part in parts] == [["plain"], ["biased"]]
    for part in parts:
        (site,) = sites(part.graph_module)
        assert site.keeps_weight
    alone = part_of(traced(plain=nn.Linear(8, 8)))
    join([alone, parts[0]])
    assert [site.keeps_weight for site in sites(alone.graph_module)] == [False]


class Reads(nn.Module):
    """Fetches a weight, and uses it twice."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight)


def test_nodes_that_read_what_other_parts_read_are_marked():
    weight = nn.Parameter(torch.randn(8, 8))
    graph_modules = [fx.symbolic_trace(Reads(weight)), fx.symbolic_trace(Reads(weight))]
    graph_modules.append(fx.symbolic_trace(Reads(nn.Parameter(torch.randn(8, 8)))))
    for graph_module in graph_modules:
        Annotate(partial=True)(graph_module)
    parts = [part_of(graph_module, {"weight": graph_module.weight}) for graph_module in graph_modules]
    assert len(join(parts)) == 1
    marked = [[annotation(node).shared for node in part.graph_module.graph.nodes] for part in parts]
    assert marked == [[False, True, True, False], [False, True, True, False], [False] * 4]  # x, weight, linear, output


def test_one_observer_sees_a_site_in_all_parts():
    shared = nn.Linear(8, 8)
    parts = [part_of(traced(first=shared)), part_of(traced(second=shared))]
    joined = join(parts)
    for part in parts:
        InsertObservers(apart=frozenset(joined))(part.graph_module)
    share_observers(parts, joined)
    first, second = (
        [module for module in part.graph_module.modules() if isinstance(module, CovarianceObserver)] for part in parts
    )
    assert len(first) == 1
    assert first[0] is second[0]
    with torch.no_grad():
        for part in parts:
            part.graph_module(torch.randn(5, 8))
    assert first[0].moments.count == 10


# What copies share.


def test_copies_share_tensors_and_observers_but_no_modules():
    graph_module = traced(up=nn.Linear(8, 16), norm=nn.BatchNorm1d(16), down=nn.Linear(16, 8))
    InsertObservers()(graph_module)
    record_graph(graph_module, flops=7)
    copied = copy_graph(graph_module)
    for name in ("up", "norm", "down"):
        assert copied.get_submodule(name) is not graph_module.get_submodule(name)
    held, copies = ({**dict(g.named_parameters()), **dict(g.named_buffers())} for g in (graph_module, copied))
    assert held.keys() == copies.keys()
    assert all(copies[name] is tensor for name, tensor in held.items())
    observers = [module for module in graph_module.modules() if isinstance(module, CovarianceObserver)]
    assert observers
    assert [module for module in copied.modules() if isinstance(module, CovarianceObserver)] == observers
    assert copied.graph is not graph_module.graph
    assert copied.meta == graph_module.meta
    assert list(sites(copied)) == list(sites(graph_module))

    x, expected = torch.randn(4, 8), graph_module(torch.ones(4, 8))
    copied.get_submodule("up").weight = nn.Parameter(torch.zeros(16, 8))
    copied.graph.erase_node(
        next(node for node in copied.graph.nodes if "observers" in str(node.target) and not node.users)
    )
    assert torch.equal(graph_module(torch.ones(4, 8)), expected)
    assert not torch.equal(graph_module(x), copied(x))


def test_a_copy_of_a_program_is_of_its_graphs():
    parts = tuple(Part(traced(layer=nn.Linear(8, 8)), calls) for calls in (1, 3))
    program = Program(parts, lambda graph_module, batch: (Step(0, (batch,)),))
    copied = program.copy()
    assert [calls for _, calls in copied.counted] == [1, 3]
    for one, other in zip(program.graph_modules, copied.graph_modules, strict=True):
        assert one is not other
        assert one.get_parameter("layer.weight") is other.get_parameter("layer.weight")
    assert copied.steps is program.steps
    assert list(copied.module.children()) == copied.graph_modules


# What a plan says of another graph.


@pytest.fixture
def plan():
    """Four layers of the same shape have factors; three of them are narrowed, between a and b and between b and c."""
    model = nn.Sequential()
    for name in "abcd":
        model.add_module(name, nn.Linear(8, 8))
    ranks = dict.fromkeys("abcd", 2)
    found = balf_fx.plan(balf_fx.compile(model.eval(), torch.randn(32, 8), allocation=ranks, effort="fast"))
    planned = [PlannedWidth(one[1], "channels", tuple(one), 8, 5, 1, 0.9, (0, 1, 2, 3, 4)) for one in ("ab", "bc")]
    sizes = {width.key: 5 for width in planned}
    allocation = dataclasses.replace(found.allocation, sizes=sizes)
    return dataclasses.replace(found, widths=tuple(planned), allocation=allocation)


def graph_of(layers, widths):
    graph_module = traced(**{name: nn.Linear(8, 8) for name in layers})
    found = (Width("channels", w[1], 8, (w[0],), (w[1],), layer_names=tuple(w)) for w in widths)
    record_graph(graph_module, widths=tuple(found))
    return graph_module


@pytest.mark.parametrize(
    ("layers", "widths", "replaced", "narrowed"),
    [
        ("abcd", ["ab", "bc"], "abcd", ["b", "c"]),  # all of the model
        ("d", [], "d", []),  # a part that no width touches
        ("cd", [], "d", []),  # c without b
        ("bcd", ["bc"], "d", []),  # b without a stays dense, and so c does
        ("abd", ["ab"], "d", []),  # b without c, and so a
        ("abcd", ["ab"], "d", []),  # b and c do not meet here
    ],
)
def test_a_width_is_narrowed_where_all_of_its_layers_are(plan, layers, widths, replaced, narrowed, caplog):
    graph_module = graph_of(layers, widths)
    with caplog.at_level(logging.INFO, "balf_fx"):
        found = applicable(plan, graph_module)
    assert isinstance(found, Plan)
    assert "".join(layer.name for layer in found.layers) == replaced
    assert [width.name for width in found.widths] == narrowed
    assert [key.split()[-1] for key in found.allocation.sizes] == narrowed
    assert "".join(choice.site.name for choice in found.allocation.choices) == replaced
    assert "".join(site.name for site in sites(graph_module)) == replaced  # the others have lost their mark
    left_out = [name for name in layers if name not in replaced]
    assert [f"{', '.join(left_out)} stay dense" in record.getMessage() for record in caplog.records] == (
        [True] if left_out else []
    )


def test_a_site_that_the_plan_does_not_know_stays_dense(plan):
    graph_module = graph_of("dx", [])
    found = applicable(plan, graph_module)
    assert [layer.name for layer in found.layers] == ["d"]
    assert [site.name for site in sites(graph_module)] == ["d"]
