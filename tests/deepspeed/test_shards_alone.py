"""Shards without processes: where optimizers of stage 0 keep weights, and what is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from ds_gradprune.errors import CheckpointError, UnsupportedError

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer  # noqa: E402

from ds_gradprune.deepspeed.asked import refused_by  # noqa: E402
from ds_gradprune.deepspeed.shards import make_shards  # noqa: E402
from ds_gradprune.deepspeed.spans import balanced  # noqa: E402
from ds_gradprune.deepspeed.zero12 import Zero12  # noqa: E402
from ds_gradprune.train.piece import Shards  # noqa: E402
from ds_gradprune.train.shared_weights import SharedWeights  # noqa: E402


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """A matrix, a bias, and a matrix that is frozen."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    module[1].weight.requires_grad_(False)
    return module.to(dtype)


def shards(module: torch.nn.Module, optimizer: Any, shard: int = 0, num_shards: int = 1) -> Shards:
    engine = types.SimpleNamespace(
        module=module,
        optimizer=optimizer,
        param_names={p: name for name, p in module.named_parameters()},
    )
    groups: Any = types.SimpleNamespace(inner=None, island=0, shard=shard, num_shards=num_shards)
    return make_shards(engine, groups, 15)


def fused(module: torch.nn.Sequential) -> FP16_Optimizer:
    """What DeepSpeed makes of bf16 and FusedAdam, around an optimizer that needs no compiler."""
    weight, bias = module[0].weight, module[0].bias
    inner = torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}], lr=0.1)
    return FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16, static_loss_scale=1.0)


def test_fp32_weights_are_the_models_own() -> None:
    module = model()
    found = shards(module, torch.optim.SGD(module.parameters(), lr=0.1))
    pieces = found.pieces()
    assert [p.own.data_ptr() for p in pieces] == [
        module[0].weight.data_ptr(),
        module[0].bias.data_ptr(),
    ]
    assert [(p.key, p.pruned) for p in pieces] == [(("0.weight", 0), True), (("0.bias", 0), False)]
    assert [p.name for p in found.every_piece()] == ["0.weight", "0.bias", "1.weight"]
    pieces[0].own.fill_(7.0)
    found.publish()
    assert module[0].weight.eq(7.0).all()


def test_views_are_kept_until_the_weights_move_or_others_are_trained() -> None:
    """They were made fifteen times a step, which took a fifth of the codec's time."""
    module = model()
    found = shards(module, torch.optim.SGD(module.parameters(), lr=0.1))
    weights = SharedWeights(found)
    pieces, bound = found.pieces(), weights.bound()
    assert found.pieces() is pieces
    assert weights.bound() is bound
    module[0].weight.data = torch.full((5, 3), 2.0)
    assert found.pieces()[0].own.eq(2.0).all()
    assert weights.bound()[0].own[0].eq(2.0).all()
    assert [piece.name for piece in found.pieces()] == ["0.weight", "0.bias"]
    module[1].weight.requires_grad_(True)
    assert [piece.name for piece in found.pieces()] == ["0.weight", "0.bias", "1.weight"]
    assert sum(b.layout.numel for b in weights.bound()) == 30


def test_flat_groups_are_cut_into_the_parameters() -> None:
    module = model(torch.bfloat16)
    found = shards(module, fused(module))
    assert found.has_masters
    assert [(p.key, p.own.numel()) for p in found.pieces()] == [
        (("0.weight", 0), 15),
        (("0.bias", 0), 5),
    ]
    for number, piece in enumerate(found.pieces()):
        piece.own.fill_(1.0 + number + 2.0**-12)
    found.publish()
    assert module[0].weight.eq(1.0).all()  # rounded to bf16
    assert module[0].bias.eq(2.0).all()
    assert found.pieces()[1].own[0] == 2.0 + 2.0**-12


def test_ranks_share_what_is_trained_and_what_is_frozen() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ranks = [shards(module, optimizer, shard, 3) for shard in range(3)]
    trained = [sum(p.own.numel() for p in rank.pieces()) for rank in ranks]
    every = [sum(p.own.numel() for p in rank.every_piece()) for rank in ranks]
    assert trained == [6, 7, 7]
    assert every == [9, 10, 11]
    keys = [piece.key for rank in ranks for piece in rank.pieces()]
    assert keys == [("0.weight", 0), ("0.weight", 6), ("0.weight", 13), ("0.bias", 0)]


