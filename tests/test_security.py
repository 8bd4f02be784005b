"""What docs/security.md says: nothing is unpickled from the network, and nothing runs as code.

DeepSpeed's own files are pickles, and DeepSpeed reads them; see there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("ds_gradprune", "textgen", "launch")
FILES = sorted(
    path
    for folder in SHIPPED
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
    "exec",
    "eval",
    "system",
    "allgather",  # mpi4py's lower case pickles
    "alltoall",
    "bcast",
    "recv",
}


def found_in(tree: ast.AST) -> Iterator[str]:
    """What a file must not do, one sentence each."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from _found_in_call(node)


def _found_in_call(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    options = {word.arg: ast.unparse(word.value) for word in node.keywords}
    called = ast.unparse(node.func)
    is_method = called.endswith((".eval", ".recv")) and not called.startswith(
        ("dist.", "builtins.")
    )
    if name in CALLS and not is_method:
        yield f"calls {called}"
    if called == "torch.load" and options.get("weights_only") != "True":
        yield "calls torch.load without weights_only"
    if called.endswith("np.load") or options.get("allow_pickle") == "True":
        yield f"calls {called}, which may unpickle"
    if options.get("shell") == "True":
        yield f"calls {called} through a shell"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_run(path: Path) -> None:
    assert list(found_in(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch.distributed import x\nfrom pickle import loads",
        "dist.all_gather_object(a, b)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "subprocess.run(x, shell=True)",
        "eval(text)",
        "comm.bcast(x)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert list(found_in(ast.parse(source)))


def test_what_is_harmless_is_not_found() -> None:
    source = "torch.load(p, weights_only=True)\nmodel.eval()\nsock.recv(5)\ncomm.Allgather(a, b)"
    assert list(found_in(ast.parse(source))) == []
