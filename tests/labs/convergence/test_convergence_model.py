"""What the laboratory trains: model, optimizer and text, against independent ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_gradprune.errors import DataError
from labs.convergence.adamw import AdamW
from labs.convergence.gpt import Gpt, Gradients
from labs.convergence.grid import Train
from labs.convergence.text import Text
from tests.labs.convergence.cases import SETTING, SHAPE, tokens


def test_workers_in_one_pass_equal_each_alone() -> None:
    gpt = SETTING.gpt
    together = Gradients(gpt, 3)
    for worker in range(3):
        together.weights[worker] = gpt.initial(worker)
    losses = together(tokens(0))
    for worker in range(3):
        alone = Gradients(gpt, 1)
        alone.weights[0] = gpt.initial(worker)
        loss = alone(tokens(0)[worker : worker + 1])
        torch.testing.assert_close(loss[0], losses[worker])
        torch.testing.assert_close(alone.gradient[0], together.gradient[worker])


def test_the_gradient_is_that_of_the_loss() -> None:
    gpt = SETTING.gpt
    one = Gradients(gpt, 1)
    one.weights[0] = gpt.initial(0)
    one(tokens(0)[:1])
    direction = torch.randn(gpt.numel, generator=torch.Generator().manual_seed(0))
    slope = float(one.gradient[0] @ direction)
    step = 1e-3
    ends = []
    for sign in (1, -1):
        views = gpt.views((gpt.initial(0) + sign * step * direction)[None])
        ends.append(float(gpt.losses(views, tokens(0)[:1])))
    # Central difference: the error is of second order in `step`, beside fp32's 1e-7 / step.
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_products_of_bf16_factors_are_near() -> None:
    near = Gpt(SHAPE.model_copy(update={"matmul": "bf16"}), 70)
    both = [Gradients(SETTING.gpt, 2), Gradients(near, 2)]
    for one in both:
        one.weights.copy_(near.initial(0).expand(2, -1))
        one(tokens(0, 2))
    exact, rough = both[0].gradient[0], both[1].gradient[0]
    # A factor is off by 2**-9 at most, at random; half a dozen layers there and back.
    assert 0.0 < float((exact - rough).norm() / exact.norm()) < 0.03


def test_products_of_bf16_factors_do_not_need_their_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near = Gpt(SHAPE.model_copy(update={"matmul": "bf16"}), 70)
    found = []
    for has in (True, False):
        monkeypatch.setattr("labs.convergence.gpt.HAS_BF16_PRODUCTS", has)
        one = Gradients(near, 2)
        one.weights.copy_(near.initial(0).expand(2, -1))
        found.append((one(tokens(0, 2)), one.gradient))
    # Sums in another order, which now and then round to the neighbour: far below 2**-9 together.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 5e-3


def test_the_model_cannot_see_what_it_predicts() -> None:
    views = SETTING.gpt.views(SETTING.gpt.initial(0)[None])
    first = tokens(0)[:1]
    other = first.clone()
    other[..., -2] = (other[..., -2] + 1) % 70  # the last input; earlier losses must not move
    cut = [SETTING.gpt.losses(views, t[..., :-2]) for t in (first, other)]
    assert torch.equal(*cut)
    assert not torch.equal(SETTING.gpt.losses(views, first), SETTING.gpt.losses(views, other))


def test_adamw_is_torchs() -> None:
    decayed = torch.tensor([1.0] * 5 + [0.0] * 3)
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    theirs = [torch.nn.Parameter(row.clone()) for row in (weights[1, :5], weights[1, 5:])]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    ours = AdamW(2, decayed, Train(beta2=0.95, weight_decay=0.1))
    for step in range(5):
        slope = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))
        theirs[0].grad, theirs[1].grad = slope[1, :5].clone(), slope[1, 5:].clone()
        adamw.step()
        ours.step(weights, slope, 0.01)
    torch.testing.assert_close(weights[1], torch.cat([p.detach() for p in theirs]))


def test_text_is_cut_and_dealt_out(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(50)) * 40)
    text = Text(path, 16)
    assert text.vocab_size == 50
    batch = text.batches([0], 4, 2, 4).of(3)[0]
    assert batch.shape == (2, 4, 17)
    assert torch.equal(batch, text.batches([0], 4, 2, 4).of(3)[0])
    assert not torch.equal(batch, text.batches([1], 4, 2, 4).of(3)[0])
    assert torch.equal((batch[..., 1:] - batch[..., :-1]) % 50, torch.ones_like(batch[..., 1:]))
    whole = text.validation()
    assert whole.shape == (12, 17)  # 199 predicted bytes of the last 200
    assert int(whole[0, 0]) == 1800 % 50
    assert text.validation(3).shape == (3, 17)
    path.write_bytes(b"a" * 100)
    with pytest.raises(DataError, match="at least 340 bytes for sequences of 16, got 100"):
        Text(path, 16)
    with pytest.raises(DataError, match=r"must be a readable file, got .*absent"):
        Text(tmp_path / "absent", 16)
