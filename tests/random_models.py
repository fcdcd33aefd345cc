"""Small random models, drawn from a seed: every kind of layer that can be compressed, between all others.

A model is a list of steps. Each reads values that earlier steps computed, and adds a value: rows [F], tokens [L, F] or
images [C, H, W], without the batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Shape = tuple[int, ...]
Found = tuple[nn.Module, Shape]

_WIDTHS = (8, 12, 16, 24, 32)
_TOKENS = 6
_SIDE = 8


class Apply(nn.Module):
    """A function of a module that holds its layers and parameters, and of values."""

    def __init__(self, function: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, *values: Any) -> Any:
        return self.function(self, *values)


class RandomModel(nn.Module):
    """Steps over a growing list of values; returns a tensor, a tuple or a dict."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        first = rng.choice(((16,), (_TOKENS, 16), (3, _SIDE, _SIDE)))
        self.shape = first
        self.steps = nn.ModuleList()
        self.reads: list[tuple[int, ...]] = []
        shapes = [first]
        for _ in range(rng.randint(3, 12)):
            read, (module, shape) = _draw(rng, shapes)
            self.steps.append(module)
            self.reads.append(read)
            shapes.append(shape)
        self.returns = rng.choice(("tensor", "tensor", "tuple", "dict"))
        # mostly compressible: the last value passes through one more layer
        read, (module, _) = (len(shapes) - 1,), _project(rng, shapes[-1])
        self.steps.append(module)
        self.reads.append(read)

    def live(self) -> RandomModel:
        """The same model without the steps whose values nothing reads; it shares the layers of the others."""
        count = len(self.reads)
        needed = {count, count - 1} if self.returns != "tensor" else {count}
        for index in range(count, 0, -1):
            if index in needed:
                needed |= set(self.reads[index - 1])
        model = copy.copy(self)
        steps = [step if index + 1 in needed else nn.Identity() for index, step in enumerate(self.steps)]
        model._modules = {"steps": nn.ModuleList(steps)}
        model.reads = [read if index + 1 in needed else (0,) for index, read in enumerate(self.reads)]
        return model

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step, read in zip(self.steps, self.reads, strict=True):
            values.append(step(*[values[index] for index in read]))
        if self.returns == "tuple":
            return values[-1], values[-2]
        return {"last": values[-1], "before": [values[-2]]} if self.returns == "dict" else values[-1]

    def batches(self, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Random inputs with these numbers of samples."""
        for size in sizes:
            yield torch.randn(size, *self.shape).to(dtype)


def random_model(seed: int) -> RandomModel:
    """The model of a seed, in evaluation mode, with weights and statistics unlike those that layers start with."""
    torch.manual_seed(seed)
    model = RandomModel(Random(seed)).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.add_(0.2 * torch.randn_like(tensor))
    return model


def _draw(rng: Random, shapes: Sequence[Shape]) -> tuple[tuple[int, ...], Found]:
    """A step, and the indices of the values that it reads."""
    index = rng.choice((len(shapes) - 1,) * 3 + tuple(range(len(shapes))))
    shape = shapes[index]
    alike = [other for other, found in enumerate(shapes) if found == shape]
    if len(alike) > 1 and rng.random() < 0.3:
        pair = (index, rng.choice(alike))
        return pair, _pair(rng, shape)
    builders = {1: _ROWS, 2: _SEQUENCES, 3: _IMAGES}[len(shape)]
    return (index,), rng.choice((_project, *builders))(rng, shape)


def _pair(rng: Random, shape: Shape) -> Found:
    """Something computed from two values of one shape."""
    axis = 1 if len(shape) == 3 else -1
    joined = (2 * shape[0], *shape[1:]) if len(shape) == 3 else (*shape[:-1], 2 * shape[-1])
    functions: dict[str, tuple[Callable[..., Any], Shape]] = {
        "add": (lambda _, x, y: x + y, shape),
        "sub": (lambda _, x, y: torch.sub(x, y, alpha=0.5), shape),
        "mul": (lambda _, x, y: x * torch.sigmoid(y), shape),
        "cat": (lambda _, x, y: torch.cat([x, y], axis), joined),
        "add_": (lambda _, x, y: (x * 1.5).add_(y), shape),
        "iadd": (lambda _, x, y: operator.iadd(x.tanh(), y), shape),
        "where": (lambda _, x, y: torch.where(x > 0, x, y), shape),
        "stack": (lambda _, x, y: torch.stack([x, y]).mean(0), shape),
    }
    if len(shape) == 2 and rng.random() < 0.3:
        return _cross(shape), shape
    function, result = functions[rng.choice(sorted(functions))]
    return Apply(function), result


def _cross(shape: Shape) -> nn.Module:
    """Attention of one sequence to another, as in a decoder."""
    layers = {name: nn.Linear(shape[-1], 16) for name in ("q", "k", "v")}

    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(t).unflatten(-1, (2, 8)).transpose(1, 2) for layer, t in ((m.q, x), (m.k, y), (m.v, y)))
        return x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Apply(run, out=nn.Linear(16, shape[-1]), **layers)


def _experts(rng: Random, shape: Shape) -> Found:
    """Experts that all see every token, weighted by a router."""
    features, outputs, count = shape[-1], rng.choice((8, 16, 24)), 3
    first, last = torch.randn(count, features, outputs) / 4, torch.randn(count, outputs, features) / 4
    way = rng.choice(("bmm", "matmul", "einsum"))

    def run(m: Any, x: Tensor) -> Tensor:
        scores = m.router(x).softmax(-1)
        if way == "einsum":
            y = torch.einsum("eno,eof->enf", F.silu(torch.einsum("nd,edo->eno", x.flatten(0, 1), m.first)), m.last)
        elif way == "bmm":
            y = torch.bmm(F.silu(torch.bmm(x.flatten(0, 1).unsqueeze(0).expand(count, -1, -1), m.first)), m.last)
        else:
            y = F.silu(x.flatten(0, 1) @ m.first) @ m.last
        return x + (y * scores.flatten(0, 1).t().unsqueeze(-1)).sum(0).view_as(x)

    held = {"first": nn.Parameter(first), "last": nn.Parameter(last), "router": nn.Linear(features, count)}
    return Apply(run, **held), shape


def _recurrent(rng: Random, shape: Shape) -> Found:
    """A layer that is left alone as a whole."""
    kind = rng.choice((nn.GRU, nn.LSTM))
    return Apply(lambda m, x: m.layer(x)[0], layer=kind(shape[-1], 16, batch_first=True)), (shape[0], 16)


def _project(rng: Random, shape: Shape) -> Found:
    """A layer that can be compressed, in one of the ways in which it can be written."""
    bias = rng.random() < 0.6
    if len(shape) == 3:
        return _convolution(rng, shape, bias)
    inputs, outputs = shape[-1], rng.choice(_WIDTHS)
    weight, offset = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5), nn.Parameter(torch.randn(outputs) / 4)
    ways: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(inputs, outputs, bias=bias),
        "module": lambda: nn.Linear(inputs, outputs, bias=bias),
        "function": lambda: Apply(lambda m, x: F.linear(x, m.weight, m.bias), weight=weight, bias=offset),
        "product": lambda: Apply(lambda m, x: x @ m.weight, weight=nn.Parameter(weight.data.t().contiguous())),
        "turned": lambda: Apply(lambda m, x: torch.matmul(x, m.weight.t()) + m.bias, weight=weight, bias=offset),
        "einsum": lambda: Apply(lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), weight=weight),
        "conv1d": lambda: Apply(_addmm, weight=nn.Parameter(weight.data.t().contiguous()), bias=offset),
        "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(inputs, outputs, bias=bias)),
        "scaled": lambda: Apply(lambda m, x: F.linear(x, m.weight * 0.5), weight=weight),
        "sliced": lambda: Apply(_sliced, layer=nn.Linear(inputs, 2 * outputs, bias=bias), outputs=outputs),
        "mlp": lambda: nn.Sequential(nn.Linear(inputs, 32, bias=bias), _activation(rng), nn.Linear(32, outputs)),
        "gated": lambda: _gated(inputs, outputs, bias),
        "glu": lambda: nn.Sequential(nn.Linear(inputs, 48, bias=bias), nn.GLU(), nn.Linear(24, outputs)),
    }
    return ways[rng.choice(sorted(ways))](), (*shape[:-1], outputs)


def _addmm(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, x.reshape(-1, x.shape[-1]), m.weight).view(*x.shape[:-1], m.weight.shape[1])


def _sliced(m: Any, x: Tensor) -> Tensor:
    return m.layer(x)[..., : m.outputs] + F.linear(x, m.layer.weight[: m.outputs])


def _gated(inputs: int, outputs: int, bias: bool) -> nn.Module:
    layers = {name: nn.Linear(inputs, 24, bias=bias) for name in ("gate", "up")}
    return Apply(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), down=nn.Linear(24, outputs, bias=bias), **layers)


def _convolution(rng: Random, shape: Shape, bias: bool) -> Found:
    channels, height, width = shape
    kernel, outputs = rng.choice((1, 3, 3, 5)), rng.choice((8, 16, 24))
    groups = rng.choice([1, 1, *(group for group in (2, 4, channels) if channels % group == 0 == outputs % group)])
    padding = kernel // 2
    modes = ("zeros", "zeros", "reflect", "circular", "replicate")
    mode = rng.choice(modes if padding < min(height, width) else ("zeros",))
    stride = rng.choice((1, 1, 2)) if min(height, width) >= 4 else 1
    given: dict[str, Any] = {"padding": padding, "groups": groups, "bias": bias}
    way = rng.choice(("module", "module", "function", "transposed", "separable", "dilated"))
    size = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    if way == "transposed":
        return nn.ConvTranspose2d(channels, outputs, kernel, **given), (outputs, height, width)
    if way == "dilated":
        layer = nn.Conv2d(channels, outputs, 3, padding=2, dilation=2, groups=groups, bias=bias)
        return layer, (outputs, height, width)
    if way == "separable":
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
        pointwise = nn.Conv2d(32, outputs, 1, bias=bias)
        widen = nn.Conv2d(channels, 32, 1)
        middle = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        return nn.Sequential(depthwise, widen, _activation(rng), middle, pointwise), (outputs, height, width)
    layer = nn.Conv2d(channels, outputs, kernel, stride=stride, padding_mode=mode, **given)
    if way == "function" and mode == "zeros":
        layer = Apply(
            lambda m, x: F.conv2d(x, m.layer.weight, m.layer.bias, stride, padding, 1, groups),
            layer=layer,
        )
    return layer, (outputs, *size)


def _activation(rng: Random) -> nn.Module:
    kinds = (nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.Hardswish())
    return rng.choice(kinds)


def _activate(rng: Random, shape: Shape) -> Found:
    functions = (torch.relu, torch.sigmoid, F.softplus, torch.sin, lambda x: x.clamp(-1, 1), lambda x: x.abs())
    if rng.random() < 0.6:
        return _activation(rng), shape
    function = rng.choice(functions)
    return Apply(lambda _, x: function(x)), shape


def _drop(rng: Random, shape: Shape) -> Found:
    return rng.choice((nn.Dropout(0.5), nn.Identity())), shape


def _scale(rng: Random, shape: Shape) -> Found:
    size = (shape[0], 1, 1) if len(shape) == 3 else shape[-1:]
    scale, offset = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(size) / 4)
    return Apply(lambda m, x: x * m.scale + m.offset, scale=scale, offset=offset), shape


def _normalise(rng: Random, shape: Shape) -> Found:
    if len(shape) == 3:
        groups = 4 if shape[0] % 4 == 0 else 1
        kinds = (nn.BatchNorm2d, nn.BatchNorm2d, lambda n: nn.GroupNorm(groups, n), nn.InstanceNorm2d)
        return rng.choice(kinds)(shape[0]), shape
    kinds = [nn.LayerNorm, nn.RMSNorm] if len(shape) == 2 else [nn.LayerNorm, nn.BatchNorm1d]
    return rng.choice(kinds)(shape[-1]), shape


def _halve(rng: Random, shape: Shape) -> Found:
    """Half of the features, or both halves together."""
    axis = 1 if len(shape) == 3 else -1
    features = shape[0] if len(shape) == 3 else shape[-1]
    if features < 16 or features % 2:
        return _activate(rng, shape)
    half = (features // 2, *shape[1:]) if len(shape) == 3 else (*shape[:-1], features // 2)
    functions: dict[str, Callable[..., Any]] = {
        "chunk": lambda _, x: operator.mul(*x.chunk(2, axis)),
        "split": lambda _, x: x.split(features // 2, axis)[1],
        "narrow": lambda _, x: x.narrow(axis, 1, features // 2),
        "in place": lambda _, x: x.chunk(2, axis)[0].relu_(),
        "index": lambda _, x: x[:, : features // 2] if axis == 1 else x[..., ::2],
    }
    return Apply(functions[rng.choice(sorted(functions))]), half


def _block(rng: Random, shape: Shape) -> Found:
    """A residual block, whose first layer is used twice now and then."""
    features = shape[0] if len(shape) == 3 else shape[-1]
    twice = rng.random() < 0.3
    if len(shape) == 3:
        layers = [nn.Conv2d(features, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, features, 1)]
    else:
        layers = [nn.Linear(features, 32), nn.LayerNorm(32), nn.Linear(32, features)]
    first, norm, last = layers

    def run(m: Any, x: Tensor) -> Tensor:
        x = x + m.last(F.relu(m.norm(m.first(x))))
        return x + m.last(torch.tanh(m.first(x))) if twice else x

    return Apply(run, first=first, norm=norm, last=last), shape


def _attend(rng: Random, shape: Shape) -> Found:
    """Self-attention, in one of the ways in which it is written."""
    features, heads = shape[-1], 4
    if features % heads:
        return _activate(rng, shape)
    way = rng.choice(("sdpa", "fused", "eager", "module", "grouped", "causal"))
    if way == "module":
        attention = nn.MultiheadAttention(features, heads, batch_first=True)
        return Apply(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=attention), shape
    shared = 2 if way == "grouped" else heads
    wide, out = features // heads, nn.Linear(features, features)
    if way == "fused":
        return Apply(_fused, qkv=nn.Linear(features, 3 * features), out=out, heads=heads), shape
    layers = {"q": nn.Linear(features, features), "k": nn.Linear(features, shared * wide)}
    layers["v"] = nn.Linear(features, shared * wide, bias=False)

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, wide)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if shared < heads:
            k, v = (part.repeat_interleave(heads // shared, dim=1) for part in (k, v))
        if way == "eager":
            scores = (q @ k.transpose(-1, -2)) / wide**0.5
            seen = torch.softmax(scores, -1) @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=way == "causal")
        return x + m.out(seen.transpose(1, 2).flatten(2))

    return Apply(run, out=out, **layers), shape


def _fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, m.heads, -1).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def _mix_tokens(rng: Random, shape: Shape) -> Found:
    layer = nn.Linear(shape[0], shape[0])
    signal = nn.Conv1d(shape[1], shape[1], 3, padding=1)
    if rng.random() < 0.5:
        return Apply(lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=layer), shape
    return Apply(lambda m, x: m.signal(x.transpose(1, 2)).transpose(1, 2), signal=signal), shape


def _pool_tokens(rng: Random, shape: Shape) -> Found:
    functions: tuple[tuple[Callable[..., Any], int], ...] = (
        (lambda _, x: x.mean(1), shape[1]),
        (lambda _, x: x[:, 0], shape[1]),
        (lambda _, x: x.flatten(1), shape[0] * shape[1]),
        (lambda _, x: x.amax(dim=1), shape[1]),
    )
    function, features = rng.choice(functions)
    return Apply(function), (features,)


def _pool(rng: Random, shape: Shape) -> Found:
    channels, height, width = shape
    way = rng.choice(("average", "mean", "flatten", "tokens", "max", "upsample"))
    if way == "max" and min(height, width) >= 4:
        return rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2))), (channels, height // 2, width // 2)
    if way == "upsample" and height <= _SIDE // 2:
        return nn.Upsample(scale_factor=2), (channels, 2 * height, 2 * width)
    if way == "tokens":
        return Apply(lambda _, x: x.flatten(2).transpose(1, 2)), (height * width, channels)
    if way == "flatten" and channels * height * width <= 256:
        return nn.Flatten(), (channels * height * width,)
    if way == "average":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (channels,)
    return Apply(lambda _, x: x.mean((2, 3))), (channels,)


def _gate(rng: Random, shape: Shape) -> Found:
    """Squeeze and excitation."""
    down, up = nn.Conv2d(shape[0], 8, 1), nn.Conv2d(8, shape[0], 1)
    return Apply(lambda m, x: x * m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid(), down=down, up=up), shape


def _shuffle(rng: Random, shape: Shape) -> Found:
    channels = shape[0]
    if channels % 4:
        return _activate(rng, shape)
    if rng.random() < 0.5:
        return nn.ChannelShuffle(4), shape
    return nn.PixelShuffle(2), (channels // 4, 2 * shape[1], 2 * shape[2])


def _unfold(rng: Random, shape: Shape) -> Found:
    return Apply(lambda _, x: x.unflatten(1, (4, -1))), (4, shape[0] // 4)


_COMMON = (_activate, _scale, _normalise, _block, _halve, _drop)
_ROWS = (*_COMMON, lambda rng, shape: (_unfold if shape[0] % 4 == 0 and shape[0] >= 32 else _activate)(rng, shape))
_SEQUENCES = (*_COMMON, _attend, _attend, _experts, _mix_tokens, _pool_tokens, _recurrent)
_IMAGES = (*_COMMON, _project, _pool, _gate, _shuffle)
