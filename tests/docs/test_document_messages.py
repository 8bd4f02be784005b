"""Messages that docs/troubleshooting.md quotes are those that the code raises or logs."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.documents import ROOT, prose

FOREIGN = {
    "OneBitAdam is not a supported DeepSpeed Optimizer": "DeepSpeed",
    "terminate called without an active exception": "the C++ library",
}
"""Messages of others -> whose they are."""

VARIABLE = r"\.\.\.|\b(?:rank )?\d+\b"
"""What a document writes where the code puts in a value."""

FEWEST_WORDS, FEWEST_CHARS = 3, 4


def quoted() -> list[str]:
    """Code spans of several words that are no code."""
    spans = re.findall(r"`([^`]+)`", prose(ROOT / "docs" / "troubleshooting.md"))
    several = [span for span in spans if len(span.split()) >= FEWEST_WORDS]
    return [span for span in several if not re.match(r"[{\"]|p\.data|apt ", span)]


def literals() -> str:
    """All texts of the code, the values in them as a line's end."""
    texts: list[str] = []
    for folder in ("ds_gradprune", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "\n" for v in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"\{[^{}]*\}", "\n", node.value))
    return "\n".join(texts)


TEXTS = literals()


@pytest.mark.parametrize("message", sorted(set(quoted()) - set(FOREIGN)))
def test_message_is_in_the_code(message: str) -> None:
    plain = re.sub(r"gradient_pruning(\.island\.ranks)?", "...", message)
    parts = [part.strip() for part in re.split(VARIABLE, plain)]
    parts = [part for part in parts if len(part) >= FEWEST_CHARS]
    assert parts
    missing = [part for part in parts if part not in TEXTS]
    assert missing == []


def test_messages_of_others_are_quoted() -> None:
    assert set(FOREIGN) <= set(quoted())


def test_there_are_messages() -> None:
    assert len(quoted()) >= 20
