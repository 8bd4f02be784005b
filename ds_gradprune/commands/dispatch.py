"""Commands of the example beside this package: found, imported and run when they are called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ds_gradprune.errors import ConfigError, MissingDependencyError

TARGETS = {
    "train": ("textgen.launch.train", "textgen"),
    "finetune": ("textgen.launch.finetune", "textgen,finetune"),
    "supervise": ("textgen.launch.supervise", "textgen"),
    "reply": ("textgen.launch.reply", "textgen"),
    "serve": ("textgen.serve.command", "textgen,serve"),
}
"""Command -> module with `main(arguments) -> exit code`, and the extra with what it imports."""

NEEDS: dict[str, tuple[str, ...]] = {
    "train": ("deepspeed", "transformers"),
    "finetune": ("deepspeed", "transformers", "accelerate"),
    "supervise": (),
    "reply": ("transformers",),
    "serve": ("transformers", "fastapi", "uvicorn", "prometheus_client"),
}
"""Command -> packages that it cannot do without."""


SHIPPED = Path(str(resources.files("ds_gradprune"))) / "ds_configs"
"""Configurations to start from."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command of the example.

    Args:
        name: a key of TARGETS.
        arguments: of the command. `--config NAME` may name a shipped configuration.

    Returns:
        Its exit code. A command that must leave the interpreter early does not return.

    Raises:
        MissingDependencyError: the command, or a package that it imports, is not installed.
        ConfigError: `--config` names neither a file nor a shipped configuration.
    """
    target, extra = TARGETS[name]
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"ds-gradprune {name} needs {package}, which is not installed. Run: pip install "
                f'"ds_gradprune[deepspeed,{extra}]"'
            )
    module = importlib.import_module(target)
    sys.argv[0] = f"ds-gradprune {name}"  # what --help calls it
    code: int = module.main(with_shipped_config(arguments))
    leave = getattr(module, "end_process", None)  # threads of gloo may outlive the interpreter
    if leave is not None:
        leave(code)
    return code


def with_shipped_config(arguments: Sequence[str]) -> list[str]:
    """The arguments, `--config NAME` replaced by the path of the shipped file of that name."""
    words = list(arguments)
    for number, word in enumerate(words[:-1]):
        if word == "--config":
            words[number + 1] = shipped_config(words[number + 1])
    return words


def shipped_config(name: str) -> str:
    """A path as it is; a bare name without folder and ending means one of ds_configs/.

    Raises:
        ConfigError: it is neither a file nor such a name.
    """
    if "/" in name or "." in name or Path(name).exists():
        return name
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise ConfigError(f"--config must be a file or one of {known}, got {name!r}.")
    return str(path)
