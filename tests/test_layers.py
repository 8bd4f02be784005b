"""The rooms of the package as a table, compared with what the files import, and their sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ds_gradprune"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "native": {"errors"},
    "bucket": {"errors", "native"},
    "law": {"errors", "config", "bucket.layout"},
    "codec": {"errors", "native", "bucket", "law.signals"},
    "wire": {"errors", "bucket", "codec"},
    "train": {"errors", "config", "native", "bucket", "law", "codec", "wire"},
    "deepspeed": {"errors", "config", "bucket", "law", "codec", "wire", "train"},
    "trainer": {"errors", "config", "deepspeed", "law", "train"},
    "commands": {"errors", "config", "native", "bucket", "law", "codec", "wire", "train"}
    | {"deepspeed"},
    "cli": {"errors", "commands"},
    "__main__": {"cli"},
}
"""Room -> rooms (or modules of them) that it may import, besides its own. Lowest first."""

OWNERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed.", "commands."),
    "hjson": ("deepspeed.",),
    "mpi4py": ("wire.mpi",),
    "transformers": ("trainer", "deepspeed.trainers", "commands."),
    "matplotlib": ("commands.",),
    "pydantic": ("config.",),
    "triton": ("native.device.",),
}
"""Third-party package -> the only modules (or prefixes of them) that may import it."""

LAZY = {"mpi4py", "matplotlib"}
"""Optional packages: imported inside functions, at the moment they are used."""

PURE = "law"
IMPURE = {"deepspeed", "logging", "numpy", "os", "random", "threading", "time", "torch"}
"""What decides is a function of data: no clock, no tensor, no log, no chance."""

FILE_CEILING, FILE_CEILING_WITH_REASON, FUNCTION_CEILING = 300, 400, 50


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, as the file at `where` wrote it."""

    name: str
    in_function: bool
    where: str


def module_name(path: Path) -> str:
    """`codec.header` for codec/header.py, `codec` for its `__init__`, "" for the root."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(child)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_typing(function)
        for child in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [_target(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, id(node) in inner, f"{path.relative_to(ROOT)}:{node.lineno}")


def _is_typing(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _target(module: str, name: str) -> str:
    """`from ds_gradprune import codec` imports ds_gradprune.codec."""
    full = f"{module}.{name}"
    return full if full.removeprefix(f"{PACKAGE}.") in MODULES else module


def ours(path: Path) -> Iterator[tuple[str, Import]]:
    """Imports of our own modules, as (name inside the package, import)."""
    for found in imports_of(path):
        if found.name == PACKAGE or found.name.startswith(f"{PACKAGE}."):
            yield found.name.removeprefix(PACKAGE).removeprefix("."), found


def is_one_of(module: str, prefixes: Iterator[str] | tuple[str, ...] | set[str]) -> bool:
    return any(
        module.startswith(p) if p.endswith(".") else module == p or module.startswith(f"{p}.")
        for p in prefixes
    )


def test_every_room_is_in_the_table_and_imports_only_downwards() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = module.split(".")[0]
        if not room:
            continue
        assert room in MAY_IMPORT, f"{PACKAGE}.{module} is in no room: add it to MAY_IMPORT"
        for target, found in ours(path):
            allowed = {room} | MAY_IMPORT[room]
            if target and not is_one_of(target, allowed):
                wrong.append(f"{found.where} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_rooms_stand_in_order() -> None:
    order = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        for target in allowed:
            assert order.index(target.split(".")[0]) < order.index(room), (room, target)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        module: {
            target for target, found in ours(path) if target in MODULES and not found.in_function
        }
        for module, path in MODULES.items()
    }
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*way, module))
        if module in state:
            return
        state[module] = 1
        for target in sorted(edges[module] - {module}):
            visit(target, (*way, module))
        state[module] = 2

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_third_party_packages_have_owners(package: str) -> None:
    for module, path in MODULES.items():
        for found in imports_of(path):
            if found.name.split(".")[0] != package:
                continue
            assert is_one_of(module, OWNERS[package]), found.where
            assert package not in LAZY or found.in_function, f"{found.where}: import it where used"


def test_what_decides_is_pure() -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == PURE:
            bad = [f.where for f in imports_of(path) if f.name.split(".")[0] in IMPURE]
            assert not bad, bad


def test_files_are_short() -> None:
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        ceiling = FILE_CEILING_WITH_REASON if "Longer than" in text[:2000] else FILE_CEILING
        assert lines <= ceiling, f"{path} has {lines} lines"


def test_functions_are_short() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                numel = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert numel <= FUNCTION_CEILING, f"{path}:{node.lineno} has {numel} lines"


def test_no_wait_reads_the_wall_clock() -> None:
    """Which jumps when a host sets it. Ages of files are the exception: their times are of it."""
    reading = {
        str(path.relative_to(ROOT))
        for folder in ("ds_gradprune", "launch", "textgen")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns")
    }
    stamps = "textgen/serve/schema.py"
    assert reading <= {"ds_gradprune/deepspeed/build_locks.py", stamps}


@pytest.mark.parametrize("module", ["ds_gradprune", "ds_gradprune.law", "ds_gradprune.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not {"torch", "deepspeed", "mpi4py", "transformers", "matplotlib"} & loaded
