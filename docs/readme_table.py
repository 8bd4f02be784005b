"""Tables in README.md that a script writes: each stands between two markers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


class ReadmeTable:
    """One table.

    Args:
        name: in the markers.
        script: that writes it, relative to the project's root.
        make: the table, Markdown.
    """

    def __init__(self, name: str, script: str, make: Callable[[], str]) -> None:
        self.begin = f"<!-- {name}: written by {script} -->"
        self.end = f"<!-- end of {name} -->"
        self.make = make

    def into(self, readme: str) -> str:
        """The README's text with a fresh table between its markers.

        Raises:
            ValueError: a marker is missing.
        """
        before, begin, rest = readme.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end):
            raise ValueError(f"README.md must hold the lines {self.begin!r} and {self.end!r}")
        return f"{before}{self.begin}\n{self.make()}\n{self.end}{after}"

    def main(self, arguments: Sequence[str]) -> None:
        """Print the table, or write it into README.md."""
        if list(arguments) == ["--write"]:
            README.write_text(self.into(README.read_text(encoding="utf-8")), encoding="utf-8")
        elif arguments:
            sys.exit("takes nothing or --write")
        else:
            print(self.make())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
