"""What a wheel holds: the product, its native sources, the example package, and no laboratory.

It is unpacked into an empty folder, and its commands run there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ds_gradprune.cli import COMMANDS


@pytest.mark.slow
def test_wheel_holds_what_a_user_imports_and_nothing_else(tmp_path: Path, repo_root: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ds_gradprune", "textgen", "launch", "labs", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo_root / name, source / name, ignore=ignore, symlinks=True)
    shutil.copytree(repo_root / "ds_configs", source / "ds_configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "ds_gradprune",
        "textgen",
        "ds_gradprune-0.2.0.dist-info",
    }
    built = {f"ds_gradprune/native/{path.name}" for path in repo_root.glob("ds_gradprune/native/*")}
    sources = {name for name in built if name.endswith((".cpp", ".h"))}
    assert "ds_gradprune/native/kernels.cpp" in sources
    assert sources <= set(names)
    assert "ds_gradprune/py.typed" in names
    shipped = {
        f"ds_gradprune/{path.relative_to(repo_root)}" for path in repo_root.glob("ds_configs/*")
    }
    assert shipped <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "ds_gradprune", command, "--help"],
            cwd=tmp_path / "installed",
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"usage: ds-gradprune {command} " in done.stdout, done.stderr
