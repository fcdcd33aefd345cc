"""Make a trained PyTorch model smaller and faster without fine-tuning, as a torch.fx compiler pass."""

from balf_fx import passes
from balf_fx.api import calibrate, compile, convert, prepare
from balf_fx.errors import BalfError
from balf_fx.files import load, read_plan, save
from balf_fx.plan import Plan, plan
from balf_fx.presets import AIR, BALF
from balf_fx.report import report
from balf_fx.version import __version__

__all__ = [
    "AIR",
    "BALF",
    "BalfError",
    "Plan",
    "__version__",
    "calibrate",
    "compile",
    "convert",
    "load",
    "passes",
    "plan",
    "prepare",
    "read_plan",
    "report",
    "save",
]
