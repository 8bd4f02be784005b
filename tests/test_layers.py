"""The architecture as a table, compared with what the files import and how long they are."""

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

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "fieldtypes"),
    ("config", "records", "stats", "topk", "step_rule"),
    ("rows", "signals"),
    (
        "link",
        "meter",
        "performance",
        "sparsify",
        "residual",
        "shared",
        "momentum",
        "codec",
        "transport",
    ),
    ("controller", "exchange"),
    ("reducer",),
    ("session",),
    ("islands",),
    ("integration",),
    ("cli",),
)
"""Lowest first. A module imports lower rows only; modules of one row do not import each other."""

ISLAND = "textgen"
"""Imports nothing of ours but `errors`, and is imported by scripts only."""

FAMILIES = ("codec", "transport", "controller", "integration", ISLAND)
"""Sub-packages: their modules may import each other, without a cycle, but not their `__init__`."""

OWNERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("integration.",),
    "hjson": ("integration.",),
    "mpi4py": ("transport.mpi",),
    "transformers": (f"{ISLAND}.",),
    "tokenizers": (f"{ISLAND}.",),
    "safetensors": (f"{ISLAND}.",),
    "tqdm": (f"{ISLAND}.",),
    "pydantic": ("config",),
}
"""Third-party package -> the only modules (or prefixes of them) that may import it."""

IN_FUNCTION = {
    ("transport.mpi", "mpi4py"),
    (f"{ISLAND}.generate", "deepspeed"),
    (f"{ISLAND}.start", "deepspeed"),
    (f"{ISLAND}.start", "hjson"),
}
"""Imports inside a function: of optional packages, at the moment they are used."""

PURE = ("link", "meter", "performance", "signals", "controller", "stats", "step_rule")
IMPURE = {"deepspeed", "logging", "numpy", "os", "random", "threading", "time", "torch"}
"""What decides is a function of data: no clock, no tensor, no log, no chance."""

FILE_CEILING, FUNCTION_CEILING = 400, 50


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, as the file at `where` wrote it."""

    name: str
    in_function: bool
    where: str


def module_name(path: Path) -> str:
    """`codec.base` for ds_gradprune/codec/base.py, `codec` for its `__init__`, "" for the root."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(child)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
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


def _target(module: str, name: str) -> str:
    """`from ds_gradprune import codec` imports ds_gradprune.codec."""
    full = f"{module}.{name}"
    return full if full.removeprefix(f"{PACKAGE}.") in MODULES else module


def ours(path: Path) -> Iterator[tuple[str, Import]]:
    """Imports of our own modules, as (name inside the package, import)."""
    for found in imports_of(path):
        if found.name == PACKAGE or found.name.startswith(f"{PACKAGE}."):
            yield found.name.removeprefix(PACKAGE).removeprefix("."), found


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    for index, row in enumerate(LAYERS):
        if top in row:
            return index
    raise AssertionError(f"{PACKAGE}.{module} is in no layer: add it to LAYERS in {__file__}")


def is_owner(module: str, owners: tuple[str, ...]) -> bool:
    return any(
        module.startswith(owner) if owner.endswith(".") else module == owner for owner in owners
    )


# --- the table ------------------------------------------------------------------------------------


def test_every_row_of_the_table_that_exists_is_checked() -> None:
    known = {name for row in LAYERS for name in row} | {ISLAND, ""}
    assert {module.split(".")[0] for module in MODULES} <= known


@pytest.mark.parametrize("module", [m for m in MODULES if m and m.split(".")[0] != ISLAND])
def test_module_imports_lower_layers_only(module: str) -> None:
    top = module.split(".")[0]
    for target, found in ours(MODULES[module]):
        target_top = target.split(".")[0]
        if target == "" or (target_top == top and top in FAMILIES):
            continue  # the version number; a relative, which the next tests look at
        assert target_top != ISLAND, f"{found.where} imports the island {ISLAND}"
        assert layer_of(target) < layer_of(module), f"{found.where} imports {target}: not lower"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] == ISLAND])
def test_island_imports_errors_and_itself_only(module: str) -> None:
    for target, found in ours(MODULES[module]):
        allowed = target == "errors" or target.split(".")[0] == ISLAND
        assert allowed, f"{found.where} imports {target}: {ISLAND} is an island"


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_member_of_a_family_does_not_import_its_package(module: str) -> None:
    family = module.split(".")[0]
    targets = {target: found.where for target, found in ours(MODULES[module])}
    assert family not in targets, f"{targets[family]} imports {family}/__init__.py"


def test_no_import_cycle() -> None:
    edges = {m: {target for target, _ in ours(path) if target} for m, path in MODULES.items()}
    edges[""] = set()  # the face imports the integration by name, when it is called
    done: set[str] = set()
    while len(done) < len(edges):
        free = {m for m, targets in edges.items() if m not in done and targets & set(edges) <= done}
        assert free, f"import cycle among {sorted(set(edges) - done)}"
        done |= free


def test_face_imports_only_errors_when_it_is_imported() -> None:
    tree = ast.parse(MODULES[""].read_text(encoding="utf-8"))
    direct = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module for node in direct if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name and name.startswith(PACKAGE)} <= {f"{PACKAGE}.errors"}


# --- third parties --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_third_party_package_is_imported_by_its_owner_only(module: str) -> None:
    for found in imports_of(MODULES[module]):
        package = found.name.split(".")[0]
        if found.in_function and (module, package) in IN_FUNCTION:
            continue
        owners = OWNERS.get(package)
        assert owners is None or is_owner(module, owners), (
            f"{found.where} imports {package}, which belongs to {owners}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top_of_the_file(module: str) -> None:
    for found in imports_of(MODULES[module]):
        package = found.name.split(".")[0]
        allowed = not found.in_function or (module, package) in IN_FUNCTION
        assert allowed, f"{found.where} imports {found.name} inside a function"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in PURE])
def test_what_decides_is_pure(module: str) -> None:
    imported = {found.name.split(".")[0]: found.where for found in imports_of(MODULES[module])}
    assert not IMPURE & set(imported), f"{module} is pure, but imports {IMPURE & set(imported)}"


@pytest.mark.parametrize("optional", ["deepspeed", "mpi4py", "transformers"])
def test_importing_the_package_loads_no_optional_package(optional: str) -> None:
    code = f"import sys, {PACKAGE}; sys.exit({optional!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 0, f"import {PACKAGE} loads {optional}"


# --- sizes ----------------------------------------------------------------------------------------

SOURCES = [
    path
    for folder in (PACKAGE, "launch", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_under_the_ceiling(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_CEILING, f"{lines} lines: one noun per file"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_under_the_ceiling(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        assert lines <= FUNCTION_CEILING, f"{where} has {lines} lines"
