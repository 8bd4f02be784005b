"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from docs import api  # noqa: E402


def test_the_page_is_what_the_script_writes() -> None:
    written = api.PAGE.read_text(encoding="utf-8")
    assert written == api.page(), "docs/api.md is out of date. Run: python docs/api.py --write"


def test_every_public_name_is_on_the_page() -> None:
    import ds_gradprune

    page = api.page()
    assert all(f"\n### ds_gradprune.{name}\n" in page for name in ds_gradprune.__all__)
    assert all(f"\n### {name}\n" in page for name in api._FOR_USERS)


def test_sections_become_lists() -> None:
    doc = "One.\n\nArgs:\n    a: first,\n        goes on.\n    b, c: others."
    doc += "\n\nReturns:\n    Words of\n    two lines."
    assert api.text_of(doc) == (
        "One.\n\n*Args*\n\n- `a`: first, goes on.\n- `b, c`: others.\n\n"
        "*Returns*\n\n- Words of two lines."
    )
