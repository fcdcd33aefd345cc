"""One of several processes: runs all checks that need them, and stores what it finds.

python worker.py RANK SIZE FOLDER
"""

import datetime
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver
from balf_fx.checkpoint.folder import Folder
from balf_fx.distributed.group import group_of
from balf_fx.engine import blockwise, compress
from balf_fx.errors import BalfError, CheckpointError

CLASSES = 4
SECONDS = 30


class Net(nn.Module):
    """A convolution, a hidden layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 24)
        self.middle = nn.Linear(24, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.head(F.relu(self.middle(F.relu(self.hidden(x)))))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def make_batches(count=5, samples=8):
    return list(torch.randn(count, samples, 3, 6, 6, generator=torch.Generator().manual_seed(1)))


def loss(output, batch):
    return output.square().sum(-1).mean() + 0.0 * batch.sum()


EFFORTS = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced", "loss": loss},
    "best": {"effort": "best", "loss": loss},
    "up": {"effort": "balanced", "refit": "up", "loss": loss},
    "air": {"factors": "air", "loss": loss},
    "few": {"effort": "best", "loss": loss},
    "small": {"effort": "best", "loss": loss},
    "temperature": {"effort": "fast", "refit": "up", "temperature": True, "flops": 0.3},
    "blocks": {"effort": "fast", "memory": 20_000},
    "blocks with gradients": {"effort": "balanced", "refit": "up", "loss": loss, "memory": 20_000},
}
"""Options whose result does not depend on random probes."""
IN_FOUR = ("fast", "few", "temperature")
"""Those that four processes run."""
RESUMED = ("best", "up", "air", "blocks with gradients")
"""Those that are interrupted."""
FEW = 1
"""Batches of "few": all processes but the first have none."""


def batches_for(name):
    if name == "small":  # a quarter of the samples is no whole number
        return make_batches(5, 7)
    if name == "temperature":
        return make_batches(5, 40)
    return make_batches(FEW if name == "few" else 5)


def model_for(name):
    if name != "temperature":
        return make_net()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    with torch.no_grad():
        for index in (1, 3, 5):
            net[index].weight *= 3
    return net.eval()


def compiled(batches, model=None, **options):
    return balf_fx.compile(model or make_net(), batches, **{"flops": 0.7, "progress": False, **options})


def described(small):
    """What is compared of a compressed model."""
    with torch.no_grad():
        output = small(make_batches(1)[0])
    plan = balf_fx.plan(small)
    return {"ranks": plan.ranks, "factor": plan.logit_factor, "output": output, "tensors": dict(small.state_dict())}


def error_of(function):
    try:
        function()
    except (BalfError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)
    return None


def exchanges(rank, size):
    group = group_of(torch.device("cpu"))
    view = torch.arange(1000.0)[rank : rank + 2]
    shared = group.shared_out(list(range(5)), [1.0, 5.0, 1.0, 1.0, 1.0], lambda item: (item, rank))

    def failing():
        if rank == size - 1:
            raise balf_fx.errors.CalibrationError("no")
        return rank

    return {
        "gathered": group.gathered({"rank": rank, "view": view}),
        "once": group.once(lambda: rank),
        "merged": group.merged([rank], list.__add__),
        "shared": shared,
        "together": error_of(lambda: group.together(failing)),
        "alone": group_of(torch.device("cpu"), enabled=False).size,
    }


def statistics(batches, model=None, **options):
    """The statistics of two calibrations, one after the other."""
    prepared = balf_fx.prepare(model or make_net().double(), make_batches()[0].double(), factors="sensitivity")
    for part in batches:
        balf_fx.calibrate(prepared, [batch.double() for batch in part], loss=loss, progress=False, **options)
    found = {}
    for name, module in prepared.named_modules():
        if isinstance(module, CovarianceObserver):
            found[name] = (module.moments.count, module.moments.mean, module.moments.scatter)
        if isinstance(module, SensitivityObserver):
            gradients = module.sample.gradients
            found[name] = (gradients.samples, gradients.scatter, module.positions)
    small = balf_fx.convert(prepared, flops=0.7, effort="balanced", progress=False, **options)
    return {"statistics": found, "ranks": balf_fx.plan(small).ranks}


def bad_batch(rank, own):
    bad = torch.full((8, 3, 6, 6), torch.nan)
    return error_of(lambda: compiled([*own, bad] if rank == 1 else own, effort="fast"))


def bad_function(rank, own):
    def forward(model, batch):
        return model(batch / (1 // (rank + 1)) if rank == 1 else batch)

    def loss_of(output, batch):
        return output.sum() * (1 // (1 - rank))

    return error_of(lambda: compiled(own, effort="balanced", loss=loss_of))


def bad_conversion(rank, own):
    """One process has batches of another kind when it converts, which it finds before it meets the others."""
    prepared = balf_fx.prepare(make_net(), own[0])
    balf_fx.calibrate(prepared, own, progress=False)
    return error_of(lambda: balf_fx.convert(prepared, batches=3 if rank else own, flops=0.7, progress=False))


def certified(validation):
    small = compiled(make_batches(2), effort="fast", flops=None, disagreement=0.05, validation=validation)
    return balf_fx.plan(small).certificate


def wrapped(rank, own):
    ddp = nn.parallel.DistributedDataParallel(make_net())
    before = {name: value.clone() for name, value in ddp.state_dict().items()}
    found = described(compiled(own, ddp, effort="fast"))
    assert all(value.equal(ddp.state_dict()[name]) for name, value in before.items())
    sharded = make_net()
    for layer in (sharded.hidden, sharded.middle, sharded):
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    shards = described(compiled(own, sharded, effort="fast"))
    kinds = {type(parameter).__name__ for parameter in sharded.parameters()}
    return {"ddp": found, "fsdp": shards, "kinds": kinds}


def interrupted(rank, own, folder, options):
    """The error of a run that fails in process 0 once it has written a layer."""
    put = Folder.put

    def failing(self, stage, *args):
        put(self, stage, *args)
        if rank == 0 and "layer " in stage:
            raise CheckpointError("it fails")

    with mock.patch.object(Folder, "put", failing):
        return error_of(lambda: compiled(own, checkpoint=folder, **options))


def resumed(rank, own, folder, options):
    """What follows an interrupted run: the same call, the same once more, and other calls."""
    failed = interrupted(rank, own, folder, options)
    again = AssertionError("a batch is run again")
    with mock.patch.object(compress, "_run", side_effect=again), mock.patch.object(blockwise, "walk_backward", again):
        models = [described(compiled(own, checkpoint=folder, **options)) for _ in range(2)]
    large = [path for path in folder.rglob("*.safetensors") if load_file(path)]
    return {
        "failed": failed,
        "models": models,
        "files": [path.relative_to(folder).as_posix() for path in large],
        "other batches": error_of(lambda: compiled(own[::-1] if rank else own, checkpoint=folder, **options)),
        "another number": error_of(lambda: compiled(own, checkpoint=folder, distributed=False, **options)),
    }


def dead(own):
    """The last process ends while the others wait for it."""
    start = time.monotonic()
    return error_of(lambda: compiled(own, effort="fast")), time.monotonic() - start


def main(rank, size, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=limit)
    batches = make_batches()
    own = batches[rank::size]
    found = {"exchanges": exchanges(rank, size)}
    for name in EFFORTS if size == 2 else IN_FOUR:
        found[name] = described(compiled(batches_for(name)[rank::size], model_for(name), **EFFORTS[name]))
    found["bad batch"] = bad_batch(rank, own)
    if size == 2:
        found["probe"] = described(compiled(own, effort="balanced"))
        found["alone"] = described(compiled(batches, effort="fast", distributed=False))
        found["statistics"] = statistics([batches[rank:2:size], batches[2 + rank :: size]])
        found["bad conversion"] = bad_conversion(rank, own)
        found["bad function"] = bad_function(rank, own)
        found["options"] = error_of(lambda: compiled(own, effort="fast" if rank else "best"))
        found["checkpoint"] = {name: resumed(rank, own, folder / name, EFFORTS[name]) for name in RESUMED}
        found["models"] = error_of(lambda: compiled(own, make_net(rank), effort="fast"))
        found["nothing"] = error_of(lambda: compiled([], effort="fast"))
        found["certificate"] = certified(make_batches(8)[rank::size])
        found["latency"] = described(
            compiled(own, flops=None, latency=0.9, runner="eager", effort="fast", strict=False)
        )
        found["auto"] = described(compiled(own, effort="fast", multiple_of="auto"))
        found["wrapped"] = wrapped(rank, own)
        if rank < size - 1:
            found["dead"] = dead(own)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
