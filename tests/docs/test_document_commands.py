"""Code blocks of the documents: each has a language, parses, and names what there is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from ds_gradprune.config import load_block
from tests.helpers.documents import DOCUMENTS, ROOT, CodeBlock, code_blocks

LAUNCH_README = ROOT / "launch" / "README.md"
BLOCKS = [block for path in DOCUMENTS for block in code_blocks(path)]
LANGUAGES = {"sh", "json", "python", "diff", "text"}


def of_language(language: str) -> list[CodeBlock]:
    return [block for block in BLOCKS if block.language == language]


def commands(path: Path) -> list[str]:
    """Lines of a document's shell blocks, continued lines joined."""
    blocks = [block for block in code_blocks(path) if block.language in ("sh", "")]
    return "\n".join(block.code for block in blocks).replace("\\\n", " ").splitlines()


def flags_of(script: Path) -> str:
    """Text in which the flags of a script of launch/ are defined."""
    support = sorted((ROOT / "launch" / "support").glob("*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in [script, *support])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_has_a_language(block: CodeBlock) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", of_language("sh"), ids=str)
def test_shell_parses(block: CodeBlock) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.code, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_parses(block: CodeBlock) -> None:
    ast.parse(block.code)


@pytest.mark.parametrize("block", of_language("json"), ids=str)
def test_json_is_a_configuration_that_is_accepted(block: CodeBlock) -> None:
    config = json.loads(block.code)
    if "gradient_pruning" in config:
        load_block(config)


@pytest.mark.parametrize("path", [*DOCUMENTS, LAUNCH_README], ids=lambda path: path.name)
def test_flags_of_our_scripts_exist(path: Path) -> None:
    for command in commands(path):
        for name in re.findall(r"launch/(\w+\.py) ", command):
            known = flags_of(ROOT / "launch" / name)
            arguments = command.split(f"launch/{name} ", 1)[1]
            for flag in re.findall(r"(?<!\S)--[a-z_-]+", arguments):
                assert f'"{flag}"' in known, f"launch/{name} has no {flag}"


def test_the_readme_has_commands_to_check() -> None:
    ours = [command for command in commands(ROOT / "README.md") if "launch/" in command]
    assert len(ours) >= 3
