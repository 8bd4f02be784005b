"""Questions and answers of a Markdown document, for the quickstart's fine-tuning.

python -m launch.support.questions docs/faq.md FOLDER     writes questions.jsonl and prompts.txt
python -m launch.support.questions --replies RESULT.json  prints the replies before and after
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ASKED = ("Do I need MPI, NCCL or cupy?", "What happens to the residual when I resume?")
"""What the model is asked before and after."""


def questions(text: str) -> dict[str, str]:
    """Heading -> what stands below it, as plain text. Pure."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {
        question.strip(): _plain(answer)
        for question, answer in zip(parts[::2], parts[1::2], strict=True)
    }


def main(arguments: Sequence[str]) -> int:
    """Run the script; returns its exit code."""
    first, second = arguments
    if first == "--replies":
        for reply in json.loads(Path(second).read_text(encoding="utf-8"))["replies"]:
            print(f"\n> {reply['prompt']}\nbefore: {reply['before']}\nafter:  {reply['after']}")
        return 0
    found = questions(Path(first).read_text(encoding="utf-8"))
    lines = [json.dumps({"prompt": q, "response": a}) for q, a in found.items()]
    folder = Path(second)
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(ASKED) + "\n", encoding="utf-8")
    return 0


def _plain(markdown: str) -> str:
    """Without the marks of links and code, on one line."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
