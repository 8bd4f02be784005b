"""Training text: the embedded one, files and folders, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.errors import DataError
from textgen import corpus
from textgen.corpus import Document, TextSource, embedded_text, open_text


@pytest.fixture(scope="module")
def embedded() -> TextSource:
    return embedded_text()


def text_of(source: TextSource) -> list[str]:
    return ["".join(document.pieces()) for document in source.documents]


def test_embedded_text_is_the_same_every_time(embedded: TextSource) -> None:
    assert embedded_text() == embedded


def test_embedded_text_is_large_and_holds_topics_and_docstrings(embedded: TextSource) -> None:
    text = "".join(text_of(embedded))
    assert len(text) > 1_000_000
    assert embedded.check() == embedded_text().check()
    assert 'The "for" statement' in text
    assert "json.dumps\n\nSerialize ``obj`` to a JSON formatted ``str``." in text


def test_embedded_text_names_no_place_on_this_machine(embedded: TextSource) -> None:
    stdlib = re.compile(r"/(lib|lib64)/python3\.\d+/(json|asyncio|site-packages)/")
    home = str(Path.home())
    for text in text_of(embedded):
        assert not stdlib.search(text)
        assert home == "/root" or home not in text


def test_embedded_text_imports_nothing_of_what_it_reads(embedded: TextSource) -> None:
    assert embedded.documents
    assert "turtle" not in sys.modules
    assert "antigravity" not in sys.modules


def test_docstrings_carry_their_qualified_names(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text(
        '"""The pack."""\n'
        "try:\n"
        "    class A:\n"
        '        """An A."""\n'
        "        def f(self):\n"
        '            """Do f."""\n'
        "except ImportError:\n"
        "    async def g():\n"
        '        """Do g."""\n'
        "def silent(): pass\n"
        "def twice():\n"
        '    """Do f."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Skipped."""')
    [document] = corpus._docstrings(tmp_path)
    assert document.name == "pack"
    assert document.text == (
        "pack\n\nThe pack.\n\npack.A\n\nAn A.\n\npack.A.f\n\nDo f.\n\npack.g\n\nDo g.\n"
    )


def test_python_without_sources_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no library sources.*--text"):
        embedded_text()


def test_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "b",
        "a.md": "a",
        "c/d.rst": "d",
        ".hidden/e.txt": "e",
        "f.bin": "f",
        "G.TXT": "g",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = open_text(tmp_path)
    assert [Path(document.name).name for document in source.documents] == [
        "G.TXT",
        "a.md",
        "b.txt",
        "d.rst",
    ]
    assert text_of(source) == ["g", "a", "b", "d"]


def test_single_file_may_have_any_ending(tmp_path: Path) -> None:
    path = tmp_path / "story"
    path.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}höre\r\nzu\n".encode())
    assert text_of(open_text(path)) == ["höre\nzu\n"]


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist"):
        open_text(tmp_path / "absent")


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"must hold text files, but has none.*\.txt"):
        open_text(tmp_path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.txt must hold text, but is empty"):
        open_text(path).check()


def test_blank_file_among_others_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("words")
    assert len(open_text(tmp_path).check()) == 64


def test_digest_tells_texts_apart_and_not_their_places(tmp_path: Path) -> None:
    digests = {}
    for name, parts in {"one": ["ab", "c"], "same": ["ab", "c"], "other": ["a", "bc"]}.items():
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            (tmp_path / name / f"{number}.txt").write_text(part)
        digests[name] = open_text(tmp_path / name).check()
    assert digests["one"] == digests["same"] != digests["other"]


@pytest.mark.parametrize("before", [0, 7, 8191, 8192, corpus.PIECE_CHARS + 3])
def test_byte_that_is_not_utf8_is_told_with_its_offset(tmp_path: Path, before: int) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * before + b"\xe9x")
    with pytest.raises(DataError, match=rf"latin\.txt must be UTF-8.*offset {before} .*iconv"):
        open_text(path).check()


def test_letter_cut_at_the_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes(b"abc\xe2\x82")
    with pytest.raises(DataError, match=r"offset 3 "):
        open_text(path).check()


@pytest.mark.skipif("os.geteuid() == 0", reason="root may read everything")
def test_unreadable_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt must be readable: Permission denied"):
        open_text(path).check()


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 12))
def test_pieces_join_to_the_text_and_end_at_lines(whole: str, limit: int) -> None:
    before = corpus.PIECE_CHARS
    corpus.PIECE_CHARS = limit
    try:
        pieces = list(Document("d", text=whole).pieces())
    finally:
        corpus.PIECE_CHARS = before
    assert "".join(pieces) == whole
    for piece in pieces[:-1]:
        assert limit <= len(piece) <= 2 * limit
        assert piece.endswith("\n") or (len(piece) == 2 * limit and "\n" not in piece[limit:])


def test_document_in_memory_has_pieces() -> None:
    assert list(Document("d", text="x\ny").pieces()) == ["x\ny"]
