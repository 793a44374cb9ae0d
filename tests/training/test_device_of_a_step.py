"""A training step on a GPU leaves nothing on the CPU and waits for nothing: on torch's "meta" device, in
the place of the GPU.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_device import META, meta_in_place_of_cuda
from synthetic import SyntheticDataset, make_tiny_recipe, make_tiny_target

STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "packed": {"training": {"micro_batch_size": 1, "packing": True}},
    "fused linear": {"loss": {"fused_linear": True}},
    "fused linear, bf16": {"loss": {"fused_linear": True}, "training": {"precision": "bf16"}},
    "recomputed": {"training": {"recompute": True}},
    "recomputed, packed": {"training": {"micro_batch_size": 1, "packing": True, "recompute": True}},
    "distributed optimizer": {
        "parallel": {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        }
    },
}


def devices_after_a_step(
    directory: Path, target: Path, sections: dict[str, dict[str, Any]]
) -> dict[str, set[str]]:
    """Forward and backward passes of one step. What is on which device, by kind."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training import target as targets
    from megatron_fuse.training.batches import micro_batches, phase_weights
    from megatron_fuse.training.trainer import forward_backward, make_trainer, plan_step

    recipe = make_tiny_recipe(directory, target, **sections)
    runtime = dataclasses.replace(start_runtime(), device=META)
    with meta_in_place_of_cuda(), pytest.MonkeyPatch.context() as patched:
        # There are no values to compare.
        patched.setattr(targets, "load_hugging_face_weights", lambda *_: None)
        model = read_target(recipe)
        chunks = targets.build_target(recipe, model)
        trainer = make_trainer(recipe, runtime, model.architecture, chunks, SyntheticDataset())
        step = trainer.schedule.step(0)
        assert step is not None
        weights = phase_weights(step.phase, progress=0.0, kl_factor=1.0)
        batch = plan_step(trainer, trainer.dataset.train[step.examples], weights)
        place = {"data_parallel_rank": 0, "data_parallel_size": 1, "with_targets": True, "device": META}
        micro_batch = next(iter(micro_batches(trainer.dataset, batch, **place)))
        reports = forward_backward(trainer, batch, forward_only=False)
        parameters = list(chunks[0].parameters())
        tensors = {
            "parameters": parameters,
            "buffers": [*chunks[0].buffers(), chunks[0].rotary_pos_emb.inv_freq],
            "gradients": [parameter.main_grad for parameter in parameters],
            "masters": [p for group in trainer.optimizer.param_groups for p in group["params"]],
            "reports": [report["sums"] for report in reports],
            "batch": [value for value in vars(micro_batch).values() if isinstance(value, torch.Tensor)],
            "targets": list(vars(micro_batch.targets).values()),
        }
        assert len(tensors["gradients"]) > 10 and len(reports) == batch.micro_batches
        return {kind: {tensor.device.type for tensor in of_kind} for kind, of_kind in tensors.items()}


@pytest.mark.parametrize("sections", STEPS.values(), ids=STEPS)
def test_all_of_a_step_is_on_the_ranks_device(ranks, sections: dict[str, Any], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target")
    (found,) = ranks(1, devices_after_a_step, tmp_path / "work", target, sections)
    assert found == {kind: {"meta"} for kind in found}
