"""Tokens on disk: complete or absent; batches: disjoint, deterministic, without state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.errors import DataError
from textgen import data as module
from textgen.data import START, Position, TokenData, read_meta, write_tokens

SEQ_LEN = 8
FROZEN = [268, 292, 60, 604, 228, 524, 820, 380]


def filled(folder: Path, num_tokens: int, vocab_size: int = 60_000) -> Path:
    """A folder whose tokens count up, so that a window shows where it lies."""
    tokens = np.arange(num_tokens, dtype=np.uint32) % vocab_size
    write_tokens(folder, np.array_split(tokens, 3), vocab_size, "counting")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("tokens"), 1000)


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_integers_are_as_wide_as_the_vocabulary_needs(
    tmp_path: Path, vocab_size: int, width: int
) -> None:
    last = np.array([0, vocab_size - 1], dtype=np.uint32)
    meta = write_tokens(tmp_path, [last], vocab_size, "text")
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * width
    assert np.fromfile(tmp_path / "tokens.bin", dtype=meta.dtype).tolist() == last.tolist()


def test_written_description_is_read_back(tmp_path: Path) -> None:
    assert read_meta(tmp_path) is None
    meta = write_tokens(tmp_path / "new", [np.arange(5, dtype=np.uint32)], 300, "text")
    assert read_meta(tmp_path / "new") == meta
    assert meta.num_tokens == 5
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokens.bin", "tokens.json"]


def test_digest_depends_on_the_tokens_alone(tmp_path: Path) -> None:
    tokens = np.arange(9, dtype=np.uint32)
    whole = write_tokens(tmp_path / "a", [tokens], 300, "a")
    parts = write_tokens(tmp_path / "b", [tokens[:2], tokens[2:]], 300, "b")
    other = write_tokens(tmp_path / "c", [tokens + 1], 300, "c")
    assert whole.digest == parts.digest != other.digest


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"every token must be below 300, got 300"):
        write_tokens(tmp_path, [np.array([1, 300], dtype=np.uint32)], 300, "text")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file/tokens must be writable"):
        write_tokens(tmp_path / "file" / "tokens", [np.arange(3, dtype=np.uint32)], 9, "text")


def test_cut_token_file_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 100)
    path = tmp_path / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"must hold 100 tokens, but was cut"):
        TokenData(tmp_path, SEQ_LEN, 0)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"num_tokens": 5})])
def test_damaged_description_is_refused(tmp_path: Path, content: str) -> None:
    filled(tmp_path, 100)
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(DataError, match=r"tokens\.json must describe the token file"):
        read_meta(tmp_path)


def test_absent_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold a token file, but has none"):
        TokenData(tmp_path, SEQ_LEN, 0)


# --- batches --------------------------------------------------------------------------------------


def windows(
    data: TokenData,
    steps: range,
    micro_steps: int,
    micro_batch: int,
    world: int,
    since: Position = START,
) -> list:
    """First tokens of all windows of some steps, over all ranks."""
    begins = []
    for step in steps:
        for micro_step in range(micro_steps):
            for rank in range(world):
                rows = data.sample_batch(
                    step,
                    micro_step,
                    micro_steps=micro_steps,
                    micro_batch=micro_batch,
                    rank=rank,
                    world_size=world,
                    since=since,
                )
                assert rows.shape == (micro_batch, SEQ_LEN)
                assert rows.dtype == torch.int64
                assert (rows[:, 1:] - rows[:, :-1] == 1).all()  # consecutive tokens
                begins += rows[:, 0].tolist()
    return begins


@given(
    num_tokens=st.integers(150, 1000),
    seed=st.integers(0, 1 << 31),
    micro_steps=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    world=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_no_window_is_used_twice_in_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    seed: int,
    micro_steps: int,
    micro_batch: int,
    world: int,
    epoch: int,
) -> None:
    data = TokenData(filled(tmp_path_factory.mktemp("t"), num_tokens), SEQ_LEN, seed)
    per_step = micro_steps * micro_batch * world
    if data.num_windows < per_step:
        with pytest.raises(DataError, match=f"one global batch of {per_step} sequences"):
            data.check_batch(per_step)
        return
    length = data.num_windows // per_step
    begins = windows(
        data, range(epoch * length, (epoch + 1) * length), micro_steps, micro_batch, world
    )
    # Equal remainders: all windows of an epoch are shifted alike, so no two of them overlap.
    assert len(set(begins)) == len(begins)
    assert len({begin % SEQ_LEN for begin in begins}) == 1
    held_out = max(SEQ_LEN, int(num_tokens * module.VALIDATION_PART))
    assert max(begins) + SEQ_LEN <= num_tokens - held_out
    assert len(begins) > data.num_windows - per_step


def test_batches_depend_on_the_position_alone(folder: Path) -> None:
    walked, jumped = TokenData(folder, SEQ_LEN, 7), TokenData(folder, SEQ_LEN, 7)
    all_steps = [windows(walked, range(step, step + 1), 2, 2, 2) for step in range(40)]
    for step in (39, 0, 15):  # out of order, epochs apart
        assert windows(jumped, range(step, step + 1), 2, 2, 2) == all_steps[step]


def test_runs_of_changing_size_use_every_window_of_an_epoch_once(folder: Path) -> None:
    """2 -> 3 -> 1 -> 4 ranks: what one size has not used, the next one uses."""
    data, since, begins = TokenData(folder, SEQ_LEN, 7), Position(), list[int]()
    for world, steps in ((2, 2), (3, 1), (1, 3), (4, 1)):
        begins += windows(data, range(since.step, since.step + steps), 1, 1, world, since)
        since = data.position(since.step + steps, world, since)
    assert since == Position(7, 0, 14)
    rest = data.num_windows - 14
    begins += windows(data, range(7, 7 + rest), 1, 1, 1, since)
    assert len(set(begins)) == len(begins) == data.num_windows
    assert len({begin % SEQ_LEN for begin in begins}) == 1
    # The next epoch begins as if the size had never changed.
    assert data.position(7 + rest, 1, since) == Position(7 + rest, 1, 0)


@given(steps=st.integers(0, 100), at=st.integers(0, 100), world=st.integers(1, 6))
def test_a_position_taken_over_by_a_run_of_the_same_size_changes_nothing(
    folder: Path, steps: int, at: int, world: int
) -> None:
    data = TokenData(folder, SEQ_LEN, 3)
    since = data.position(at, world)
    assert data.position(at + steps, world, since) == data.position(at + steps, world)


def test_seeds_and_epochs_order_the_windows_differently(folder: Path) -> None:
    first, second = TokenData(folder, SEQ_LEN, 1), TokenData(folder, SEQ_LEN, 2)
    length = first.num_windows
    assert windows(first, range(length), 1, 1, 1) != windows(second, range(length), 1, 1, 1)
    again = windows(first, range(length, 2 * length), 1, 1, 1)
    assert windows(first, range(length), 1, 1, 1) != again


def test_order_is_frozen(folder: Path) -> None:
    # Philox's raw stream is fixed by numpy's compatibility promise; a change here would make every
    # run that is resumed continue on other data.
    assert windows(TokenData(folder, SEQ_LEN, 7), range(2), 1, 2, 2) == FROZEN


def test_text_shorter_than_two_sequences_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 15)
    with pytest.raises(DataError, match=r"two sequences of 8 tokens.* gives 15 tokens"):
        TokenData(tmp_path, SEQ_LEN, 0)
    filled(tmp_path, 16)
    assert TokenData(tmp_path, SEQ_LEN, 0).num_windows == 1


def test_text_shorter_than_a_global_batch_is_refused(tmp_path: Path) -> None:
    data = TokenData(filled(tmp_path, 100), SEQ_LEN, 0)
    with pytest.raises(DataError, match=r"global batch of 99 sequences of 8 tokens, but gives 10"):
        data.sample_batch(0, 0, micro_steps=1, micro_batch=99, rank=0, world_size=1)


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_validation_sequences_are_the_same_for_any_number_of_ranks(
    tmp_path: Path, world: int
) -> None:
    data = TokenData(filled(tmp_path, 4000), SEQ_LEN, 0)
    shares = [list(data.validation_batches(3, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # every rank makes as many calls
    counted = [
        begin
        for share in shares
        for batch in share
        if batch.num_sequences
        for begin in batch.tokens[:, 0].tolist()
    ]
    assert sum(batch.num_sequences for share in shares for batch in share) == len(counted)
    assert sorted(counted) == list(range(3800, 4000, SEQ_LEN))  # the last 5 %, each once


def test_validation_is_bounded_and_spread(tmp_path: Path) -> None:
    data = TokenData(filled(tmp_path, 40_000), SEQ_LEN, 0)
    rows = torch.cat([batch.tokens for batch in data.validation_batches(10, 0, 1)])
    assert len(rows) == module.VALIDATION_WINDOWS
    assert rows[0, 0] == 38_000
    assert rows[-1, 0] > 39_900
