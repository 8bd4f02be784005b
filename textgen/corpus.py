"""Training text: the user's own files, or the text that ships with every CPython.

Knows nothing of tokens. A text is a sequence of documents; a document is yielded in pieces of
bounded size, cut at line breaks, so that a file of any size passes through little memory.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ds_gradprune.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
"""What counts as text in a folder. A file that is named on its own may end in anything."""

PIECE_CHARS = 1 << 20
"""A piece holds at most this many characters and one line's rest."""

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a file, or a text that is already in memory.

    Attributes:
        name: the file's path as a user would write it, or a short title.
        path: the file; None when `text` holds the document.
        text: the document itself; empty when it lies in a file.
    """

    name: str
    path: Path | None = None
    text: str = ""

    def pieces(self) -> Iterator[str]:
        """Yield the document in order, in pieces cut at line breaks.

        Raises:
            DataError: the file cannot be read or is not UTF-8.
        """
        if self.path is None:
            return _pieces(io.StringIO(self.text, newline=None))
        return _pieces_of_file(self.path)


@dataclass(frozen=True, slots=True)
class TextSource:
    """A whole training text.

    Attributes:
        name: for messages: a path, or what the embedded text is called.
        documents: in a fixed order.
    """

    name: str
    documents: tuple[Document, ...]

    def check(self) -> str:
        """Read everything once. Local.

        Returns:
            sha256 of the documents in order, hexadecimal: equal digests, equal texts.

        Raises:
            DataError: a file cannot be read or decoded, or the text has no visible character.
        """
        digest = hashlib.sha256()
        visible = False
        for document in self.documents:
            for piece in document.pieces():
                digest.update(piece.encode())
                visible = visible or not piece.isspace()
            digest.update(b"\0")
        if not visible:
            raise DataError(f"{self.name} must hold text, but is empty. Name a text with words.")
        return digest.hexdigest()


def open_text(path: Path | None) -> TextSource:
    """Find the documents of a training text; files are read later.

    Args:
        path: a text file, a folder that is searched for text files, or None for the text that
            ships with this Python.

    Raises:
        DataError: nothing is there, or a folder holds no text file.
    """
    if path is None:
        return embedded_text()
    if path.is_file():
        return TextSource(str(path), (Document(str(path), path),))
    if not path.exists():
        raise DataError(f"--text must name a file or a folder, but {path} does not exist.")
    files = sorted(found for found in path.rglob("*") if _is_text_file(found, path))
    if not files:
        raise DataError(
            f"{path} must hold text files, but has none that ends in {', '.join(TEXT_SUFFIXES)}. "
            "Name a single file to read it whatever its ending."
        )
    return TextSource(str(path), tuple(Document(str(file), file) for file in files))


def embedded_text() -> TextSource:
    """Gather the help topics and the standard library's docstrings of this Python.

    The source files are parsed, never imported. Documents are ordered by the hash of their
    content, not by name, so that a validation part cut off the end resembles the rest; the order
    depends on nothing but the text.

    Raises:
        DataError: this Python was installed without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*_help_topics(root / "pydoc_data" / "topics.py"), *_docstrings(root)]
    if not documents:
        raise DataError(
            "The embedded text must be there, but this Python has no library sources to read it "
            "from. Name a file or a folder with --text."
        )
    documents.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
    return TextSource("the embedded text", tuple(documents))


def _help_topics(path: Path) -> Iterator[Document]:
    """The topics of Python's help(): `topics` in pydoc_data/topics.py is one dict literal."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for title, text in sorted(topics.items()):
                yield Document(title, text=text.strip() + "\n")


def _docstrings(root: Path) -> Iterator[Document]:
    """One document per source file: every docstring under the name it belongs to."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        entries = []
        for name, docstring in _named_docstrings(module, _parse(path)):
            if docstring not in seen:
                seen.add(docstring)
                entries.append(f"{name}\n\n{docstring}\n")
        if entries:
            yield Document(module, text="\n".join(entries))


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError:  # the library ships a few files that are broken or foreign on purpose
        return ast.Module(body=[], type_ignores=[])


def _named_docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module, class or function and all inside it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _named_docstrings(f"{name}.{child.name}", child)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _named_docstrings(name, child)


def _is_text_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in TEXT_SUFFIXES and path.is_file() and not hidden


def _pieces_of_file(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            try:
                yield from _pieces(file)
            except UnicodeDecodeError as exc:
                offset = raw.tell() - len(exc.object) + exc.start
                raise DataError(
                    f"{path} must be UTF-8 text, but the byte at offset {offset} is not. "
                    "Convert it first, for example with iconv -f latin1 -t utf-8."
                ) from exc
    except OSError as exc:
        raise DataError(f"{path} must be readable: {exc.strerror}.") from exc


def _pieces(file: TextIO) -> Iterator[str]:
    """Pieces of PIECE_CHARS and the rest of a line, of which as much at most."""
    while piece := file.read(PIECE_CHARS):
        yield piece + file.readline(PIECE_CHARS)
