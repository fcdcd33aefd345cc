import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from balf_fx.graph.annotation import annotation
from balf_fx.passes import Annotate
from balf_fx.passes.decompose_attention import DecomposeAttention

E, H = 8, 2
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")
normal = partial(torch.randn, dtype=torch.float64)
assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Waking a second thread takes longer than anything here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decompose(model):
    graph_module = fx.symbolic_trace(model)
    return graph_module, DecomposeAttention()(graph_module).modified


def calls(graph_module, function=F.scaled_dot_product_attention):
    return bool(graph_module.graph.find_nodes(op="call_function", target=function))


def site_names(graph_module):
    Annotate()(graph_module)
    marks = map(annotation, graph_module.graph.nodes)
    return [mark.site.name.removeprefix("attention.") for mark in marks if mark.site]


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


class Caller(nn.Module):
    """Calls attention with inputs that are one or not, and with only the masks that are asked for."""

    def __init__(self, attention, inputs="self", padding=None, mask=None, only_output=True, **flags):
        super().__init__()
        self.attention, self.inputs, self.padding, self.mask = attention, inputs, padding, mask
        self.only_output, self.flags = only_output, flags

    def forward(self, query, key, value, padding, mask):
        key = query if self.inputs == "self" else key
        value = value if self.inputs == "separate" else key
        masks = {"key_padding_mask": padding} if self.padding else {}
        masks |= {"attn_mask": mask} if self.mask else {}
        result = self.attention(query, key, value, **masks, **self.flags)
        return result[0] if self.only_output else result


class Reader(nn.Module):
    """Does as it is told with attention over one input."""

    def __init__(self, read):
        super().__init__()
        self.attention, self.read = nn.MultiheadAttention(E, H), read

    def forward(self, x):
        return self.read(self.attention, x)


class OptionalMask(Reader):
    def forward(self, x, mask=None):
        return self.attention(x, x, x, attn_mask=mask)[0]


def some_mask(kind, *shape, causal=False):
    """Float or boolean, never over the first key, so that every query sees something."""
    mask = torch.ones(shape, dtype=torch.bool).triu(1) if causal else torch.rand(shape) < 0.4
    mask[..., 0] = False
    return (normal(shape) * (not causal)).masked_fill(mask, -torch.inf) if kind == "float" else mask


def tensors(model, batch, t, s, mask_rank=2, batched=True):
    """Query, key, value, padding mask and attention mask for a caller."""
    attention, s = model.attention, t if model.inputs == "self" else s
    shapes = [(t, E), (s, attention.kdim), (s, attention.vdim)]
    if batched:
        shapes = [(batch, n, width) if attention.batch_first else (n, batch, width) for n, width in shapes]
    shape = (t, s) if mask_rank == 2 else (batch * H if batched else H, t, s)
    mask = some_mask(model.mask, *shape, causal=model.flags.get("is_causal", False))
    return *map(normal, shapes), some_mask(model.padding, *([batch] if batched else []), s), mask


FLAG, KIND, SIZES = st.booleans(), st.sampled_from([None, "bool", "float"]), st.tuples(*[st.integers(1, 4)] * 3)
OPTIONS = {"kdim": st.sampled_from([E, 5]), "vdim": st.sampled_from([E, 6])}
OPTIONS |= dict.fromkeys(("bias", "add_bias_kv", "add_zero_attn", "batch_first"), FLAG)
CALL = {"inputs": st.sampled_from(["self", "key is value", "separate"]), "padding": KIND, "mask": KIND}
CALL |= dict.fromkeys(("only_output", "need_weights", "average_attn_weights", "is_causal"), FLAG)


@settings(max_examples=120, derandomize=True)
@given(st.fixed_dictionaries(OPTIONS), st.fixed_dictionaries(CALL), SIZES, SIZES, st.sampled_from([2, 3]), FLAG)
def test_it_computes_what_the_module_computes(options, call, first, second, mask_rank, batched):
    if call["inputs"] != "separate":
        options["vdim"] = options["kdim"] = E if call["inputs"] == "self" else options["kdim"]
    call["is_causal"] &= call["mask"] is not None
    model = Caller(randomised(nn.MultiheadAttention(E, H, **options)), **call)
    graph_module, modified = decompose(model)
    assert modified
    assert not any(isinstance(module, nn.MultiheadAttention) for module in graph_module.modules())
    assert sum(p.numel() for p in graph_module.parameters()) == sum(p.numel() for p in model.parameters())
    assert calls(graph_module) == (call["only_output"] or not call["need_weights"])
    for sizes, candidate in ((first, graph_module), (second, pickle.loads(pickle.dumps(graph_module)))):
        inputs = tensors(model, *sizes, mask_rank, batched)
        expected = model(*inputs)  # with gradients, hence by the slow path
        assert_equal(candidate(*inputs), expected)
        with torch.no_grad():
            assert_equal(model(*inputs), expected)


