import pytest
import torch
from small_models import ConvNet
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from balf_fx import BalfError
from balf_fx.errors import UnknownSiteError
from balf_fx.graph.annotation import annotation
from balf_fx.graph.site import ConvGeometry, Reason
from balf_fx.passes import Annotate


def marks(model: nn.Module, **options):
    graph_module = Annotate(**options)(fx.symbolic_trace(model)).graph_module
    found = [annotation(node) for node in graph_module.graph.nodes]
    return {m.site.name: m.site for m in found if m.site}, {m.refusal.name: m.refusal for m in found if m.refusal}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 10))
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 5))
        self.owner = nn.Module()
        self.owner.weight, self.owner.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(6))
        self.computed = nn.Parameter(torch.randn(6, 9))
        self.register_buffer("fixed", torch.randn(6, 9))
        self.scale = nn.Parameter(torch.randn(9))

    def forward(self, image, row):
        image = F.conv2d(image, self.kernel, stride=(2, 1), padding=(1, 2), dilation=1)
        row = row * self.scale
        rows = F.linear(row, self.owner.weight, self.owner.bias) + F.linear(row, self.computed * 2)
        return image, rows + F.linear(row, weight=self.fixed), F.linear(input=row @ row.T @ row, weight=self.computed)


def test_modules_are_sites_with_their_shapes():
    sites, refusals = marks(ConvNet())
    assert [(s.name, s.kind, s.out_features, s.in_features, s.groups) for s in sites.values()] == [
        ("stem", "conv2d", 16, 27, 1),
        ("block.0", "conv2d", 32, 144, 1),
        ("block.4", "conv2d", 16, 144, 2),
        ("shortcut", "conv2d", 32, 16, 1),
        ("head", "linear", 10, 32, 1),
    ]
    assert sites["block.0"].conv == ConvGeometry((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), "zeros")
    assert {name: refusal.reason for name, refusal in refusals.items()} == {
        "bn": Reason.NOT_LINEAR,
        "block.1": Reason.NOT_LINEAR,
        "block.3": Reason.DEPTHWISE,
    }


def test_statistics_are_taken_on_the_narrow_side():
    sites, _ = marks(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)))
    assert [site.side for site in sites.values()] == ["input", "input", "output"]
    sites, _ = marks(nn.Sequential(nn.Conv2d(4, 36, 3), nn.Conv2d(36, 36, 1), nn.Conv2d(36, 36, 3)))
    assert [site.side for site in sites.values()] == ["output", "input", "output"]


def test_functional_calls_are_sites():
    sites, refusals = marks(Functional())
    assert sites["kernel"].conv == ConvGeometry((3, 5), (2, 1), ((1, 1), (2, 2)), (1, 1), "zeros")
    assert (sites["owner"].weight, sites["owner"].bias) == ("owner.weight", "owner.bias")
    reasons = {refusal.reason for refusal in refusals.values()}
    assert reasons == {Reason.COMPUTED, Reason.NOT_LINEAR}
    assert refusals["scale"].kind == "mul"


def hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


class MyLinear(nn.Linear):
    pass


MyLinear.__module__ = "torch.nn.elsewhere"  # what makes symbolic tracing keep a module whole


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.again(self.again(self.second(self.first(x))))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), Reason.DEPTHWISE),
        (nn.Conv2d(8, 16, 1, groups=8), Reason.SINGLE_INPUT),
        (nn.Linear(8, 1), Reason.TOO_SMALL),
        (nn.Conv2d(1, 1, 3), Reason.TOO_SMALL),
        (nn.LayerNorm(8), Reason.NOT_LINEAR),
        (nn.Embedding(8, 8), Reason.NOT_LINEAR),
        (nn.MultiheadAttention(8, 2), Reason.NOT_LINEAR),
        (MyLinear(8, 8), Reason.SUBCLASS),
        (parametrizations.orthogonal(nn.Linear(8, 8)), Reason.PARAMETRIZED),
        (hooked(), Reason.HOOKED),
        (nn.Linear(8, 8, dtype=torch.complex64), Reason.DTYPE),
        (nn.utils.weight_norm(nn.Linear(8, 8)), Reason.HOOKED),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else type(value).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_is_no_site_says_why(layer, reason):
    model = nn.Sequential(layer)
    if isinstance(layer, nn.MultiheadAttention):
        model = SelfAttention(layer)
    sites, refusals = marks(model)
    assert sites == {}
    assert [refusal.reason for refusal in refusals.values()] == [reason]


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_a_module_called_twice_is_one_site_and_different_biases_are_refused():
    sites, refusals = marks(Tied())
    assert list(sites) == ["again"]
    assert {name: refusal.reason for name, refusal in refusals.items()} == {
        "first": Reason.SHARED,
        "second": Reason.SHARED,
    }


def test_patterns_choose_sites():
    sites, refusals = marks(ConvNet(), include=["block.*", "head"], exclude=["block.4"])
    assert list(sites) == ["block.0", "head"]
    assert refusals["stem"].reason is refusals["block.4"].reason is Reason.EXCLUDED
    assert str(refusals["block.4"]) == "excluded by the user (matches exclude)"


@pytest.mark.parametrize("options", [{"include": ["nope*"]}, {"exclude": ["block.9"]}])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_sites(options):
    with pytest.raises(UnknownSiteError, match=r"matches no site; the sites are: stem, block\.0"):
        marks(ConvNet(), **options)
    assert issubclass(UnknownSiteError, BalfError)


def test_annotating_changes_neither_graph_nor_weights():
    graph_module = fx.symbolic_trace(ConvNet())
    code = graph_module.code
    result = Annotate()(graph_module)
    assert result.graph_module is graph_module
    assert not result.modified
    assert graph_module.code == code
