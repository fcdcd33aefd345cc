"""Random models, and what must hold for every model.

Some seeds are fixed. `python -m pytest tests/test_random_models.py --models 1500` draws new ones for about an hour, and
`--models 1 --first SEED` repeats one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from random_models import RandomModel, random_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import balf_fx
from balf_fx.backend import balf
from balf_fx.errors import BudgetError, CaptureError, NoSiteError
from balf_fx.graph.curves import DIVIDED, each_rank

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1}


def draw(seed: int) -> tuple[RandomModel, list[Any], dict[str, Any]]:
    """A model, calibration batches and options of `balf_fx.compile`."""
    rng = Random(seed)
    model = random_model(seed)
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    model = model.to(dtype)
    batches = list(model.batches(rng.choice(([8, 8], [6, 8, 3], [16])), dtype))
    options: dict[str, Any] = {
        rng.choice(("flops", "params")): rng.choice((0.4, 0.6, 0.8, 0.95)),
        "effort": rng.choice(("fast", "balanced", "best", "best")),
        "capture": rng.choice(("symbolic_trace", "symbolic_trace", "export", "auto")),
        "strict": False,
        "progress": False,
    }
    if rng.random() < 0.3:
        extra = ({"centred": False}, {"widths": False}, {"fold_batchnorm": False}, {"split": False}, {"memory": 0})
        options |= rng.choice((*extra, {"seed": 7}, {"dense": ["*"], "effort": "best"}))
    elif rng.random() < 0.1:
        options |= rng.choice(({"factors": "air", "effort": "fast"}, {"factors": "svd", "effort": "fast"}))
    if rng.random() < 0.15 and options.get("factors") != "svd":  # which no weights change
        options["weights"] = _weights
    options |= {"multiple_of": rng.choice((1, 1, 2, 4, 8)), "pivot": rng.random() < 0.7}
    options |= {"separable": rng.choice((True, False, None))}
    if "factors" in options and options["separable"]:
        options["separable"] = None  # with these factors, kernels are never divided
    return model, batches, options


def _weights(batch: Any) -> torch.Tensor:
    """Of all samples but the last, which does not count, unless it is the only one.

    The backend passes several values where Dynamo captures the model from a later place on.
    """
    samples = len(batch[0] if isinstance(batch, tuple) else batch)
    weights = torch.ones(samples)
    weights[-1] = float(samples == 1)
    return weights


def flops_of(model: nn.Module, batch: torch.Tensor) -> int:
    """Of one call, as torch counts them; fused operations, which it does not know everywhere, as their products."""
    counter, plain_recurrence = FlopCounterMode(display=False), torch.backends.mkldnn.flags(enabled=False)
    with plain_attention(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), plain_recurrence, counter:
        model(batch.clone())
    return counter.get_total_flops()


@contextmanager
def plain_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` in the operations that Dynamo captures, not in one that rounds in another way."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def call(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(batch.clone())


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Equal structures, shapes and dtypes; values up to a share of the largest."""
    leaves, spec = pytree.tree_flatten(found)
    others, other_spec = pytree.tree_flatten(expected)
    assert spec == other_spec
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.dtype == other.dtype
        assert leaf.shape == other.shape
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(leaf, other, rtol=0.0, atol=tolerance * scale)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_random_models(model_seed, tmp_path):
    model, batches, options = draw(model_seed)
    given, kept, expected = copy.deepcopy(batches), state(model), call(model, batches[0])
    try:
        small = balf_fx.compile(model, batches, **options)
    except (NoSiteError, CaptureError) as error:
        if isinstance(error, CaptureError) and options["capture"] == "auto":
            raise
        small = None
    assert_same(state(model), kept)
    assert_same(call(model, batches[0]), expected)
    assert_same(batches, given)
    if small is None:
        return
    check_costs(model, small, batches[0], options)
    check_sizes(small, options)
    check_outputs(model, small, batches)
    check_copies(model, small, batches[0], tmp_path)
    again = balf_fx.compile(model, batches, **options)
    assert_same(state(again), state(small))
    if options.get("factors") != "air":
        check_exact(model, batches, options)
    (check_backend, check_module, check_limit, check_latency)[model_seed % 4](model, batches, options)


def check_costs(model: RandomModel, small: nn.Module, batch: torch.Tensor, options: dict[str, Any]) -> None:
    """The report says what is counted, and the budget holds or is as near as can be reached."""
    report = balf_fx.report(small)
    runs = small.live() if isinstance(small, RandomModel) else small  # the user's own forward runs dead steps, too
    before, after = flops_of(model.live(), batch), flops_of(runs, batch)
    thin = any(row.kind == "experts" and row.rank == 1 for row in report.sites)
    assert report.flops_after == after or (thin and report.flops_after > after)  # einsum multiplies at rank 1: no FLOPs
    assert report.flops_before == before
    params = sum(parameter.numel() for parameter in small.parameters())
    assert report.params_after == params
    assert report.params_before == sum(parameter.numel() for parameter in model.parameters())
    share = after / before if "flops" in options else params / report.params_before
    budget = options.get("flops") or options.get("params")
    if share > budget:
        with pytest.raises(BudgetError) as raised:
            balf_fx.compile(model, [batch], **{**options, "strict": True})
        assert raised.value.minimum > budget - 1e-9


