"""Make a trained PyTorch model smaller and faster without fine-tuning, as a torch.fx compiler pass."""

from balf_fx.api import calibrate, compile, convert, load, plan, prepare, report, save
from balf_fx.errors import BalfError
from balf_fx.graph.plan import Plan
from balf_fx.huggingface.registry import watch as _watch
from balf_fx.presets import AIR, BALF
from balf_fx.version import __version__ as __version__

__all__ = [
    "AIR",
    "BALF",
    "BalfError",
    "Plan",
    "calibrate",
    "compile",
    "convert",
    "load",
    "plan",
    "prepare",
    "report",
    "save",
]

_watch()
