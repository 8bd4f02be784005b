"""docs/api.md: the reference of what a user calls, from the docstrings.

    python docs/api.py            prints it
    python docs/api.py --write    writes docs/api.md

A docstring has Google's sections; each becomes a list. A name in single backticks stays one.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

HEAD = """\
# Reference

Written by `docs/api.py` from the docstrings. *Collective* means that all ranks must call, and
*local* that one alone may. Keys of the block are in [configuration.md](configuration.md),
commands in [doctor.md](doctor.md) and [serving.md](serving.md).
"""

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "References")


def subjects() -> Iterator[tuple[str, str, Sequence[tuple[str, Any]]]]:
    """(heading, what stands below it, (name, object) in order)."""
    import ds_gradprune
    from ds_gradprune import errors
    from ds_gradprune.deepspeed import attach, initialize, validation, waits
    from ds_gradprune.deepspeed.handle import Handle
    from ds_gradprune.law.decision import Cause, Decision
    from ds_gradprune.train.report import StepReport, Totals

    yield (
        "ds_gradprune",
        "",
        [
            ("ds_gradprune.initialize", initialize.initialize),
            ("ds_gradprune.register", ds_gradprune.register),
            ("ds_gradprune.unregister", ds_gradprune.unregister),
            ("ds_gradprune.attach", attach.attach),
            ("ds_gradprune.detach", ds_gradprune.detach),
            ("ds_gradprune.watch", waits.watch),
        ],
    )
    yield "engine.gradprune", "What `initialize` and `attach` tie to an engine.", members(Handle)
    yield (
        "Reports",
        "What `engine.gradprune.report` and `.totals` hold.",
        [(cls.__name__, cls) for cls in (StepReport, Totals, Decision, Cause)],
    )
    yield (
        "The Hugging Face Trainer",
        "See [trainer.md](trainer.md).",
        list(of_trainer()),
    )
    yield (
        "Monitors",
        "",
        [("ds_gradprune.deepspeed.validation.write_validation", validation.write_validation)],
    )
    yield (
        "Errors",
        "All are in `ds_gradprune.errors`.",
        [
            (name, found)
            for name, found in vars(errors).items()
            if inspect.isclass(found) and issubclass(found, errors.GradPruneError)
        ],
    )


def of_trainer() -> Iterator[tuple[str, Any]]:
    """What `ds_gradprune.trainer` offers."""
    from ds_gradprune import trainer

    for name in trainer.__all__:
        yield f"ds_gradprune.trainer.{name}", getattr(trainer, name)


def members(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties for users, in order; those that docstrings call internal are not."""
    return [
        (name, found)
        for name, found in vars(cls).items()
        if name in _FOR_USERS and (callable(found) or isinstance(found, property))
    ]


_FOR_USERS = (
    "report",
    "totals",
    "held_bytes",
    "residual_norm",
    "shared_weights",
    "weight_sets",
    "parameters_crc",
    "check_alike",
    "detach",
)
"""Members of a handle that scripts call; the others are for our own modules."""


def entry(name: str, found: Any) -> str:
    """One heading with signature and text."""
    doc = inspect.getdoc(found) or ""
    text = text_of(doc)
    if inspect.isclass(found) and issubclass(found, enum.Enum):
        text += "\n\n" + "\n".join(f"{n}. `{each.value}`" for n, each in enumerate(found))
    return f"### {name}\n\n```python\n{signature(name, found)}\n```\n\n{text}"


def signature(name: str, found: Any) -> str:
    """As it is written in the source, without self."""
    short = name.rsplit(".", 1)[-1]
    if isinstance(found, property):
        return f"{short}: {found.fget.__annotations__['return']}" if found.fget else short
    if inspect.isclass(found):
        bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
        return f"class {short}({bases}): ..." if bases else f"class {short}: ..."
    function: Callable[..., Any] = inspect.unwrap(found)
    shown = str(inspect.signature(function)).replace("(self)", "()").replace("(self, ", "(")
    return f"def {short}{shown}: ...".replace("'", "")


def text_of(doc: str) -> str:
    """A docstring as Markdown."""
    parts: list[str] = []
    for paragraph in doc.split("\n\n"):
        title, _, rest = paragraph.partition("\n")
        if title.rstrip(":") in _SECTIONS and title.endswith(":"):
            parts.append(f"*{title.rstrip(':')}*\n\n{items(rest)}")
        elif paragraph.startswith("    "):
            parts.append(f"```python\n{inspect.cleandoc(paragraph)}\n```")
        else:
            parts.append(re.sub(r"::$", ":", " ".join(paragraph.split())))
    return "\n\n".join(parts)


def items(text: str) -> str:
    """The lines of a section as a list: an item begins where the indent is least."""
    lines = inspect.cleandoc(text).splitlines()
    joined: list[str] = []
    is_list = any(line.startswith(" ") for line in lines) or all(
        re.match(r"\*{0,2}\w+(, \w+)*: ", line) for line in lines
    )
    for line in lines:
        if not joined or (is_list and not line.startswith(" ")):
            joined.append(line.strip())
        else:
            joined[-1] += f" {line.strip()}"
    return "\n".join("- " + re.sub(r"^([*\w, ]+): ", r"`\1`: ", item) for item in joined)


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for heading, below, found in subjects():
        parts.append(f"## {heading}\n")
        if below:
            parts.append(f"{below}\n")
        parts += [entry(name, each) + "\n" for name, each in found]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif sys.argv[1:]:
        sys.exit("takes nothing or --write")
    else:
        print(page())
