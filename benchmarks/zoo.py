"""Every architecture within reach: captured, compressed to 60 % of its FLOPs and checked against the original.

python benchmarks/zoo.py --compile --json benchmarks/results/zoo.json

Weights are random, so nothing is said about accuracy. Models are examined in a process apart, which a crash or a time
limit ends without ending the sweep.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import re
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch
from common import write_json
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import balf_fx
from balf_fx.errors import BudgetError
from balf_fx.graph.flops import flop_counter

Source = Literal["torchvision", "timm", "transformers"]
Batch = Tensor | dict[str, Tensor]

BUDGET = 0.6
TOLERANCE = 1e-4
"""Largest deviation of the dense graph from the model, relative to the model's largest output."""

EXACT_TOLERANCE = 1e-9
"""The same in float64, for models in which float32 alone deviates by more: random weights make some of them chaotic."""

LARGEST = 150_000_000
"""Parameters above which a model is left out, or cut to two blocks where timm can."""

SIZES = (64, 56, 96, 128, 160)
"""Image sizes to try before a model's own; 56 is for patches of 14."""

COMPILED = ("resnet18", "mobilenet_v3_small", "test_vit", "test_convnext", "bert", "gpt2")
"""Models that --compile hands to torch.compile."""


@dataclass(frozen=True)
class Case:
    """A model to examine; `options` are keyword arguments of its constructor."""

    source: Source
    name: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Skip:
    """A model that is left out, and why."""

    source: Source
    name: str
    reason: str


@dataclass(frozen=True)
class Row:
    """What was found out about one model; None where it was not reached.

    Attributes:
        options: keyword arguments that make the model smaller than its name says.
        input: the shapes of the first calibration batch.
        captured: "symbolic_trace" or "export".
        flops_in_sites, flops_refused: shares of the model's FLOPs, the latter by reason.
        minimum: the smallest budget that factorization can reach, where that is above what was asked for.
        flops_kept: share of the FLOPs, counted on the compressed model.
        spread: by how much the model's outputs differ between samples, relative to the largest of them.
        deviation, relative_deviation: of the outputs at budget 1 from the model's own, over two batch sizes.
        exact_deviation: relative, of the model and its graph in float64, where rounding in float32 adds up to more
            than the tolerance, as it does in deep models with random weights.
        compile_deviation: relative, of torch.compile's outputs from the compressed model's own.
        problems: one for each check that failed, "check: exception: first line of its message"; empty for success.
    """

    source: Source
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    input: str | None = None
    captured: str | None = None
    flops_in_sites: float | None = None
    flops_refused: Mapping[str, float] = field(default_factory=dict)
    minimum: float | None = None
    flops_kept: float | None = None
    spread: float | None = None
    deviation: float | None = None
    relative_deviation: float | None = None
    exact_deviation: float | None = None
    compile_deviation: float | None = None
    seconds: float = 0.0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A model and what makes a batch of a given number of samples for it."""

    model: nn.Module
    batch: Callable[[int], Batch]


# --- which models -----------------------------------------------------------------------------------------------------


def cases(source: Source, patterns: Sequence[str] = ()) -> Iterator[Case | Skip]:
    """The models of a source whose names match any of the patterns, one by one since selecting takes time."""
    if importlib.util.find_spec(source) is None:
        return iter([Skip(source, "*", "not installed")])
    select = {"torchvision": _torchvision_cases, "timm": _timm_cases, "transformers": _transformers_cases}
    return (case for case in select[source](patterns) if _matches(case.name, patterns))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _torchvision_cases(patterns: Sequence[str]) -> Iterator[Case | Skip]:
    from torchvision import models

    left_out = {
        "quantized": (models.quantization, "has integer weights"),
        "detection": (models.detection, "returns a varying number of boxes"),
        "optical flow": (models.optical_flow, "iterates over pairs of large images"),
    }
    reasons = {name: f"{kind}: {why}" for kind, (m, why) in left_out.items() for name in models.list_models(module=m)}
    for name in models.list_models():
        if name in reasons:
            yield Skip("torchvision", name, reasons[name])
        elif _matches(name, patterns):
            count = _count_parameters(lambda name=name: _torchvision_model(name, {}))
            yield Case("torchvision", name) if count <= LARGEST else Skip("torchvision", name, _too_large(count))


def _timm_cases(patterns: Sequence[str]) -> Iterator[Case | Skip]:
    """The smallest member of each family: of the models of one module whose names begin with the same letters."""
    import timm

    families = defaultdict(list)
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            families[module, re.match("[a-z]+", name).group()].append(name)
    for names in families.values():
        if any(_matches(name, patterns) for name in names):
            yield _smallest(names)


def _smallest(names: Sequence[str]) -> Case | Skip:
    counts = {name: _count_parameters(lambda name=name: _timm_model(name, {})) for name in names}
    name = min(names, key=counts.__getitem__)
    if counts[name] <= LARGEST:
        return Case("timm", name)
    options = {"depth": 2}
    try:
        count = _count_parameters(lambda: _timm_model(name, options))
    except TypeError:  # it has no such argument
        return Skip("timm", name, _too_large(counts[name]))
    return Case("timm", name, tuple(options.items())) if count <= LARGEST else Skip("timm", name, _too_large(count))


def _transformers_cases(_: Sequence[str]) -> Iterator[Case]:
    return (Case("transformers", name) for name in TRANSFORMERS)


def _count_parameters(build: Callable[[], nn.Module]) -> int:
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # it computes its widths with tensors
        model = build()
    return sum(parameter.numel() for parameter in model.parameters())


def _too_large(count: int) -> str:
    return f"too large: {count / 1e6:.0f} M parameters"


# --- building them ----------------------------------------------------------------------------------------------------


def build(case: Case) -> Subject:
    """The model with random weights, in evaluation mode, and its batches."""
    torch.manual_seed(0)
    make = {"torchvision": _torchvision_subject, "timm": _timm_subject, "transformers": _transformers_subject}
    subject = make[case.source](case.name, dict(case.options))
    subject.model.eval()
    randomise(subject)
    return subject


def randomise(subject: Subject) -> None:
    """Gains, biases and statistics somewhat as training leaves them, unlike the ones and zeros that they start as.

    Without it many of these models put out the same for every input, and any graph would match them.
    """
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if parameter.dim() <= 1 and "bias" not in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() <= 1 or not parameter.any():
                parameter.normal_(std=0.02)
    settle_batchnorm(subject.model, subject.batch(8))


def settle_batchnorm(model: nn.Module, batch: Batch) -> None:
    """Take BatchNorm's statistics from one batch."""
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [(module, module.momentum) for module in found if module.track_running_stats]
    for norm, _ in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        run(model, batch)
    for norm, momentum in norms:
        norm.eval()
        norm.momentum = momentum


