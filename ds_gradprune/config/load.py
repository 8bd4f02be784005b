"""From a DeepSpeed configuration to a checked block. Whatever is wrong with it is a ConfigError."""

from __future__ import annotations

import base64
import collections
import difflib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from ds_gradprune.config.model import BLOCK, GradientPruningConfig
from ds_gradprune.config.rules import cross_field_faults
from ds_gradprune.config.wording import name_of, path_of, sentence, shown
from ds_gradprune.errors import ConfigError

_UNREADABLE = (ValueError, OverflowError, RecursionError, IndexError)
"""What parsers raise at 1e999, at a deep nesting, at a text that is cut in a comment."""

_Twice = dict[int, tuple[dict[str, Any], list[str]]]
"""Identity of an object -> the object, which so lives on, and its keys that were given twice."""


def load_block(
    ds_config: Mapping[str, Any], total_steps: int | None = None
) -> GradientPruningConfig:
    """Validate the block of a parsed ds_config.json.

    Args:
        ds_config: the whole DeepSpeed configuration, already parsed.
        total_steps: optimizer steps of the run, if the caller knows them.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: the block is missing or wrong; lists every fault at once.
    """
    if not isinstance(ds_config, Mapping):
        raise ConfigError(f"the DeepSpeed configuration must be an object, got {shown(ds_config)}.")
    if BLOCK not in ds_config:
        near = difflib.get_close_matches(
            BLOCK,
            [name_of(key) for key in ds_config if key != "gradient_clipping"],
            n=1,
            cutoff=0.6,
        )
        hint = f' The key "{near[0]}" is not read: did you mean "{BLOCK}"?' if near else ""
        raise ConfigError(
            f'{BLOCK} must be present in the DeepSpeed configuration.{hint} Add "{BLOCK}": {{}} '
            f'for the defaults, or {{"enabled": false}} to train without pruning.'
        )
    block = ds_config[BLOCK]
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK} must be a JSON object, got {shown(block)}.")
    block = {name_of(key): item for key, item in block.items()}
    faults: list[str] = []
    faulty: set[str] = set()
    try:
        config = GradientPruningConfig.model_validate(block)
    except pydantic.ValidationError as exc:
        errors = exc.errors(include_url=False)
        faults = [sentence(error, GradientPruningConfig, BLOCK) for error in errors]
        faulty = {str(error["loc"][0]) for error in errors}
        # What is right in itself may still not fit together: that is said in the same message.
        sound = {key: value for key, value in block.items() if key not in faulty}
        config = GradientPruningConfig.model_validate(sound)
    faults += cross_field_faults(config, total_steps, faulty)
    if faults:
        raise ConfigError(faults)
    return config


def read_config(source: Any, loads: Callable[..., Any] = json.loads) -> dict[str, Any]:
    """The DeepSpeed configuration in any form that deepspeed.initialize takes.

    Args:
        source: a dict, the path of a file, or the file's text in base64.
        loads: parses what is not plain JSON, with `object_pairs_hook`; DeepSpeed's is hjson.loads.

    Returns:
        The parsed configuration; a dict is handed back as it is.

    Raises:
        ConfigError: it cannot be read, is no object, or gives a key twice.
    """
    if isinstance(source, dict):
        return source
    if isinstance(source, (str, os.PathLike)) and os.path.exists(source):
        try:
            with open(source, "rb") as file:
                text = file.read().decode("utf-8")
        except (OSError, UnicodeError) as exc:
            raise ConfigError(
                f"the DeepSpeed configuration {source} must be a text file in UTF-8: {exc}."
            ) from exc
        return _parse(text, str(source), loads)
    try:
        text = base64.b64decode(source, altchars=b"-_", validate=True).decode("utf-8")
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            "the DeepSpeed configuration must be a dict, the path of a file that exists, or the "
            f"file's text in base64, got {shown(source)}."
        ) from exc
    return _parse(text, "in base64", loads)


def _parse(text: str, name: str, loads: Callable[..., Any]) -> dict[str, Any]:
    """JSON first: what it reads, every parser reads alike."""
    twice: _Twice = {}

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            twice[id(found)] = (found, [key for key, count in counts.items() if count > 1])
        return found

    try:
        try:
            parsed = json.loads(text, object_pairs_hook=collect)
        except ValueError:
            twice.clear()
            parsed = loads(text, object_pairs_hook=collect)
    except _UNREADABLE as exc:
        why = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise ConfigError(
            f"the DeepSpeed configuration {name} cannot be read as JSON: {why}."
        ) from exc
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"the DeepSpeed configuration {name} must hold an object, got {shown(parsed)}."
        )
    faults = [
        f"{path} must be given once, but the configuration {name} gives it more than once. Keep "
        "one of them."
        for path in _paths(parsed, twice)
    ]
    if faults:
        raise ConfigError(faults)
    return parsed


def _paths(root: dict[str, Any], twice: _Twice) -> list[str]:
    """The full paths of the keys that were given twice."""
    found: list[str] = []
    waiting: list[tuple[tuple[int | str, ...], Any]] = [((), root)]
    while waiting and twice:
        place, value = waiting.pop()
        if isinstance(value, dict):
            _, keys = twice.get(id(value), (value, []))
            found += [path_of("", (*place, key)).removeprefix(".") for key in keys]
            waiting += [((*place, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [((*place, index), item) for index, item in enumerate(value)]
    return sorted(found)
