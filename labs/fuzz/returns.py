"""What an island that comes back reads, damaged: entries of the store, frames, and the state."""

from __future__ import annotations

import json
import random
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist

from ds_gradprune.deepspeed.agree import Facts, check_beside, facts_text
from ds_gradprune.train.parcel import Parcel, opened
from ds_gradprune.wire import entries
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.carry import receive
from ds_gradprune.wire.door import Candidate, Door
from ds_gradprune.wire.hand_on import bytes_of
from ds_gradprune.wire.transport import Transport, Work
from labs.fuzz.damage import damaged

MOST_BYTES = 2**20
SEALED_SHARE = 0.7
"""Parcels with a checksum that fits: from a faulty sender, and not from a bad cable."""

_TICKET = "0123456789abcdef"
_PROPOSAL = {"done": {"0": 4, "2": 4}, "ticket": _TICKET, "newcomer": 2}
PROPOSAL = json.dumps(_PROPOSAL | {"lives": {"0": "", "2": _TICKET}})
ENTRIES = {
    "ask": (Candidate(1, "0123456789abcdef").as_json(), entries.ticket_of),
    "now": ("[0, 2]", entries.islands_of),
    "4/members": (PROPOSAL, entries.proposal_of),
    "let_in": ("12", entries.count_of),
}
FACTS = Facts({"torch": "2", "seed": "1"}, {"parameter": ["a (3, 4)", "b (2,)"]})
STATE: dict[str, Any] = {
    "counts": [(1, 2.5, None, True), {"global_steps": 7}],
    "own": {"('w', 0)": torch.arange(12, dtype=torch.float32).view(3, 4)},
    "moments": [torch.arange(5, dtype=torch.bfloat16), torch.tensor(3, dtype=torch.int64)],
    "told": {"since": (0, 1), "text": "é"},
}
SCRAPS = (
    b"[", b"]", b"{", b"}", b'"', b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000, b"0.5",
    b"\0", b"\xff\xfe", b"\\ud800", b"[" * 100_000, b'{"tensor": 99}', b'{"items": [[[], 1]]}',
    b"[[1, 2], 3]", b"4294967296", b"18446744073709551616", b'"torch.float32"', b"",
)  # fmt: skip


class _Given(Transport):
    """Sums are what is given, one after the other; nothing travels."""

    def __init__(self, sums: list[torch.Tensor]) -> None:
        self.rank, self.world_size, self.took_part = 1, 2, (0, 1)
        self._sums = sums

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """Nobody asks."""
        raise NotImplementedError

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Nobody asks."""
        raise NotImplementedError

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """Nobody asks."""
        raise NotImplementedError

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The next of what is given, as far as it goes."""
        given = self._sums.pop(0) if self._sums else torch.zeros(0, dtype=tensor.dtype)
        flat, given = tensor.view(-1), given.view(tensor.dtype)[: tensor.numel()]
        flat[: len(given)] = given

    def close(self) -> None:
        """Nothing."""


def attempt(rng: random.Random) -> None:
    """One damaged thing, on the way of an island that comes back.

    Args:
        rng: decides which and how.

    Raises:
        GradPruneError: it was refused.
    """
    rng.choice((_entry, _door, _facts, _handed_on, _frames, _frames))(rng)


def _entry(rng: random.Random) -> None:
    whole, read = rng.choice([*ENTRIES.values()])
    read(_mutated(rng, whole.encode()).decode(errors="replace"))


def _door(rng: random.Random) -> None:
    """The thread that shows life also looks at the door: nothing there may end it."""
    store = dist.HashStore()  # type: ignore[attr-defined] # torch
    store.set("ask", _mutated(rng, ENTRIES["ask"][0].encode()))
    store.set("asks/0123456789abcdef", _mutated(rng, b"3"))
    door = Door(Bounded(store))
    door.look([0, 2])
    door.look([0, 2])


def _facts(rng: random.Random) -> None:
    text = _mutated(rng, facts_text(FACTS).encode()).decode(errors="replace")
    check_beside(FACTS, text)


def _handed_on(rng: random.Random) -> None:
    length = rng.choice((-1, -(2**63), 2**63 - 1, 2**50, 0, 3, 9))
    data = torch.frombuffer(bytearray(rng.randbytes(12)), dtype=torch.int32)
    transport = _Given([torch.tensor([length]), data])
    bytes_of(transport, torch.empty(0, dtype=torch.uint8), is_source=False)


def _frames(rng: random.Random) -> None:
    parcel = Parcel(STATE)
    data = torch.empty(parcel.nbytes, dtype=torch.uint8)
    parcel.fill(data, 0)
    raw = data.numpy().tobytes()
    text, tensors = raw[: len(parcel.text)], raw[len(parcel.text) :]
    text, tensors = _mutated(rng, text), (tensors, _mutated(rng, tensors))[rng.randrange(2)]
    whole = text + tensors
    crc = google_crc32c.value(whole) if rng.random() < SEALED_SHARE else parcel.crc
    head = [len(text), len(whole), crc]
    if rng.random() < 0.2:
        head[rng.randrange(3)] = rng.choice((-1, 0, 1, 2**20 + 1, 2**62, -(2**63), 2**63 - 1))
    padded = whole + bytes(-len(whole) % 4)
    pieces = torch.frombuffer(bytearray(padded), dtype=torch.uint8) if padded else data[:0]
    crew: Any = _Given([torch.tensor(head, dtype=torch.int64), pieces])
    opened(*receive(crew, MOST_BYTES))


def _mutated(rng: random.Random, data: bytes) -> bytes:
    return damaged(rng, data, SCRAPS, 3)
