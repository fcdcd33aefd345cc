"""How Dynamo finds the backend, and what the backend reads out of Dynamo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from balf_fx.dynamo.frames import weight_name


def test_dynamo_finds_the_installed_backend_and_its_log(tmp_path):
    root = Path(__file__).parents[2]
    group, name = "torch_dynamo_backends", 'balf = "balf_fx.backend:balf"'
    assert f"[project.entry-points.{group}]\n{name}\n" in (root / "pyproject.toml").read_text()
    installed = tmp_path / "balf_fx-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: balf-fx\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name.replace(chr(34), '')}\n")
    code = """
        import torch
        model = torch.nn.Linear(32, 32)
        options = {"flops": 0.5, "calibration_steps": 1, "inner": "eager"}
        small = torch.compile(model, backend="balf", options=options)
        with torch.no_grad():
            print(*(torch.equal(small(x), model(x)) for x in torch.randn(2, 4, 32)))
        """
    path = os.pathsep.join([str(tmp_path), str(root)])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_LOGS": "balf_fx.backend"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "True False\n", result.stderr
    assert "call 2 is the first compressed one" in result.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['head']._parameters['weight']", "head.weight"),
        ("L['self']._modules['layers']._modules['0']._buffers['mean']", "layers.0.mean"),
        ("L['self'].layers[0].weight", "layers.0.weight"),
        ("G['model']._modules['head']._parameters['bias']", "model.head.bias"),
        ("L['fn'].__closure__[0].cell_contents._modules['a']._parameters['weight']", "a.weight"),
        ("L['self']._modules['graph']._parameters['weight']", "graph_.weight"),
        ("L['w']", "w"),
    ],
)
def test_weight_names(source, name):
    assert weight_name(source) == name
