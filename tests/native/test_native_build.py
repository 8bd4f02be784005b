"""Building the kernels: once for a machine, safe among several ranks, never in the way."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ds_gradprune.native import library
from ds_gradprune.native.build import BuildError, build, cache_folder, find_compiler

FAKE = """#!/bin/sh
case "$*" in
    *--version*) echo "fake 1.0"; exit 0;;
    {refused}) echo "x.cpp:1: error: no such thing" >&2; exit 1;;
esac
echo "$*" >> "{log}"
for last; do :; done
echo built > "$last"
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of its own, and kernels that are asked for anew."""
    monkeypatch.setenv("DS_GRADPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DS_GRADPRUNE_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "_kernels", library._kernels.__wrapped__)


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str = "never") -> Path:
    """A compiler that writes down its arguments; returns where."""
    path, log = folder / "compiler", folder / "log"
    path.write_text(FAKE.format(refused=refused, log=log))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return log


def test_a_second_build_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(tmp_path, monkeypatch)
    first = build()
    assert first.parent == tmp_path / "cache"
    assert first.read_text() == "built\n"
    assert build() == first
    (line,) = log.read_text().splitlines()
    assert {"-O3", "-march=native", "-ffp-contract=off", "-fno-fast-math"} <= set(line.split())
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_another_compiler_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch)
    first = build()
    (tmp_path / "other").mkdir()
    fake_compiler(tmp_path / "other", monkeypatch)
    assert build() != first


def test_a_compiler_that_knows_no_native_machine_is_asked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(tmp_path, monkeypatch, refused="*-march=native*")
    assert build().exists()
    (line,) = log.read_text().splitlines()
    assert "-march" not in line


def test_many_builds_at_once_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        (path,) = {future.result() for future in [pool.submit(build) for _ in range(8)]}
    assert path.read_text() == "built\n"
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_failing_compiler_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, refused="*kernels.cpp*")
    with pytest.raises(BuildError, match=r"failed: x.cpp:1: error: no such thing"):
        build()
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DS_GRADPRUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="the cache folder cannot be used"):
        build()


@pytest.mark.parametrize("named", ["", "no-such-compiler -x"])
def test_without_a_compiler_one_warning_says_so(
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(library, "_kernels", functools.cache(library._kernels))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found \(looked for"):
        find_compiler()
    with caplog.at_level(logging.WARNING):
        assert [library.kernels() for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert "native kernels are off" in record.message
    assert "no C++ compiler was found" in record.message
    assert "Install a C++ compiler" in record.message


def test_a_file_that_is_no_library_is_no_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert library.kernels() is None
    (record,) = caplog.records
    assert "native kernels are off" in record.message


def test_can_be_turned_off_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_GRADPRUNE_NATIVE", "0")
    with caplog.at_level(logging.WARNING):
        assert library.kernels() is None
    assert not caplog.records


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_GRADPRUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ds_gradprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "ds_gradprune"


@pytest.mark.slow
def test_two_ranks_build_at_once(tmp_path: Path) -> None:
    """With the real compiler, each in a process of its own."""
    try:
        find_compiler()
    except BuildError:
        pytest.skip("needs a C++ compiler")
    code = "from ds_gradprune.native.library import kernels; print(kernels() is not None)"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ.copy(), stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [rank.communicate(timeout=100)[0].strip() for rank in ranks] == ["True", "True"]
    assert len(list((tmp_path / "cache").iterdir())) == 1
