"""A soft check of the documents' prose: sentences that are long, or that lean on a semicolon.

    python docs/check_prose.py                     all documents
    python docs/check_prose.py FILE ... --max 20   these files, 20 words a sentence

Prints one line per finding, then a summary. The exit code is 1 if there are findings. Code blocks,
tables, headings and comments are not prose. A `code span`, a link and a number count as one word.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MOST_WORDS = 25
"""Words of a sentence that a reader takes in at once."""

_NOT_PROSE = re.compile(r"^\s*(\||#|!\[|<!--|>\s*$|---)")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_SENTENCE_END = re.compile(r"(?<=[.?!:])[\")*_]*\s+(?=[\"(*_]*[A-Z0-9`\[])")
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|Fig)\.\s")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document.

    Attributes:
        line: where its paragraph begins, counted from 1.
        text: the sentence, code spans and links shortened to one word.
    """

    line: int
    text: str

    @property
    def num_words(self) -> int:
        """Words, counted at blanks."""
        return sum(1 for word in self.text.split() if re.search(r"\w", word))

    @property
    def has_semicolon(self) -> bool:
        """A semicolon joins two sentences."""
        return ";" in self.text


def documents() -> list[Path]:
    """What is checked if no file is named."""
    names = ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "launch/README.md")
    return [
        *(ROOT / name for name in names),
        *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "api.md"}),
    ]


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The prose of a Markdown text.

    Yields:
        First line of a paragraph or list item, counted from 1, and its text on one line.
    """
    first, lines, in_code = 0, list[str](), False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        is_fence = line.lstrip().startswith("```")
        is_break = is_fence or in_code or not line.strip() or bool(_NOT_PROSE.match(line))
        if lines and (is_break or _ITEM.match(line)):
            yield first, " ".join(lines)
            lines = []
        in_code ^= is_fence
        if not is_break:
            first = first if lines else number
            lines.append(_ITEM.sub("", line).strip())


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of a Markdown text, in order."""
    for line, paragraph in paragraphs(text):
        plain = re.sub(r"`[^`]*`", "Code", paragraph)
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = _ABBREVIATIONS.sub(lambda match: match.group(1) + " ", plain)
        for part in _SENTENCE_END.split(plain):
            if part.strip():
                yield Sentence(line, part.strip())


def findings(text: str, most_words: int = MOST_WORDS) -> list[str]:
    """What a writer should look at.

    Args:
        text: of a Markdown document.
        most_words: of a sentence.

    Returns:
        One line each: line number, what, the sentence.
    """
    found = []
    for sentence in sentences(text):
        if sentence.num_words > most_words:
            found.append(f"{sentence.line}: {sentence.num_words} words: {sentence.text}")
        if sentence.has_semicolon:
            found.append(f"{sentence.line}: semicolon: {sentence.text}")
    return found


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description="Find long sentences and semicolons.")
    flags.add_argument("files", type=Path, nargs="*", help="Markdown files")
    flags.add_argument("--max", type=int, default=MOST_WORDS, help="words of a sentence")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    given = parser().parse_args(arguments)
    num_found = num_sentences = 0
    for path in given.files or documents():
        text = path.read_text(encoding="utf-8")
        found = findings(text, given.max)
        num_found += len(found)
        num_sentences += sum(1 for _ in sentences(text))
        for line in found:
            print(f"{path.name}:{line}")
    print(f"{num_found} findings in {num_sentences} sentences")
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