def _torchvision_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    if name in models.list_models(module=models.segmentation):
        options = {"weights_backbone": None, **options}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}
    return models.get_model(name, weights=None, **options)


def _torchvision_subject(name: str, options: Mapping[str, Any]) -> Subject:
    from torchvision import models

    attempts: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    video = name in models.list_models(module=models.video)
    for size, frames in itertools.product((*SIZES, 224), (8, 16) if video else (0,)):
        fixed: dict[str, Any] = {}
        if name.startswith("vit_"):
            fixed = {"image_size": size}
        elif name.startswith("maxvit_"):
            fixed = {"input_size": (size, size)}
        attempts.append(({**options, **fixed}, (3, frames, size, size) if video else (3, size, size)))
    return _first_that_runs(lambda options: _torchvision_model(name, options), attempts)


def _timm_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _timm_subject(name: str, options: Mapping[str, Any]) -> Subject:
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, *native = config.input_size if config is not None else (3, 224, 224)
    attempts: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    for size in SIZES:
        attempts.append(({**options}, (channels, size, size)))
        attempts.append(({**options, "img_size": size}, (channels, size, size)))
    attempts.append(({**options}, (channels, *native)))
    return _first_that_runs(lambda options: _timm_model(name, options), attempts)


def _first_that_runs(
    make: Callable[[Mapping[str, Any]], nn.Module], attempts: Sequence[tuple[Mapping[str, Any], tuple[int, ...]]]
) -> Subject:
    """The model with the first options and input shape that work, else with the last ones."""
    options, shape = next((attempt for attempt in attempts[:-1] if _runs(make, *attempt)), attempts[-1])
    return Subject(make(options), lambda samples: torch.randn(samples, *shape))