def check_sizes(small: nn.Module, options: dict[str, Any]) -> None:
    """Ranks, over all groups, and sizes are multiples where they are reduced; without pivots no map has any."""
    plan = balf_fx.plan(small)
    for choice in plan.allocation.choices:
        together = 1 if choice.site.has_experts else choice.site.groups
        ranks = [rank for rank in each_rank(choice.chosen.rank) if rank is not None]
        assert not [rank for rank in ranks if rank * together % options["multiple_of"]]
    reduced = [width for width in plan.widths if width.size != width.features]
    assert not [width for width in reduced if width.size % options["multiple_of"]]
    if not options["pivot"]:
        divided = {True: DIVIDED, False: (), None: ("pointwise_first",)}[options["separable"]]
        allowed = {"", "pair", *divided}
        assert {row.form for row in balf_fx.report(small).sites} <= allowed


def check_outputs(model: nn.Module, small: nn.Module, batches: list[torch.Tensor]) -> None:
    """Structure, shapes and dtypes are the model's, for other numbers of samples, too."""
    for size in (1, 5, len(batches[0])):
        batch = batches[0][:1].repeat(size, *[1] * (batches[0].dim() - 1))
        found, wanted = call(small, batch), call(model, batch)
        assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
        for leaf, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
            assert torch.isfinite(leaf).all() or not torch.isfinite(other).all()


def check_copies(model: RandomModel, small: nn.Module, batch: torch.Tensor, folder: Path) -> None:
    """Copies, pickles and files compute the same, bit for bit."""
    expected = call(small, batch)
    assert_same(call(copy.deepcopy(small), batch), expected)
    if not isinstance(small, RandomModel):  # these hold local functions
        assert_same(call(pickle.loads(pickle.dumps(small)), batch), expected)
    balf_fx.save(small, folder / "small.safetensors")
    assert_same(call(balf_fx.load(folder / "small.safetensors", model), batch), expected)


def check_exact(model: RandomModel, batches: list[torch.Tensor], options: dict[str, Any]) -> None:
    """With the whole budget, the result computes what the model does."""
    whole = {name: 1.0 if name in ("flops", "params") else value for name, value in options.items()}
    exact = balf_fx.compile(model, batches, **whole)
    assert_same(call(exact, batches[0]), call(model, batches[0]), TOLERANCE[batches[0].dtype])


def check_backend(model: RandomModel, batches: list[torch.Tensor], options: dict[str, Any]) -> None:
    """Calibration calls return what the model does, and the compressed model has its structure."""
    torch.compiler.reset()
    chosen = {name: value for name, value in options.items() if name not in ("capture", "progress")}
    small = torch.compile(model, backend=balf, options={**chosen, "calibration_steps": len(batches), "inner": "eager"})
    kept = state(model)
    with plain_attention():
        expected = [call(model, batch) for batch in batches]
        assert_same([call(small, batch) for batch in batches], expected)
    found = call(small, batches[0])
    assert pytree.tree_structure(found) == pytree.tree_structure(expected[0])
    for leaf, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected[0]), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
    assert_same(state(model), kept)


def check_module(model: RandomModel, batches: list[torch.Tensor], options: dict[str, Any]) -> None:
    """A copy of the user's own model keeps its class and the budget; its copies and files compute the same."""
    options = {**options, "result": "module"}
    try:
        small = balf_fx.compile(model, batches, **options)
    except NoSiteError:  # its layers are all inside modules that do more than they
        return
    assert type(small) is type(model)
    check_costs(model, small, batches[0], options)
    check_outputs(model, small, batches)
    with TemporaryDirectory() as folder:
        check_copies(model, small, batches[0], Path(folder))


def check_limit(model: RandomModel, batches: list[torch.Tensor], options: dict[str, Any]) -> None:
    """The chosen model is the last one whose bound keeps the limit, and costs no more than the original."""
    validation = list(model.batches([40], batches[0].dtype))
    limited = {name: value for name, value in options.items() if name not in ("flops", "params")}
    limited |= {"divergence": 0.5, "validation": validation, "confidence": 0.8, "effort": "fast"}
    small = balf_fx.compile(model, batches, **limited)
    certificate = balf_fx.report(small).certificate
    assert certificate is not None
    assert all(one.bound <= certificate.limit for one in certificate.tried[:-1])
    shares = [one.share for one in certificate.tried]
    assert shares == sorted(shares, reverse=True)
    chosen = 1.0 if certificate.chosen is None else certificate.chosen.share
    assert flops_of(small, batches[0]) <= chosen * flops_of(model.live(), batches[0])
    check_outputs(model, small, batches)


def check_latency(model: RandomModel, batches: list[torch.Tensor], options: dict[str, Any]) -> None:
    """A budget of time gives a model that took less time than the original, or the original, with both times."""
    timed = {name: value for name, value in options.items() if name not in ("flops", "params")}
    small = balf_fx.compile(model, batches, **{**timed, "latency": 0.7, "runner": "eager", "effort": "fast"})
    timing = balf_fx.report(small).timing
    assert timing is not None
    assert timing.measured > 0
    if timing.measured > 1:  # the original against itself, on a busy machine
        assert timing.predicted == 1
    assert flops_of(small, batches[0]) <= flops_of(model.live(), batches[0])
    check_outputs(model, small, batches)
