"""What `import balf_fx` costs on top of `import torch`: processes that run one or the other, in turn."""

from __future__ import annotations

import subprocess
import sys

from common import ROOT
from timing import Measure, Task

ROUNDS = 9


def _process(code: str) -> Task:
    return lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_import(measure: Measure) -> None:
    """Both imports against torch's alone."""
    measure("import", _process("import torch, balf_fx"), ROUNDS, {"import torch": _process("import torch")})
