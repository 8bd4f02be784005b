"""The documents as data: their text, code blocks, links, anchors and the files they name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
"""What a reader reads; launch/README.md and results/ have rules of their own."""

FOLDERS = "docs|ds_configs|ds_gradprune|labs|launch|results|tests|textgen|tools"
"""Top folders whose files a document may name."""


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a document.

    Attributes:
        document: its path.
        line: of the opening fence, counted from 1.
        language: what stands behind the fence; may be empty.
        code: the lines between the fences.
    """

    document: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def read(path: Path) -> str:
    """The text of a document."""
    return path.read_text(encoding="utf-8")


def code_blocks(path: Path) -> list[CodeBlock]:
    """The fenced blocks of a document, in order."""
    text = read(path)
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [
        CodeBlock(path, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in found
    ]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """Targets of a document's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """What `#...` may name in a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def named_files(path: Path) -> set[str]:
    """Files of this project that a document names in code spans or blocks, from the root."""
    suffixes = "py|sh|md|json|jsonl|cpp|txt|example"
    return set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./]*\w\.(?:{suffixes})\b", read(path)))


def section(path: Path, heading: str) -> str:
    """The text from a heading to the next one of its level or above.

    Raises:
        ValueError: there is no such heading.
    """
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = read(path).partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"{path.name} must hold the heading {heading!r}")
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table_rows(text: str) -> list[list[str]]:
    """Cells of all tables of a text, without heads and rules."""
    lines = [*text.splitlines(), ""]
    is_rule = [line.startswith("|") and set(line) <= set("|-: ") for line in lines]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for number, line in enumerate(lines[:-1])
        if line.startswith("|") and not is_rule[number] and not is_rule[number + 1]
    ]