TOGETHER, SEPARATE = ["in_proj", "out_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize(
    ("inputs", "widths", "names"),
    [("self", {}, TOGETHER), ("key is value", {}, SEPARATE), ("separate", {"kdim": 5, "vdim": 6}, SEPARATE)],
)
def test_projections_are_plain_linear_sites(inputs, widths, names):
    attention = nn.MultiheadAttention(E, H, add_bias_kv=True, dtype=torch.bfloat16, **widths).requires_grad_(False)
    attention.bias_k.requires_grad_(True)
    graph_module, _ = decompose(Caller(attention.eval(), inputs))
    assert site_names(graph_module) == names
    assert {type(module) for module in graph_module.attention.children()} == {nn.Linear}
    assert not any(module.training for module in graph_module.attention.modules())
    held = dict(graph_module.named_parameters())
    assert {name: p for name, p in held.items() if p.requires_grad} == {"attention.bias_k": attention.bias_k}
    assert {p.dtype for p in held.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("read", "fused", "names"),
    [
        (lambda attention, x: attention(x, x, x)[0] * 2, True, TOGETHER),
        (lambda attention, x: attention(x, x, x)[1] * 2, False, TOGETHER[:1]),
        (lambda attention, x: attention(x, x, x)[-1] * 2, False, TOGETHER),
        (lambda attention, x: {"both": attention(value=x, key=x, query=x), "x": x}, False, TOGETHER),
        (lambda attention, x: attention(x, x, x, need_weights=False), True, TOGETHER),
        (lambda attention, x: attention(x, x, x, None, False)[::-1], True, TOGETHER),
        (lambda attention, x: attention(attention(x, x, x)[0], x, x)[0] + attention(x, x, x)[0], True, SEPARATE * 3),
    ],
)
def test_users_get_what_they_read_and_weights_are_computed_only_for_them(read, fused, names):
    model, x = randomised(Reader(read)), normal(3, 4, E)
    graph_module, _ = decompose(model)
    assert_equal(graph_module(x), model(x))
    assert calls(graph_module) == fused
    assert set(names) <= set(site_names(graph_module))


def test_a_query_that_sees_nothing_is_nan_where_the_weights_are_read():
    model = Caller(randomised(nn.MultiheadAttention(E, H)), padding="bool", only_output=False)
    graph_module, _ = decompose(model)
    inputs = (*normal(3, 3, 2, E), torch.tensor([[True] * 3, [False] * 3]), None)
    assert_equal(graph_module(*inputs), model(*inputs))
    assert graph_module(*inputs)[0][:, 0].isnan().all()


