"""The laboratory of fine-tuning: its model is transformers' Llama, and its runs end in a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from labs.tuned import __main__ as command
from labs.tuned.llama import Llama

CONTEXT = 16


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_theta=500.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_gradients_are_those_of_transformers(model: Any, lora: bool) -> None:
    tokens = torch.randint(0, 97, (2, 3, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    ours = Llama(model, CONTEXT, matmul="fp32", lora=lora, device="cpu")
    rows = ours.initial(0)[None].repeat(2, 1).requires_grad_()
    losses = ours.losses(ours.views(rows), tokens)
    (slopes,) = torch.autograd.grad(losses.sum(), rows)
    expected = []
    for worker in range(2):
        logits = model(input_ids=tokens[worker, :, :-1]).logits
        expected.append(F.cross_entropy(logits.flatten(0, 1), tokens[worker, :, 1:].flatten()))
    close = {"rtol": 2e-4, "atol": 2e-4} if lora else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses.detach(), torch.stack(expected).detach(), **close)
    if not lora:
        names = dict(model.named_parameters())
        theirs = torch.autograd.grad(expected[1], [names[name] for name in ours._names])
        flat = torch.cat([slope.reshape(-1) for slope in theirs])
        torch.testing.assert_close(slopes[1], flat, rtol=1e-3, atol=1e-6)
    else:
        assert ours.numel < sum(p.numel() for p in model.parameters())
        views = ours.views(slopes)
        assert all(not view.any() for view in views[::2])  # B is zero, so A has no slope yet
        assert all(view.any() for view in views[1::2])


def test_a_run_ends_in_gaps_to_dense_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (number * number) % 23) for number in range(3000)))
    arguments = ["--tiny", "--text", str(text), "--out", str(tmp_path / "runs.jsonl")]
    arguments += ["--seeds", "1", "--steps", "12", "--rows", "1", "--length", "16", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["tuned", *arguments])
    command.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, rounds = document["rows"]
    assert (dense["method"], dense["gap_percent"]) == ("dense", 0.0)
    assert rounds["method"] == "every 10"
    assert 0 < rounds["bits"] < 0.2
    assert rounds["gap_percent"] != 0.0


def test_runs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--text", "x", "--out", "y"]
    (job,) = command.parse([*files, "--runs", "lora: every step"]).runs
    assert (job.kind, job.methods, job.factors) == ("lora", ("every step",), (1.0,))
    with pytest.raises(SystemExit, match="2"):
        command.parse([*files, "--runs", "half: every step"])
    assert "must be 'full: METHOD' or 'lora: METHOD', got 'half: every step'" in (
        capsys.readouterr().err
    )
