"""Every event of docs/faults.md names the tests that show what happens, and they exist."""

from __future__ import annotations

import re

from tests.helpers.documents import ROOT, read, table_rows

PATH = ROOT / "docs" / "faults.md"


def test_every_event_has_tests_that_exist() -> None:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    known = {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.M)}
    rows = [row for row in table_rows(read(PATH)) if not row[0].startswith("*")]
    assert len(rows) > 50
    for event, _, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"{event} names no test"
        assert set(named) <= known, f"{event}: {set(named) - known} are not there"
