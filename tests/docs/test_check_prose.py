"""docs/check_prose.py: what it counts as a sentence, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import check_prose

LONG = " ".join(["word"] * 26) + "."


def texts(markdown: str) -> list[str]:
    return [sentence.text for sentence in check_prose.sentences(markdown)]


def test_sentences_end_at_points() -> None:
    assert texts("One. Two? Three!\nand four") == ["One.", "Two?", "Three! and four"]


def test_a_colon_before_a_capital_ends_a_sentence() -> None:
    assert texts("Look: Here it is.") == ["Look:", "Here it is."]


def test_numbers_and_abbreviations_end_nothing() -> None:
    assert len(texts("It has 0.5 bits, et al. Wrote more.")) == 1


@pytest.mark.parametrize(
    "markdown",
    [
        "```sh\nsome; code\n```",
        "| a; b | c |\n|---|---|",
        "# A heading; with a semicolon",
        "<!-- a comment; it is none -->",
        "![a picture; it is none](a.png)",
    ],
)
def test_what_is_not_prose(markdown: str) -> None:
    assert texts(markdown) == []


def test_items_are_paragraphs() -> None:
    assert texts("- one\n- two\n  goes on\n1. three") == ["one", "two goes on", "three"]


def test_code_and_links_are_one_word() -> None:
    (sentence,) = check_prose.sentences("Call `a b c` as [page](x.md) says.")
    assert sentence.num_words == 5


def test_findings_name_line_and_reason() -> None:
    found = check_prose.findings(f"Short.\n\n{LONG}\n\nOne; two.")
    assert found == [f"3: 26 words: {LONG}", "5: semicolon: One; two."]


def test_limit_is_inclusive() -> None:
    assert check_prose.findings(LONG, most_words=26) == []


def test_exit_code_tells_of_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    path.write_text("A short sentence.\n", encoding="utf-8")
    assert check_prose.main([str(path)]) == 0
    path.write_text("One; two.\n", encoding="utf-8")
    assert check_prose.main([str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 findings in 1 sentences"