def test_shares_are_whole_and_balanced() -> None:
    assert balanced([5, 0, 3], 2) == [[(0, 0, 4)], [(0, 4, 5), (2, 0, 3)]]
    assert balanced([1], 3) == [[], [], [(0, 0, 1)]]
    assert balanced([], 2) == [[], []]


def test_state_without_the_weights_goes_round() -> None:
    modules = model(torch.bfloat16), model(torch.bfloat16)
    one, other = (fused(module) for module in modules)
    for flat in one.fp32_groups_flat:
        flat.grad = torch.ones_like(flat)
    one.optimizer.step()
    state = shards(modules[0], one).state_dict()
    before = [flat.detach().clone() for flat in other.fp32_groups_flat]
    shards(modules[1], other).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.fp32_groups_flat, before, strict=True))
    moments = [
        [optimizer.optimizer.state[flat]["exp_avg"] for flat in optimizer.fp32_groups_flat]
        for optimizer in (one, other)
    ]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*moments, strict=True))


def test_a_state_of_other_tensors_changes_nothing() -> None:
    modules = model(torch.bfloat16), model(torch.bfloat16)
    found = [shards(module, fused(module)) for module in modules]
    state = found[0].state_dict()
    wanted = found[1].state_dict()["moments"][0]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match="has 1 tensors in 2 groups, this one 2 in 2"):
        found[1].load_state_dict(state | {"moments": state["moments"][:1]})
    moments = [{"exp_avg": torch.ones(15)}, {"exp_avg": torch.ones(4)}]
    with pytest.raises(CheckpointError, match="exp_avg has 4 elements, this optimizer's 5"):
        found[1].load_state_dict(state | {"moments": moments})
    assert torch.equal(found[1].state_dict()["moments"][0]["exp_avg"], wanted)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(UnsupportedError, match="not know where SimpleNamespace keeps its fp32"):
        shards(model(), types.SimpleNamespace())


def test_a_parameter_without_a_name_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"none like the one of shape \(2, 3\)"):
        shards(model(), optimizer)


def test_weights_that_are_not_fp32_are_refused() -> None:
    module = model(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"got torch\.bfloat16 for 0\.weight\. Set bf16"):
        shards(module, optimizer)


def test_weights_that_lie_apart_are_refused() -> None:
    module = model()
    module[0].weight.data = torch.ones(3, 5).t()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"0\.weight has strides \(1, 5\) for the shape"):
        shards(module, optimizer)


class MuonWithAuxAdam:
    """Named as DeepSpeed's, whose import compiles kernels."""


@pytest.mark.parametrize(("is_offloaded", "comes_first"), [(False, True), (True, False)])
def test_muon_at_stages_1_and_2_has_no_dense_warm_up(is_offloaded: bool, comes_first: bool) -> None:
    zero = types.SimpleNamespace(optimizer=MuonWithAuxAdam())
    found = types.SimpleNamespace(_optimizer=zero, _is_offloaded=is_offloaded)
    assert Zero12._muon_comes_first(found) is comes_first


def test_fp16_under_autocast_is_refused() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.torch_autocast_gradscaler = object()
    with pytest.raises(UnsupportedError, match="its scaler skips steps without a word"):
        shards(module, optimizer)


REFUSED = {
    "zero_hpz_partition_size": 2,
    "mics_shard_size": 2,
    "zero_quantized_gradients": True,
    "zenflow": {"topk_ratio": 0.1},
    "enable_sanity_checks": True,
    "offload_param": {"device": "nvme"},
    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_islands_cannot_serve_is_named(name: str) -> None:
    found = refused_by({"zero_optimization": {"stage": 3, name: REFUSED[name]}})
    assert len(found) == 1
    assert found[0].startswith(f"zero_optimization.{name}")


def test_what_islands_serve_is_not_refused() -> None:
    offload = {"device": "cpu", "ratio": 1.0, "pin_memory": True}
    zero = {"stage": 3, "offload_optimizer": offload, "zero_hpz_partition_size": 1}
    assert refused_by({"zero_optimization": zero}) == []
    assert refused_by({}) == []
    sampling = {"curriculum_learning": {"enabled": True}}
    found = refused_by({"data_efficiency": {"data_sampling": sampling}})
    assert found == ["data_efficiency.data_sampling.curriculum_learning"]
    assert refused_by({"tensor_parallel": {"autotp_size": 2}}) == ["tensor_parallel.autotp_size"]
