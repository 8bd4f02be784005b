"""Tables in Markdown files that a script writes: each stands between two markers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class MarkedTable:
    """One table of one document.

    Attributes:
        document: the file that holds it, relative to the project's root.
        name: what the markers call it.
        script: the script that writes it, relative to the project's root.
        make: returns the table as Markdown.
    """

    document: str
    name: str
    script: str
    make: Callable[[], str]

    @property
    def path(self) -> Path:
        """The document."""
        return ROOT / self.document

    def into(self, text: str) -> str:
        """Put a fresh table between the markers.

        Args:
            text: the document as it stands.

        Returns:
            The document with the fresh table.

        Raises:
            ValueError: a marker is missing.
        """
        first = f"<!-- {self.name}: written by {self.script} -->"
        last = f"<!-- end of {self.name} -->"
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not (begin and end):
            raise ValueError(f"{self.document} must hold the lines {first!r} and {last!r}")
        return f"{before}{first}\n{self.make()}\n{last}{after}"

    def write(self) -> None:
        """Put a fresh table into the document on disk.

        Raises:
            ValueError: a marker is missing.
        """
        text = self.path.read_text(encoding="utf-8")
        self.path.write_text(self.into(text), encoding="utf-8")


def run(tables: Sequence[MarkedTable], arguments: Sequence[str]) -> None:
    """Print the tables, or write them into their documents.

    Args:
        tables: which ones.
        arguments: of the script: nothing prints, `--write` writes.
    """
    if list(arguments) == ["--write"]:
        for table in tables:
            table.write()
    elif arguments:
        sys.exit("takes nothing or --write")
    else:
        print("\n\n".join(table.make() for table in tables))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers.

    Args:
        head: titles of the columns.
        rows: cells, as many per row as there are titles.
        num_text: how many columns are aligned to the left.

    Returns:
        The table, one line per row.
    """
    rule = ["---"] * num_text + ["---:"] * (len(head) - num_text)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])
