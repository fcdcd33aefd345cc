"""Make a trained PyTorch model smaller and faster without fine-tuning, as a torch.fx compiler pass."""

from balf_fx.api import calibrate, compile, convert, prepare
from balf_fx.errors import BalfError
from balf_fx.files.storage import load, save
from balf_fx.presets import AIR, BALF
from balf_fx.reporting.report import report
from balf_fx.version import __version__ as __version__

__all__ = [
    "AIR",
    "BALF",
    "BalfError",
    "calibrate",
    "compile",
    "convert",
    "load",
    "prepare",
    "report",
    "save",
]
