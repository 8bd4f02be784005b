"""README.md: a reader with two minutes, and a project that is as it says."""

from __future__ import annotations

import re

import pytest

from tests.helpers.documents import ROOT, code_blocks, read, table_rows

README = ROOT / "README.md"
MOST_LINES = 200

HEADINGS = (
    "When it pays",
    "Limits",
    "Install",
    "Quickstart",
    "Add it to your script",
    "Result",
    "How it works",
    "More",
    "Tests",
)


def test_it_is_short() -> None:
    assert len(read(README).splitlines()) <= MOST_LINES


def test_what_decides_comes_first() -> None:
    found = re.findall(r"^## (.+)$", read(README), flags=re.MULTILINE)
    assert tuple(found) == HEADINGS


def test_limits_are_five() -> None:
    text = read(README).split("## Limits", 1)[1].split("\n## ", 1)[0]
    assert len(re.findall(r"^- ", text, flags=re.MULTILINE)) == 5


def test_when_it_pays_has_an_answer_in_every_row() -> None:
    text = read(README).split("<!-- when it pays", 1)[1].split("<!-- end of when", 1)[0]
    rows = table_rows(text)
    assert {row[3] for row in rows} <= {"yes", "yes, pin the density", "no", "unknown"}
    assert len(rows) >= 8


def test_every_document_is_linked() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in read(README), f"README.md does not link docs/{path.name}"


def test_versions_are_the_pinned_ones() -> None:
    text = read(README).split("<!-- tested versions: checked against constraints.txt -->", 1)[1]
    tested = text.split("<!--", 1)[0].replace("CPython 3.11", "")
    pins = dict(line.split("==") for line in constraints())
    named = dict(re.findall(r"([a-z]\w+)\s(\d[\d.]*\d)", tested))
    assert len(named) >= 5
    assert named == {name: pins[name] for name in named}


def test_constraints_pin_no_local_build_and_no_host() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in constraints())


def test_the_test_command_is_the_script() -> None:
    assert "`./launch/test.sh`" in read(README)
    assert (ROOT / "launch" / "test.sh").is_file()


@pytest.mark.parametrize("name", ["initialize", "register"])
def test_diffs_call_what_the_package_has(name: str) -> None:
    import ds_gradprune

    diffs = "".join(block.code for block in code_blocks(README) if block.language == "diff")
    assert f"ds_gradprune.{name}(" in diffs
    assert callable(getattr(ds_gradprune, name))


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
