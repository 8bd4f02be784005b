"""What users may import: names, documentation, version, and what a missing package says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ds_gradprune
from ds_gradprune import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ENTRY_POINTS = {"initialize", "register", "unregister", "attach", "detach", "watch"}


def test_public_names_are_frozen_and_sorted() -> None:
    assert set(ds_gradprune.__all__) == ENTRY_POINTS
    assert list(ds_gradprune.__all__) == sorted(ds_gradprune.__all__)


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_public_function_says_who_must_call_it(name: str) -> None:
    text = inspect.getdoc(getattr(ds_gradprune, name)) or ""
    assert "Collective" in text or "Local" in text


def test_version_is_the_one_of_the_package(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ds_gradprune.__version__ == project["version"]


def test_package_is_typed(repo_root: Path) -> None:
    assert (repo_root / "ds_gradprune" / "py.typed").is_file()


def test_every_error_is_in_the_drawn_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    drawing = errors.__doc__ or ""
    assert classes == {name for name in classes if name in drawing}
    assert all(issubclass(getattr(errors, name), errors.GradPruneError) for name in classes)


def test_missing_deepspeed_says_the_pip_command(repo_root: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import ds_gradprune\n"
        "try:\n"
        "    ds_gradprune.register()\n"
        "except ds_gradprune.errors.MissingDependencyError as exc:\n"
        "    print(exc)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert 'pip install "ds_gradprune[deepspeed]"' in result.stdout