class Functional(nn.Module):
    """Calls the function with weights that are packed, separate, or separate with biases joined on the way."""

    def __init__(self, form, key="x", again=False, **flags):
        super().__init__()
        self.form, self.key, self.again, self.flags = form, key, again, flags
        self.packed, self.packed_bias = nn.Parameter(torch.randn(3 * E, E)), nn.Parameter(torch.randn(3 * E))
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.bias_k, self.bias_v = (nn.Parameter(torch.randn(1, 1, E)) for _ in range(2))

    def forward(self, x, y):
        parameters, flags = [self.packed, self.packed_bias, self.bias_k, self.bias_v], {"training": False}
        if self.form != "packed":
            joined = torch.cat([self.q.bias, self.k.bias, self.v.bias]) if self.form == "joined" else None
            parameters = [None, joined, None, None]
            flags |= {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
            flags["use_separate_proj_weight"] = True
        key = x if self.key == "x" else y
        arguments = (x, key, key, x.shape[-1], H, *parameters, False, 0.1, self.out.weight, self.out.bias)
        output, weights = F.multi_head_attention_forward(*arguments, **flags | self.flags)
        return output, weights + self.packed.sum() if self.again else weights


@pytest.mark.parametrize(
    ("form", "key", "again", "names"),
    [
        ("packed", "x", False, ["packed", "out"]),
        ("packed", "y", False, ["packed.q", "packed.k", "packed.v", "out"]),
        ("packed", "y", True, ["out"]),  # the packed weight is used elsewhere, hence cut in the graph
        ("separate", "x", False, ["q", "k", "v", "out"]),
        ("joined", "y", False, ["q", "k", "v", "out"]),
    ],
)
def test_the_function_becomes_the_same(form, key, again, names):
    model, x, y = Functional(form, key, again).double().eval(), normal(5, 3, E), normal(4, 3, E)
    graph_module, modified = decompose(model)
    assert modified
    assert_equal(graph_module(x, y), model(x, y))
    assert not calls(graph_module, F.multi_head_attention_forward)
    assert calls(graph_module, torch.cat) == (form == "packed")  # for bias_k and bias_v
    assert site_names(graph_module) == names


LEAF = {"__module__": "torch.nn.elsewhere"}  # what makes symbolic tracing keep a module whole


def changed(change, **options):
    attention = nn.MultiheadAttention(E, H, **options).eval()
    change(attention)
    return Caller(attention)


@pytest.mark.parametrize(
    "model",
    [
        changed(lambda module: module.register_forward_hook(lambda *_: None)),
        changed(lambda module: module.train(), dropout=0.1),
        changed(lambda module: parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())),
        changed(lambda module: parametrizations.weight_norm(module.out_proj)),
        Caller(type("Subclass", (nn.MultiheadAttention,), LEAF)(E, H)),
        Caller(nn.MultiheadAttention(E, H), is_causal=True),
        Reader(lambda attention, x: attention(x, x, x)[0] + attention.out_proj.bias),
        Reader(lambda attention, x: attention(x, x, x, need_weights=x.sum() > 0)[0]),
        OptionalMask(None),
        Functional("packed", training=True),
        Functional("packed", static_k=torch.zeros(6, 4, 4)),
        nn.Sequential(nn.TransformerEncoderLayer(E, H), nn.Linear(E, E)).eval(),
    ],
)
def test_what_would_change_is_left_alone(model):
    graph_module, modified = decompose(model)
    assert not modified
    assert graph_module.code == fx.symbolic_trace(model).code


def test_new_nodes_inherit_meta_but_no_description_of_values():
    graph_module = fx.symbolic_trace(Reader(lambda attention, x: attention(x, x, x)[0]).eval())
    (node,) = graph_module.graph.find_nodes(op="call_module")
    node.meta = {"custom": 0, "val": 1, "tensor_meta": 2, "balf": 3}
    DecomposeAttention()(graph_module)
    new = [node.meta for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    assert all(meta == {"custom": 0} for meta in new)
    assert len({id(meta) for meta in new}) == len(new) > 10


def test_a_vision_transformer_is_laid_open_and_can_be_copied():
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model, images = randomised(VisionTransformer(**sizes, num_classes=7)), normal(3, 3, 32, 32)
    graph_module, _ = decompose(model)
    layers = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert {f"{layer}.{name}" for layer in layers for name in TOGETHER} < set(site_names(graph_module))
    for candidate in (graph_module, copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert_equal(candidate(images), model(images))
    assert not DecomposeAttention()(graph_module).modified


@pytest.mark.slow
@pytest.mark.parametrize("only_output", [True, False])
def test_it_compiles_and_exports_for_any_shape(only_output):
    attention = randomised(nn.MultiheadAttention(E, H, add_bias_kv=True))
    model = Caller(attention, "separate", padding="bool", mask="bool", only_output=only_output)
    graph_module, _ = decompose(model)
    first, second = (tensors(model, *sizes, mask_rank=3) for sizes in ((2, 3, 4), (3, 5, 2)))
    assert_equal(torch.compile(graph_module, backend="eager", fullgraph=True, dynamic=True)(*first), model(*first))
    dynamic = [dict.fromkeys(range(3 if x is first[-1] else 2), torch.export.Dim.DYNAMIC) for x in first]
    exported = torch.export.export(graph_module, first, dynamic_shapes=tuple(dynamic)).module()
    assert_equal(exported(*second), model(*second))
