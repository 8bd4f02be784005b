"""Links and names in the documents lead somewhere, and nothing in results/ is left over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.documents import (
    DOCUMENTS,
    ROOT,
    anchors,
    links,
    named_files,
    prose,
    read,
    section,
    table_rows,
)
from tests.test_layers import MAY_IMPORT

RESULTS = ROOT / "results"
PAGES = sorted(RESULTS.glob("*.md"))
READ = [*DOCUMENTS, *PAGES, ROOT / "launch" / "README.md"]


@pytest.mark.parametrize("path", READ, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_resolve(path: Path) -> None:
    for link in links(path):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links {link}"
        if anchor:
            assert anchor in anchors(target), f"{path.name} links {link}"


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if path.name not in ("LOG.md", "CHANGELOG.md")],
    ids=lambda path: path.name,
)
def test_named_files_exist(path: Path) -> None:
    missing = [name for name in sorted(named_files(path)) if not (ROOT / name).exists()]
    assert missing == [], f"{path.name} names files that are not there"


def test_every_result_is_quoted() -> None:
    """By a document, or by a page that a document quotes; a JSON and a picture by their page."""
    waiting, quoted = [*DOCUMENTS, RESULTS / "README.md"], set[str]()
    while waiting:
        text = read(waiting.pop())
        for name in re.findall(r"[\w-]+\.(?:md|jsonl|json|png)", text):
            if (RESULTS / name).is_file() and name not in quoted:
                quoted.add(name)
                if name.endswith(".md"):
                    waiting.append(RESULTS / name)
    left_over = {path.name for path in RESULTS.iterdir()} - quoted - {"README.md"}
    assert left_over == set()


@pytest.mark.parametrize("path", READ, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_path_of_a_machine(path: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:root|tmp|work|Users|mnt)/\S*", read(path))
    assert found == []


def test_log_is_newest_first() -> None:
    text = read(ROOT / "LOG.md")
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): .+ \(.+\)$|^## ", text, flags=re.MULTILINE)
    known = [date for date in dates if date]
    assert known == sorted(known, reverse=True)
    assert len(text.splitlines()) <= 400


def test_configurations_are_explained_and_shipped() -> None:
    text = section(ROOT / "docs" / "configuration.md", "## Configurations to start from")
    explained = {row[0].strip("`") for row in table_rows(text)}
    assert explained == {path.name for path in (ROOT / "ds_configs").glob("*.json")}


def test_rooms_are_those_of_the_package() -> None:
    text = section(ROOT / "CONTRIBUTING.md", "## Rooms")
    listed = re.findall(r"^\| `([\w.]+/?)` \|", text.split("Where to look", 1)[0], re.MULTILINE)
    package = ROOT / "ds_gradprune"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(listed) == folders | modules


def test_rooms_import_what_the_layers_allow() -> None:
    rows = table_rows(section(ROOT / "CONTRIBUTING.md", "## Rooms"))
    told = {
        re.sub(r"[`/]|\.py", "", room): set(re.findall(r"`([\w.]+)`", imports[0]))
        for room, _, *imports in rows
        if imports
    }
    assert told == {room: may for room, may in MAY_IMPORT.items() if room != "__main__"}


SUPPORT = ROOT / "docs" / "support.md"
WORDS = {row[0] for row in table_rows(prose(SUPPORT).split("\n## ", 1)[0])}


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("## Mode, ZeRO stage, precision", slice(2, 5)),
        ("## Hardware and software", slice(1, 3)),
        ("## Exchange", slice(1, 3)),
        ("## Frameworks", slice(1, 3)),
        ("## DeepSpeed features that are refused", slice(1, 3)),
    ],
)
def test_support_tables_speak_the_words_of_their_legend(heading: str, columns: slice) -> None:
    rows = table_rows(section(SUPPORT, heading))
    assert len(rows) >= 7
    for row in rows:
        assert set(row[columns]) <= WORDS, row
