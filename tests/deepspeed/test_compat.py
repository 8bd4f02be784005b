"""Names of DeepSpeed that we touch, and features that we refuse, each told in one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_gradprune.deepspeed import compat
from ds_gradprune.deepspeed.refusals import REFUSALS
from ds_gradprune.errors import UnsupportedError
from tests.helpers.fork_ranks import run_forked


class ScheduleFree(torch.optim.SGD):
    """An optimizer with two modes, as the schedule-free ones have."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def engine(stage: int = 0, optimizer: Any = None, **changed: Any) -> Any:
    """An object of a class with the real engine's methods, and the attributes of the tables."""

    class Fake(DeepSpeedEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def __del__(self) -> None: ...

        def zero_optimization_stage(self) -> int:
            return stage

        def is_deepcompile_enabled(self) -> bool:
            return bool(changed.get("deepcompile", False))

    made = Fake()
    for name in {name for key in compat.TABLES for table in compat.TABLES[key] for name in (
        table.attributes
    )}:  # fmt: skip
        made.__dict__[name] = 0
    optimizer = optimizer or torch.optim.SGD([torch.zeros(1)], lr=0.1)
    made.__dict__ |= {
        "basic_optimizer": optimizer, "optimizer": optimizer, "gradient_average": True,
        "enable_backward_allreduce": True, "torch_autocast_z0_gradscaler": None,
        "module": torch.nn.Linear(1, 1),
    }  # fmt: skip
    made.__dict__ |= changed
    return made


def refused(prune: str, made: Any) -> str:
    with pytest.raises(UnsupportedError, match="gradient pruning") as caught:
        compat.check(made, prune)
    return str(caught.value)


@pytest.mark.parametrize(("prune", "stage"), sorted(compat.TABLES))
def test_every_pair_of_the_table_fits_the_engine_that_is_installed(prune: str, stage: int) -> None:
    compat.check(engine(stage), prune)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_kind_of_optimizer_has_what_the_table_says() -> None:
    (answers,) = run_forked(1, "tests.helpers.compat_main", "check_all")
    assert {said for _, said in answers.values()} == {""}
    assert {kind for kind, _ in answers.values()} >= {*compat.OPTIMIZERS} - {"FP16_Optimizer"}


def test_an_attribute_of_the_model_is_none_of_the_engine() -> None:
    made = engine()
    del made.__dict__["monitor"]
    made.__dict__["module"].monitor = "the user's own"
    assert "lacks DeepSpeedEngine.monitor, which gradient pruning hooks into" in refused(
        "gradient", made
    )


def test_another_signature_a_missing_method_and_a_missing_module_are_named_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DeepSpeedEngine, "step", lambda self, other: None)
    monkeypatch.delattr(DeepSpeedEngine, "allreduce_bucket")
    extra = compat.Names(modules={"deepspeed.nowhere": ("x",), "deepspeed.utils.groups": ("y",)})
    monkeypatch.setitem(compat.TABLES, ("gradient", 0), (*compat.TABLES["gradient", 0], extra))
    assert refused("gradient", engine()) == (
        "deepspeed 0.19.8 lacks DeepSpeedEngine.step(lr_kwargs), DeepSpeedEngine.allreduce_bucket, "
        "deepspeed.nowhere.x, deepspeed.utils.groups.y, which gradient pruning hooks into. Install "
        "a version it was tested with: 0.19.8."
    )


def test_an_optimizer_that_keeps_its_weights_elsewhere_is_named() -> None:
    class BF16_Optimizer:
        optimizer = bf16_groups = None

    made = engine(1)
    made.__dict__["optimizer"] = BF16_Optimizer()
    assert "BF16_Optimizer.fp32_groups_flat_partition, BF16_Optimizer.update_lp_params" in refused(
        "update", made
    )


def test_what_only_an_offloaded_optimizer_has_is_asked_of_it_alone() -> None:
    class DeepSpeedZeroOptimizer_Stage3:
        offload_optimizer = False

        def __getattr__(self, name: str) -> Any:
            if name == "norm_for_param_grads":
                raise AttributeError
            return 0

    made = engine(3)
    made.__dict__["optimizer"] = DeepSpeedZeroOptimizer_Stage3()
    compat.check(made, "update")
    made.optimizer.offload_optimizer = True
    assert "DeepSpeedZeroOptimizer_Stage3.norm_for_param_grads" in refused("update", made)


def test_gradient_mode_names_the_stage_and_the_way_out() -> None:
    message = refused("gradient", engine(3))
    assert 'zero_optimization.stage 3 with prune = "gradient"' in message
    assert "(stages that it takes: 0, 1, 2)" in message
    assert 'Set gradient_pruning.prune to "update"' in message


