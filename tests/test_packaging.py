import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def copied_sources(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    tracked = ("pyproject.toml", "README.md", "LICENSE", "balf_fx", "passes")
    subprocess.run(["cp", "-a", *tracked, source], cwd=ROOT, check=True)
    return source


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = copied_sources(tmp_path)
    built = python(
        "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), ".", cwd=source
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    own = (path for path in (ROOT / "balf_fx").rglob("*.py") if path.parent.name != "passes")  # a link, see below
    expected = {path.relative_to(ROOT).as_posix() for path in own}
    expected |= {f"balf_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert expected | {"balf_fx/py.typed"} == {name for name in names if ".dist-info/" not in name}
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    imported = python("-c", "import balf_fx.passes as p; print(p.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert imported.stdout.strip() == str(installed / "balf_fx" / "passes" / "__init__.py"), imported.stderr


@pytest.mark.slow
def test_an_editable_install_imports_the_sources(tmp_path):
    source, target = copied_sources(tmp_path), tmp_path / "site"
    options = ("--no-deps", "--no-build-isolation", "-q", "--target", str(target), "-e", ".")
    installed = python("-m", "pip", "install", *options, cwd=source)
    assert installed.returncode == 0, installed.stderr
    code = f"""
import site, sys
path, finders = list(sys.path), list(sys.meta_path)
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]  # of an editable install that is there already, by the same name
sys.path.insert(0, {str(target)!r})
site.addsitedir({str(target)!r})
sys.path.sort(key=path.__contains__)  # what is new goes first, before a copy that is installed already
sys.meta_path.sort(key=finders.__contains__)
import balf_fx.passes
print(balf_fx.passes.__file__)
"""
    found = python("-c", code, cwd=tmp_path, PYTHONPATH="").stdout.strip()
    assert Path(found).resolve() == (source / "passes" / "__init__.py").resolve()


def test_the_passes_are_importable_from_the_repository_root():
    assert python("-c", "import balf_fx.passes").returncode == 0


def test_the_passes_refuse_a_second_identity():
    result = python("-c", "import passes")
    assert "the passes are imported as balf_fx.passes" in result.stderr


def test_importing_the_library_imports_nothing_heavy():
    drawing, data = (
        {"matplotlib", "jinja2", "PIL", "click"},
        {"torchvision", "timm", "transformers", "sklearn", "scipy"},
    )
    heavy = drawing | data | {"torchao", "peft", "onnx", "onnxruntime", "onnxscript", "triton"}
    code = "import sys, torch, torch.fx; before = set(sys.modules); import balf_fx; print(*set(sys.modules) - before)"
    found = python("-c", code).stdout.split()
    assert "balf_fx" in found
    assert heavy.isdisjoint(found)


def test_the_front_door_exports_at_most_a_dozen_names():
    import balf_fx

    assert len(balf_fx.__all__) <= 12
    assert all(hasattr(balf_fx, name) for name in balf_fx.__all__)
