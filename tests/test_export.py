"""A compressed model goes where any model goes: torch.export, AOTInductor, ONNX and other devices."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import TINY_TEXT, ConvNet, randomise_batchnorm
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import balf_fx
from balf_fx.graph.annotation import VALUE_META

TOKENS, WORDS = 8, TINY_TEXT["vocab_size"]


@dataclass(frozen=True)
class Subject:
    """A compressed model and how to call it."""

    module: fx.GraphModule
    batch: Tensor
    keyword: str | None = None

    def call(self, module: Any, samples: int) -> Any:
        batch = self.batch[:samples]
        with torch.no_grad():
            return module(batch) if self.keyword is None else module(**{self.keyword: batch})

    def exported(self, strict: bool = False) -> torch.export.ExportedProgram:
        """With a batch dimension that must stay dynamic."""
        args, kwargs = self.arguments
        with torch.no_grad():
            return torch.export.export(self.module, args, kwargs, dynamic_shapes=self.dynamic_shapes, strict=strict)

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return ((self.batch,), {}) if self.keyword is None else ((), {self.keyword: self.batch})

    @property
    def dynamic_shapes(self) -> Any:
        sizes = {0: torch.export.Dim.DYNAMIC}
        return (sizes,) if self.keyword is None else {self.keyword: sizes}

    def assert_same(self, module: Any, tolerance: float = 0.0) -> None:
        """At the size of the example and at another, outputs are what the compressed model returns."""
        for samples in (len(self.batch), 3):
            want, got = self.call(self.module, samples), self.call(module, samples)
            assert type(got) is type(want)
            torch.testing.assert_close(_tensors(got), _tensors(want), rtol=0, atol=tolerance)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _conv_net() -> tuple[nn.Module, Tensor]:
    return randomise_batchnorm(ConvNet()), torch.randn(32, 3, 12, 12)


def _vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10, dynamic_img_size=False
    )
    return model, torch.randn(32, 3, 16, 16)


def _llama() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**TINY_TEXT, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config), torch.randint(WORDS, (32, TOKENS))


def _gpt2() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=TOKENS,
        n_embd=32,
        n_layer=1,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), torch.randint(WORDS, (32, TOKENS))


MODELS = {"conv net": _conv_net, "vit": _vit, "llama": _llama, "gpt2": _gpt2}
LANGUAGE = ("llama", "gpt2")  # transformers' models cannot be traced symbolically
CASES = [
    (name, effort, capture)
    for name in MODELS
    for effort in ("fast", "best")
    for capture in ("symbolic_trace", "export")
    if name not in LANGUAGE or capture == "export"
]
EVERY_KIND = [
    ("conv net", "fast", "export"),
    ("conv net", "best", "symbolic_trace"),
    ("vit", "fast", "symbolic_trace"),
    ("vit", "best", "export"),
    ("llama", "fast", "export"),
    ("llama", "best", "export"),
]


def _compress(name: str, effort: str, capture: str) -> Subject:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # answers of order one, whatever the model's own initialisation
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    keyword = "input_ids" if name in LANGUAGE else None
    batches = [batch if keyword is None else {keyword: batch}]
    module = balf_fx.compile(model.eval(), batches, flops=0.5, effort=effort, capture=capture, progress=False)
    return Subject(module, batch[:6], keyword)


@pytest.fixture(scope="module")
def compressed():
    return functools.cache(_compress)


def test_the_models_hold_what_compression_makes(compressed):
    """Factors and narrower layers, and answers of order one: else there would be nothing to see here."""
    for name, effort, capture in CASES:
        subject = compressed(name, effort, capture)
        report = balf_fx.report(subject.module)
        assert report.captured == capture
        assert report.factor_layers if effort == "fast" else report.widths
        assert 0.1 < float(_tensors(subject.call(subject.module, 6))[0].std()) < 10


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.filterwarnings("error:No complete tensor")
def test_torch_export_saves_and_loads(compressed, case):
    subject = compressed(*case)
    file = io.BytesIO()
    torch.export.save(subject.exported(), file)
    file.seek(0)
    subject.assert_same(torch.export.load(file).module())


@pytest.mark.parametrize("case", [EVERY_KIND[1], EVERY_KIND[3]], ids=" ".join)
def test_torch_export_through_dynamo(compressed, case):
    subject = compressed(*case)
    subject.assert_same(subject.exported(strict=True).module())


def test_parts_with_ranks_of_their_own():
    torch.manual_seed(0)
    model, batch = _vit()
    ranks = {"blocks.0.attn.qkv": (7, None, 11)}
    module = balf_fx.compile(model.eval(), batch, allocation=ranks, effort="fast", progress=False)
    subject = Subject(module, batch[:6])
    assert balf_fx.report(module).factor_layers == tuple(f"blocks.0.attn.qkv.{i}" for i in ("0", "1.0", "1.2"))
    subject.assert_same(subject.exported().module())


@pytest.mark.parametrize("case", EVERY_KIND, ids=" ".join)
@pytest.mark.filterwarnings("ignore")
def test_onnx(compressed, case, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    subject = compressed(*case)
    args, kwargs = subject.arguments
    program = torch.onnx.export(
        subject.module, args, kwargs=kwargs, dynamo=True, dynamic_shapes=subject.dynamic_shapes, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for samples in (6, 3):
        (want,) = _tensors(subject.call(subject.module, samples))
        (got,) = session.run(None, {session.get_inputs()[0].name: subject.batch[:samples].cpu().numpy()})
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor builds with g++, which is not installed")
def test_aot_inductor(compressed, tmp_path):
    subject = compressed(*EVERY_KIND[1])
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            subject.exported(),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    subject.assert_same(torch._inductor.aoti_load_package(package), tolerance=1e-4)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_other_devices(compressed, case):
    """The meta device stands for all of them: an operation that mixes devices fails there as well."""
    subject = compressed(*case)
    moved = copy.deepcopy(subject.module).to("meta")
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), subject.arguments)
    assert {tensor.device.type for tensor in _tensors(moved(*args, **kwargs))} == {"meta"}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_pickles_and_what_is_traced_anew(compressed, case):
    subject = compressed(*case)
    copied = pickle.loads(pickle.dumps(subject.module))
    subject.assert_same(copied)
    subject.assert_same(fx.symbolic_trace(copied))


@pytest.mark.parametrize("case", [EVERY_KIND[3], EVERY_KIND[5]], ids=" ".join)
def test_dynamo_takes_the_result_as_one_graph(compressed, case):
    subject = compressed(*case)
    subject.assert_same(torch.compile(subject.module, backend="eager", fullgraph=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_nodes_carry_no_values_of_the_model_before(compressed, case):
    nodes = compressed(*case).module.graph.nodes
    assert not [node for node in nodes if set(node.meta) & {"balf", *VALUE_META}]