def _runs(make: Callable[[Mapping[str, Any]], nn.Module], options: Mapping[str, Any], shape: Sequence[int]) -> bool:
    def attempt(device: str) -> None:
        with torch.device(device), torch.no_grad():
            make(options).eval()(torch.zeros(2, *shape))

    try:
        try:
            attempt("meta")
        except NotImplementedError:  # it computes its widths with tensors
            attempt("cpu")
    except Exception:  # noqa: BLE001 - architectures refuse sizes and options in every possible way
        return False
    return True


_WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_WIDTHS, "vocab_size": 1000, "max_position_embeddings": 64, "pad_token_id": 0}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {**_WIDTHS, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [32, 64], "depths": [1, 1]}

TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "bart": (
        "BartModel",
        "text",
        {
            "vocab_size": 1000,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    "bert": ("BertForSequenceClassification", "text", _TEXT),
    "bloom": (
        "BloomForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "clip_text": ("CLIPTextModel", "text", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "clip_vision": ("CLIPVisionModel", "image", _VISION),
    "convnext": ("ConvNextForImageClassification", "image", {**_STAGES, "num_stages": 2}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "text",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "deit": ("DeiTForImageClassification", "image", _VISION),
    "dinov2": ("Dinov2ForImageClassification", "image", _VISION),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "text",
        {"vocab_size": 1000, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraForSequenceClassification", "text", {**_TEXT, "embedding_size": 32}),
    "gemma": ("GemmaForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "gpt2": (
        "GPT2LMHeadModel",
        "text",
        {"vocab_size": 1000, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "text", {**_TEXT, "use_cache": False}),
    "llama": ("LlamaForCausalLM", "text", _DECODER),
    "mamba": (
        "MambaForCausalLM",
        "text",
        {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    ),
    "mistral": ("MistralForCausalLM", "text", _DECODER),
    "mixtral": ("MixtralForCausalLM", "text", {**_DECODER, "num_local_experts": 4}),
    "mobilevit": ("MobileViTForImageClassification", "image", {"image_size": 64}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "text",
        {**_DECODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "text",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "use_cache": False},
    ),
    "phi": ("PhiForCausalLM", "text", _DECODER),
    "phi3": ("Phi3ForCausalLM", "text", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "text", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "text", {**_DECODER, "head_dim": 16}),
    "resnet": ("ResNetForImageClassification", "image", {**_STAGES, "embedding_size": 32}),
    "roberta": ("RobertaForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "segformer": (
        "SegformerForImageClassification",
        "image",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "siglip_vision": ("SiglipVisionModel", "image", _VISION),
    "swin": (
        "SwinForImageClassification",
        "image",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5_encoder": (
        "T5EncoderModel",
        "text",
        {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", "image", _VISION),
    "whisper_encoder": (
        "WhisperForAudioClassification",
        "audio",
        {
            "vocab_size": 1000,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 50,
            "num_mel_bins": 80,
        },
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "text",
        {"vocab_size": 1000, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
}
"""Name -> class, what it reads, and how its configuration differs from the class's own."""


def _transformers_subject(name: str, _: Mapping[str, Any]) -> Subject:
    import transformers

    class_name, reads, options = TRANSFORMERS[name]
    model_class = getattr(transformers, class_name)
    batch = {"text": _text_batch, "image": _image_batch, "audio": _audio_batch}[reads]
    return Subject(model_class(model_class.config_class(**options)), batch)


def _text_batch(samples: int, length: int = 16) -> dict[str, Tensor]:
    """Tokens with padding behind all but the first sample."""
    mask = torch.ones(samples, length, dtype=torch.int64)
    mask[1:, -3:] = 0
    return {"input_ids": torch.randint(3, 1000, (samples, length)), "attention_mask": mask}


def _image_batch(samples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, 3, 64, 64)}


def _audio_batch(samples: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(samples, 80, 100)}


# --- examining one ----------------------------------------------------------------------------------------------------


class CheckError(Exception):
    """A model does not do what balf_fx promises."""


class Examination:
    """Collects what is found out about one model."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.problems: list[str] = []

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Note what the block raises as a problem and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the sweep is there to see what models and passes raise
            self.problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")

    def row(self, case: Case, seconds: float) -> Row:
        facts = {"seconds": round(seconds, 1), "problems": tuple(self.problems)}
        return Row(case.source, case.name, dict(case.options), **self.found, **facts)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the paths of this machine."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\S*/site-packages/", "", lines[0])[:300] if lines else ""


def examine(case: Case, compiled: bool = False) -> Row:
    """Build a model and examine it."""
    started = time.perf_counter()
    examination = Examination()
    with examination.check("build"):
        examine_subject(build(case), examination, compiled)
    return examination.row(case, time.perf_counter() - started)


def examine_subject(subject: Subject, examination: Examination, compiled: bool = False) -> None:
    """Capture, compress and compare."""
    model, found, check = subject.model, examination.found, examination.check
    found["params"] = sum(parameter.numel() for parameter in model.parameters())
    calibration = [subject.batch(2) for _ in range(2)]
    found["input"] = " ".join("x".join(map(str, leaf.shape)) for leaf in pytree.tree_leaves(calibration[0]))
    dense = small = None
    with check("original"):
        outputs = run(model, calibration[0])
        require_finite(outputs)
        found["spread"] = _spread(outputs)
        _require(found["spread"] >= 10 * TOLERANCE, "outputs hardly depend on the input")
    before = fingerprint(model)  # after the first call, since some models keep what they compute in buffers
    with check("compile"):
        prepared = balf_fx.prepare(model, calibration[0], factors="sensitivity")
        balf_fx.calibrate(prepared, calibration, progress=False)
        dense = balf_fx.convert(prepared, flops=1.0, progress=False)
        found.update(_coverage(balf_fx.report(dense)))
        small, found["minimum"] = _compress(prepared)
        del prepared
    with check("untouched"):
        _require(fingerprint(model) == before, "the original's parameters, buffers or modes have changed")
    if dense is not None:
        with check("dense"):
            found.update(_deviations(subject, dense))
    if small is not None:
        with check("budget"):
            found["flops_kept"] = _flops_kept(model, small, calibration[0], found["minimum"] or BUDGET)
        with check("small"):
            _check_small(subject, small)
    if small is not None and compiled:
        with check("torch.compile"):
            found["compile_deviation"] = _compiled_deviation(small, calibration[0])


def _coverage(report: Any) -> dict[str, Any]:
    refused = {reason: round(share, 4) for reason, share in report.flops_refused.items() if share}
    return {
        "captured": report.captured,
        "flops_in_sites": round(report.flops_in_sites, 4),
        "flops_refused": dict(sorted(refused.items(), key=lambda item: -item[1])),
    }


def _compress(prepared: Any) -> tuple[nn.Module, float | None]:
    """The compressed model, and the smallest reachable budget where ours is out of reach."""
    try:
        return balf_fx.convert(prepared, flops=BUDGET, progress=False), None
    except BudgetError as error:
        return balf_fx.convert(prepared, flops=BUDGET, strict=False, progress=False), error.minimum


def _flops_kept(model: nn.Module, small: nn.Module, batch: Batch, budget: float) -> float:
    """Counted on both models."""
    before, after = count_flops(model, batch), count_flops(small, batch)
    _require(after <= budget * before, f"{after / before:.2%} of the FLOPs are kept")
    said = balf_fx.report(small)
    _require(
        (before, after) == (said.flops_before, said.flops_after),
        f"the report counts {said.flops_after:,} of {said.flops_before:,} FLOPs, not {after:,} of {before:,}",
    )
    return round(after / before, 4)


def _deviations(subject: Subject, dense: nn.Module) -> dict[str, float]:
    """Between the model and its dense graph, on new data and with another number of samples."""
    batches = [subject.batch(2), subject.batch(3)]
    largest, relative = _largest_deviations(subject.model, dense, batches)
    found = {"deviation": largest, "relative_deviation": relative}
    if relative > TOLERANCE:
        model = copy.deepcopy(subject.model).double()
        batches = [pytree.tree_map_only(Tensor, _in_double, batch) for batch in batches]
        _, found["exact_deviation"] = _largest_deviations(model, balf_fx.prepare(model, batches[0]), batches)
        _require(
            found["exact_deviation"] <= EXACT_TOLERANCE,
            f"outputs at budget 1 deviate by {relative:.2g}, and in float64 by {found['exact_deviation']:.2g}",
        )
    return found


def _largest_deviations(model: nn.Module, other: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    pairs = [deviation(run(model, batch), run(other, batch)) for batch in batches]
    largest, relative = (max(values) for values in zip(*pairs, strict=True))
    return largest, relative


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_small(subject: Subject, small: nn.Module) -> None:
    for samples in (2, 3):
        batch = subject.batch(samples)
        got = run(small, batch)
        require_finite(got)
        wanted = [leaf.shape for leaf in run(subject.model, batch)]
        _require([leaf.shape for leaf in got] == wanted, f"shapes {[leaf.shape for leaf in got]} for {wanted}")


def _compiled_deviation(small: nn.Module, batch: Batch) -> float:
    torch._dynamo.reset()
    _, relative = deviation(run(small, batch), run(torch.compile(small), batch))
    _require(relative <= TOLERANCE, f"torch.compile's outputs deviate by {relative:.2g}")
    return relative


def run(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors that a call returns."""
    with torch.no_grad():
        output = call(model, batch)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def call(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def count_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of one call, as torch counts them.

    With gradients, since without them torch runs attention fused, which the counter does not know, and the counter
    fails on modules that are called with parameters.
    """
    with torch.enable_grad(), flop_counter() as counter:
        call(model, batch)
    return counter.get_total_flops()


def deviation(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the largest relative to the largest wanted value of the same tensor."""
    absolute = relative = 0.0
    for want, have in zip(wanted, got, strict=True):
        _require(want.shape == have.shape, f"an output of shape {tuple(have.shape)} for {tuple(want.shape)}")
        difference = float((want.double() - have.double()).abs().max())
        absolute = max(absolute, difference)
        relative = max(relative, difference / max(float(want.abs().max()), torch.finfo(torch.float32).tiny))
    return absolute, relative


def _spread(outputs: Sequence[Tensor]) -> float:
    """How far outputs differ between samples, relative to the largest."""
    floats = [leaf.double() for leaf in outputs if leaf.is_floating_point() and leaf.dim() and len(leaf) > 1]
    return max((deviation([leaf[:-1]], [leaf[1:]])[1] for leaf in floats), default=0.0)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Checksums of all parameters and buffers, and which modules are in training mode."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    sums = {name: zlib.crc32(tensor.detach().contiguous().numpy()) for name, tensor in tensors}
    return {**sums, "training": [name for name, module in model.named_modules() if module.training]}


def require_finite(outputs: Iterable[Tensor]) -> None:
    """Raise where there is nothing, NaN or infinity in the outputs."""
    leaves = list(outputs)
    _require(bool(leaves), "no tensors come out")
    _require(all(bool(torch.isfinite(leaf).all()) for leaf in leaves), "outputs are not finite")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


# --- the sweep --------------------------------------------------------------------------------------------------------


class Worker:
    """A process that examines models one after the other, and is replaced when it crashes or takes too long."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self._process: Any = None
        self._connection: Any = None

    def examine(self, case: Case, compiled: bool) -> Row:
        """As the function, within the time limit."""
        if self._process is None:
            self._start()
        started = time.perf_counter()
        try:
            self._connection.send((case, compiled))
            if self._connection.poll(self.time_limit):
                return self._connection.recv()
            problem = f"process: TimeoutError: took more than {self.time_limit:g} s"
        except (EOFError, OSError):
            self._process.join()
            problem = f"process: crash: exit code {self._process.exitcode}"
        self.stop()
        seconds = round(time.perf_counter() - started, 1)
        return Row(case.source, case.name, dict(case.options), seconds=seconds, problems=(problem,))

    def stop(self) -> None:
        """End the process, which leaves by itself where it has nothing to do."""
        if self._process is not None:
            self._connection.close()
            self._process.join(timeout=1)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end,), daemon=True)
        self._process.start()
        other_end.close()


def _serve(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(examine(*task))


class Results:
    """Rows and skips, those of an earlier run included, kept in a JSON file where there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.rows: list[Row] = []
        self.skips: list[Skip] = []

    def known(self, entry: Case | Skip) -> bool:
        """Whether an earlier run got to this model."""
        old = (*self._old.get("results", []), *self._old.get("skipped", []))
        return any((entry.source, entry.name) == (one["source"], one["name"]) for one in old)

    def add(self, entry: Row | Skip) -> None:
        """Take the place of what was known of this model."""
        (self.rows if isinstance(entry, Row) else self.skips).append(entry)
        if self.path is not None:
            versions = {name: importlib.metadata.version(name) for name in {row.source for row in self.rows}}
            write_json(
                self.path,
                {
                    "versions": {**self._old.get("versions", {}), **dict(sorted(versions.items()))},
                    "budget": BUDGET,
                    "results": self._merged("results", self.rows),
                    "skipped": self._merged("skipped", self.skips),
                },
            )

    def _merged(self, key: str, entries: Iterable[Row | Skip]) -> list[dict[str, Any]]:
        new = [asdict(entry) for entry in entries]
        replaced = {(entry.source, entry.name) for entry in (*self.rows, *self.skips)}
        kept = [entry for entry in self._old.get(key, []) if (entry["source"], entry["name"]) not in replaced]
        return sorted([*kept, *new], key=lambda entry: (entry["source"], entry["name"]))


def table(rows: Sequence[Row]) -> str:
    """One line for each model."""
    lines = [
        (
            row.name,
            row.captured,
            row.flops_in_sites,
            row.flops_kept,
            row.minimum,
            None if row.relative_deviation is None else f"{row.relative_deviation:.1e}",
            row.seconds,
            "; ".join(row.problems)[:100] or "ok",
        )
        for row in rows
    ]
    headers = ("model", "captured", "in sites", f"kept at {BUDGET:g}", "minimum", "deviation", "seconds", "problems")
    return tabulate(lines, headers, floatfmt=("", "", ".3f", ".4f", ".4f", "", ".0f", ""))


def summary(rows: Sequence[Row], skips: Sequence[Skip]) -> str:
    """Counts by source, and why models were left out."""
    sources = dict.fromkeys(entry.source for entry in (*rows, *skips))
    lines = []
    for source in sources:
        mine = [row for row in rows if row.source == source]
        failed = sum(bool(row.problems) for row in mine)
        lines.append((source, len(mine) - failed, failed, sum(skip.source == source for skip in skips)))
    reasons = Counter((skip.source, skip.reason.partition(":")[0]) for skip in skips)
    skipped = [f"{source}: {count} left out: {reason}" for (source, reason), count in reasons.items()]
    return "\n".join([tabulate(lines, ("source", "ok", "failed", "left out")), *skipped])


@click.command()
@click.option(
    "--source", "sources", multiple=True, type=click.Choice(get_args(Source)), help="Repeatable; default: all."
)
@click.option("--only", "patterns", multiple=True, help="Glob of model names; repeatable.")
@click.option("--limit", type=int, help="At most this many models of each source.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile a sample of the compressed models.")
@click.option("--time-limit", default=240.0, show_default=True, help="Seconds for each model.")
@click.option("--resume", is_flag=True, help="Leave out what the results file already holds.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Merge the results into this file.")
def main(
    sources: Sequence[Source],
    patterns: Sequence[str],
    limit: int | None,
    compiled: bool,
    time_limit: float,
    resume: bool,
    output: Path | None,
) -> None:
    """Capture, compress and check the architectures of torchvision, timm and transformers."""
    results, worker = Results(output), Worker(time_limit)
    try:
        for source in sources or get_args(Source):
            wanted = (case for case in cases(source, patterns) if not (resume and results.known(case)))
            found = itertools.islice(wanted, limit)
            for case in (bar := tqdm(found, desc=source, unit="model", leave=False)):
                bar.set_postfix_str(case.name)
                known = isinstance(case, Skip)
                results.add(case if known else worker.examine(case, compiled and case.name in COMPILED))
    finally:
        worker.stop()
    click.echo(table(results.rows) + "\n\n" + summary(results.rows, results.skips))


if __name__ == "__main__":
    main()
