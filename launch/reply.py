"""Reply with a trained model.

    python launch/reply.py --model runs/first/model --prompt "The for statement"
    echo "The for statement" | python launch/reply.py --model runs/first/model
    python launch/reply.py --model runs/first/model          (a conversation)

Only replies go to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:
    # The root instead of this folder: launch, textgen and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"

from ds_gradprune.errors import ConfigError, GradPruneError

from .support.flags import ScriptParser

if TYPE_CHECKING:
    from textgen.generate import Replier, Sampling


def parser() -> ScriptParser:
    """The flags, with the names that transformers gives them."""
    flags = ScriptParser("Reply with a trained model.")
    flags.add_argument(
        "--model", required=True, help="transformers folder, folder of a run, or hub name"
    )
    flags.add_argument(
        "--prompt", help="reply to this and end (default: stdin, or a conversation on a terminal)"
    )
    flags.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 always takes the likeliest token (default: 0.8)",
    )
    flags.add_argument(
        "--top_p", type=float, default=0.95, help="probability drawn from (default: 0.95)"
    )
    flags.add_argument(
        "--max_new_tokens", type=int, default=80, help="length of a reply (default: 80)"
    )
    flags.add_argument("--seed", type=int, help="equal seeds, equal replies (default: random)")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    try:
        flags = parser().parse_args(arguments)
        with _stdout_kept_clean():
            replier, sampling = _open(flags)
        _reply(replier, sampling, flags.prompt)
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _open(flags: argparse.Namespace) -> tuple[Replier, Sampling]:
    from textgen.generate import Replier, Sampling
    from textgen.model import model_of, quiet_transformers

    quiet_transformers()
    sampling = Sampling(flags.temperature, flags.top_p, flags.max_new_tokens, flags.seed)
    return Replier.load(model_of(flags.model)), sampling


def _reply(replier: Replier, sampling: Sampling, prompt: str | None) -> None:
    if prompt is not None:
        _print_reply(replier, sampling, prompt)
    elif not sys.stdin.isatty():
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"stdin must be UTF-8 text: {exc.reason}.") from exc
        _print_reply(replier, sampling, text.rstrip("\n"))
    else:
        _talk(replier, sampling)


def _talk(replier: Replier, sampling: Sampling) -> None:
    """A conversation: every prompt sees what was said before, as far as the context reaches."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a half-deleted letter should not end the talk
    print("An empty line or Ctrl-D ends.", file=sys.stderr)
    said = ""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        said += line
        said += _print_reply(replier, sampling, said) + "\n\n"


def _print_reply(replier: Replier, sampling: Sampling, prompt: str) -> str:
    """Show a reply while it comes; return it."""
    text = replier.reply(prompt, sampling, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    return text


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send to stderr what libraries print while a model is opened.

    DeepSpeed's logger keeps the stdout that it finds when it is imported, so it stays redirected.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    sys.exit(main())