def test_an_optimizer_that_reduces_in_another_way_is_named() -> None:
    class DeepSpeedZeroOptimizer:
        bit16_groups_flat = ipg_buckets = param_dict = param_names = None

        def allreduce_bucket(self, bucket: Any) -> None: ...

        def gradient_reduction_w_predivide(
            self, tensor: Any, communication_data_type: Any
        ) -> None: ...

        def overlapping_partition_gradients_reduce_epilogue(self) -> None: ...

    made = engine(2)
    made.__dict__["optimizer"] = DeepSpeedZeroOptimizer()
    message = refused("gradient", made)
    assert "lacks DeepSpeedZeroOptimizer.allreduce_bucket(bucket, communication_data" in message
    assert "DeepSpeedZeroOptimizer.reduce_ipg_grads(comm_dtype)" in message
    assert "predivide" not in message


FEATURES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"pipeline_parallelism": True}, "pipeline parallelism"),
    ({"has_moe_layers": True}, "mixture of experts"),
    ({"sequence_parallel_size": 2}, "sequence parallelism"),
    ({"mp_world_size": 2}, "tensor parallelism"),
    ({"torch_autocast_z0_gradscaler": object()}, "fp16 under torch_autocast"),
    ({"enable_backward_allreduce": False}, "engine.enable_backward_allreduce = False"),
    ({"deepcompile": True}, "DeepCompile"),
    ({"module": torch.nn.Embedding(2, 2, sparse=True)}, "nn.Embedding(sparse=True)"),
    ({"gradprune": object()}, "an engine that is attached already"),
)
GRADIENT_ONLY: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"optimizer": SimpleNamespace(torch_autocast_gradscaler=object())},
        'fp16 under torch_autocast at ZeRO stages 1 and 2 with prune = "gradient" (set '
        'torch_autocast.dtype to "bfloat16")',
    ),
    (
        {"optimizer": type("ZenFlowZeroOptimizerParallel", (), {})()},
        'zero_optimization.zenflow with prune = "gradient" (remove the key)',
    ),
)
UPDATE_ONLY: tuple[tuple[dict[str, Any], str], ...] = (
    ({"gradient_average": False}, "gradients that are summed, not averaged"),
    (
        {"optimizer": ScheduleFree([torch.zeros(1)], lr=0.1)},
        'ScheduleFree with prune = "update" (its train() and eval() rewrite the weights',
    ),
)


@pytest.mark.parametrize("prune", ["gradient", "update"])
@pytest.mark.parametrize(("changed", "words"), FEATURES)
def test_a_feature_is_refused_by_name(prune: str, changed: dict[str, Any], words: str) -> None:
    message = refused(prune, engine(**changed))
    assert message.startswith(f"gradient pruning does not support {words}")
    assert message.endswith("enabled to false to train without pruning.")


@pytest.mark.parametrize(("changed", "words"), UPDATE_ONLY)
def test_a_feature_is_refused_in_update_mode_only(changed: dict[str, Any], words: str) -> None:
    compat.check(engine(**changed), "gradient")
    assert refused("update", engine(**changed)).startswith(
        f"gradient pruning does not support {words}"
    )


@pytest.mark.parametrize(("changed", "words"), GRADIENT_ONLY)
def test_a_feature_is_refused_in_gradient_mode_only(changed: dict[str, Any], words: str) -> None:
    compat.check(engine(2, **changed), "update")
    assert refused("gradient", engine(2, **changed)).startswith(
        f"gradient pruning does not support {words}"
    )


def test_everything_that_stands_in_the_way_comes_at_once() -> None:
    message = refused(
        "update", engine(has_moe_layers=True, mp_world_size=2, gradient_average=False)
    )
    assert "mixture of experts; tensor parallelism; gradients that are summed" in message


def test_the_hybrid_engine_is_refused() -> None:
    made = engine()
    made.__class__ = type("DeepSpeedHybridEngine", (type(made),), {})
    assert "does not support the hybrid engine" in refused("gradient", made)


def test_every_row_of_the_table_is_tested() -> None:
    hybrid = 1
    assert len(REFUSALS) == len(FEATURES) + len(GRADIENT_ONLY) + len(UPDATE_ONLY) + hybrid


def test_an_engine_without_an_optimizer_is_no_engine_to_refuse() -> None:
    assert compat.has_optimizer(engine())
    made = engine()
    made.__dict__["basic_optimizer"] = None
    assert not compat.has_optimizer(made)
