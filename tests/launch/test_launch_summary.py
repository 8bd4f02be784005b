"""The last line of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.support.summary import RESULT_KEYS, main


def test_last_line_is_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps({key: 1 for key in RESULT_KEYS} | {"more": 7}))
    reply = tmp_path / "reply.txt"
    reply.write_text("The for statement is used\n")
    assert main([str(tmp_path), str(reply), str(reply)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [*RESULT_KEYS, "replies"]
    assert document["replies"] == ["The for statement is used"] * 2


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_unfinished_run_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert "must be a finished run of launch/train.py" in capsys.readouterr().err
