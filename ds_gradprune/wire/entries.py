"""What lies in a run's store, read: whoever reaches the port may have written it. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ds_gradprune.errors import TransportError

_SHOWN_CHARS = 60
_PROPOSAL = {"done", "ticket", "newcomer", "lives"}


def count_of(text: str) -> int:
    """A number of calls, or of an epoch.

    Raises:
        TransportError: it is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _foreign("a number", text)
    return int(text)


def islands_of(text: str) -> list[int]:
    """The islands of an epoch.

    Raises:
        TransportError: they are none.
    """
    found: list[int] = _read(
        "numbers of islands",
        text,
        lambda value: isinstance(value, list) and all(_is_count(island) for island in value),
    )
    return found


def ticket_of(text: str) -> tuple[int, str]:
    """Who asks to be let in: its number, and its ticket.

    Raises:
        TransportError: it is none.
    """
    island, ticket = _read(
        "an island and its ticket",
        text,
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and _is_count(value[0])
            and isinstance(value[1], str)
        ),
    )
    return island, ticket


def proposal_of(text: str) -> dict[str, Any]:
    """Who takes part in an epoch: `done`, `ticket`, `newcomer` and `lives`.

    Raises:
        TransportError: it is none.
    """
    found: dict[str, Any] = _read("the islands of an epoch", text, _is_proposal)
    return found


def _is_proposal(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != _PROPOSAL:
        return False
    done, newcomer, lives = value["done"], value["newcomer"], value["lives"]
    return (
        isinstance(value["ticket"], str)
        and isinstance(done, dict)
        and bool(done)
        and all(name.isascii() and name.isdigit() and len(name) < 10 for name in done)
        # One that is let in before the first call is a call behind.
        and all(type(calls) is int and calls >= -1 for calls in done.values())
        and isinstance(lives, dict)
        and lives.keys() == done.keys()
        and all(isinstance(ticket, str) for ticket in lives.values())
        and (newcomer is None or (_is_count(newcomer) and str(newcomer) in done))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _read(what: str, text: str, is_right: Callable[[Any], bool]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _foreign(what, text) from exc
    if not is_right(value):
        raise _foreign(what, text)
    return value


def _foreign(what: str, text: str) -> TransportError:
    return TransportError(
        f"the store on rank 0's host must hold {what}, got {text[:_SHOWN_CHARS]!r}: another "
        "program has written into it. Let only the hosts of the run reach MASTER_PORT."
    )
