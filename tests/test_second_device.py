"""The whole compiler with models on another device than the CPU: it mixes no devices, and finds the same model."""

import copy
from contextlib import nullcontext

import pytest
import torch
from architectures import ATTENTIONS, EVERYTHING, make
from expert_models import Loop, Mixture
from second_device import DEVICE, MixedDevicesError, Real, second_device
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import balf_fx

pytestmark = pytest.mark.cpu


class Tagger(nn.Module):
    """An embedding that is tied to the last layer, and a mask."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(40, 24), nn.LayerNorm(24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, attention_mask):
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x * attention_mask.unsqueeze(-1))


class Images(nn.Module):
    """Convolutions of several kinds: strided, depthwise, grouped, 1 x 1 with BatchNorm, and transposed."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.norm = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.grouped, self.whole = nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.Conv2d(32, 32, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.point(F.relu6(self.depthwise(self.stem(x))))))
        return self.head(F.relu(self.up(x + F.relu(self.whole(self.grouped(x))))))


def subject(name):
    """A model and batches on the CPU."""
    if name in EVERYTHING:
        model, batches = make(name, count=3)
        return model, list(batches)
    draws = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "tagger":
        lengths = torch.tensor([[4], [9], [6], [7]])
        mask = (torch.arange(9) < lengths).long()
        ids = [torch.randint(0, 40, (4, 9), generator=draws) for _ in range(3)]
        return Tagger().eval(), [{"ids": each, "attention_mask": mask} for each in ids]
    shape = (4, 3, 12, 12) if name == "images" else (6, 5, 16)
    build = {"images": Images, "experts in rows": Mixture, "experts in groups": lambda: Mixture(grouped=True)}
    model = build.get(name, lambda: Loop(False))()
    return model.eval(), [torch.randn(shape, generator=draws) for _ in range(3)]


@pytest.fixture
def other(request):
    """Another device than the CPU: that of the option, or a pretended one."""
    device = request.config.getoption("--device")
    return second_device if device is None else lambda: nullcontext(Real(device))


def moved(value, device):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


OPTIONS = {
    "fast": {"effort": "fast", "flops": 0.6},
    "balanced": {"effort": "balanced", "flops": 0.6},
    "best": {"flops": 0.6},
    "air": {**balf_fx.AIR, "flops": 0.6},
    "free": {},
    "module": {"effort": "balanced", "params": 0.6, "result": "module"},
    "separable": {"effort": "balanced", "flops": 0.6, "separable": True},
    "on the shelf": {"effort": "balanced", "flops": 0.6, "memory": 20_000},
}
EXPERTS = ("experts in rows", "experts in groups") if torch.__version__ >= (2, 12) else ()
"""Up to torch 2.11, autograd itself mixes devices in the backward pass of `topk`."""
CASES = [
    *((name, "fast") for name in EVERYTHING),
    *((name, "balanced") for name in ATTENTIONS),
    *(("images", effort) for effort in ("fast", "best", "module", "free")),
    *(("tagger", effort) for effort in ("best", "free")),
    ("transformer", "module"),
    *((name, effort) for name in EXPERTS for effort in ("balanced", "module")),
    ("loop", "module"),
    *(("images", effort) for effort in ("air", "separable", "on the shelf")),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_model_on_another_device_becomes_the_same_model(name, options, other, tmp_path):
    model, batches = subject(name)
    given = {**OPTIONS[options], "capture": "symbolic_trace", "strict": False, "progress": False}
    wanted = balf_fx.compile(model, batches, **given)
    with other() as marks:
        elsewhere = copy.deepcopy(model).to(marks.device)
        found = balf_fx.compile(elsewhere, batches, **given)  # batches follow the model
        assert all(map(marks.has, found.state_dict().values()))
        assert all(map(marks.has, elsewhere.state_dict().values()))
        output = run(found, moved(batches[0], marks.device))
        assert marks.has(output)
        balf_fx.save(found, tmp_path / "model.balf")
        loaded = balf_fx.load(tmp_path / "model.balf", elsewhere)
        assert all(map(marks.has, loaded.state_dict().values()))
        assert torch.equal(run(loaded, moved(batches[0], marks.device)), output)
        states = found.state_dict()
    if marks.rounds:  # where candidates are as good as each other, another one may be chosen
        dense, own = run(model, batches[0]), run(wanted, batches[0])
        assert float((output.cpu() - dense).norm()) <= 1.2 * float((own - dense).norm()) + 1e-3 * float(dense.norm())
        return
    assert states.keys() == wanted.state_dict().keys()
    for key, value in wanted.state_dict().items():
        assert torch.equal(states[key], value), key
    assert torch.equal(output, run(wanted, batches[0]))


@pytest.mark.parametrize(
    ("name", "options"), [("images", "best"), ("tagger", "best"), ("fused", "best"), ("loop", "module")]
)
def test_it_may_be_the_default_device(name, options, other, tmp_path):
    model, batches = subject(name)
    given = {**OPTIONS[options], "capture": "symbolic_trace", "strict": False, "progress": False}
    with other() as marks, torch.device(marks.device):
        elsewhere = copy.deepcopy(model).to(marks.device)
        found = balf_fx.compile(elsewhere, batches, **given)
        output = run(found, moved(batches[0], marks.device))
        balf_fx.save(found, tmp_path / "model.balf")
        again = run(balf_fx.load(tmp_path / "model.balf", elsewhere), moved(batches[0], marks.device))
        assert torch.equal(again, output)
        assert all(map(marks.has, found.state_dict().values()))


def test_steps_by_hand_mix_no_devices(other):
    model, batches = subject(next(iter(ATTENTIONS)))
    with other() as marks:
        prepared = balf_fx.prepare(model.to(marks.device), batches[0], factors="sensitivity", capture="symbolic_trace")
        balf_fx.calibrate(prepared, batches, progress=False)
        small = balf_fx.convert(prepared, flops=0.6, progress=False)
        assert all(map(marks.has, small.state_dict().values()))


def test_devices_are_not_mixed():
    cpu = torch.ones(3)
    with second_device() as marks:
        second = torch.arange(3.0, device=DEVICE)
        assert second.device == DEVICE
        assert cpu.device.type == "cpu"
        for mixed in (
            lambda: second + cpu,
            lambda: cpu + second.sum(),
            lambda: second.index_put((torch.tensor([0, 1]),), cpu[:2]),
            lambda: cpu[second.long()],
            lambda: cpu.sum().add_(second.sum()),
            lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
            lambda: second + torch.eye(3),
            second.numpy,
        ):
            with pytest.raises(MixedDevicesError):
                mixed()
        assert marks.has(second[torch.tensor([0, 2])] * torch.tensor(2.0))
        assert marks.has(torch.zeros_like(second).view(3, 1))
        assert marks.has(copy.deepcopy(nn.Linear(3, 2).to(DEVICE)).weight)
        assert not marks.has(second.cpu())
        assert not marks.has(second.to("cpu", torch.float64))
        assert second.cpu().numpy().tolist() == [0.0, 1.0, 2.0]
        assert marks.has(cpu.to(second))
        copied = cpu.clone().copy_(second)
        assert not marks.has(copied)
