"""Packed training is unpacked training: the same losses at every step and layout, and of every document."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import FAMILIES, MIXTURES, SyntheticDataset, make_tiny_recipe, make_tiny_target
from test_layouts import assert_same, layout, one_report, run_training

STEPS = 9  # of 8 examples: 7 of the first phase, 2 of the second
# Documents take 3 to 28 positions: two to six of them share a sequence.
UNPACKED = {"train_iters": STEPS, "seq_length": 64, "micro_batch_size": 2}
PACKED = {"train_iters": STEPS, "seq_length": 64, "micro_batch_size": 1, "packing": True}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"), layers=4)


@pytest.fixture(scope="module")
def unpacked(ranks, target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    return one_report(
        ranks(1, run_training, tmp_path_factory.mktemp("unpacked"), target, {"training": UNPACKED})
    )


# fp32 sums in another order, which Adam's division by small second moments lets grow
@pytest.mark.parametrize(
    ("world_size", "parallel", "training"),
    [
        pytest.param(1, layout(), {}, id="one"),
        pytest.param(1, layout(), {"recompute": True}, id="recompute"),
        pytest.param(2, layout(tp=2), {}, id="tp2"),
        pytest.param(2, layout(pp=2), {}, id="pp2", marks=pytest.mark.slow),  # as with virtual stages
        pytest.param(2, layout(pp=2, vp=2), {}, id="pp2-vp2"),
        pytest.param(2, layout(), {}, id="dp2"),
    ],
)
def test_packing_changes_nothing(ranks, unpacked, target, tmp_path, world_size, parallel, training) -> None:  # type: ignore[no-untyped-def]
    sections = {"parallel": parallel, "training": PACKED | training}
    assert_same(
        one_report(ranks(world_size, run_training, tmp_path, target, sections)), unpacked, relative=1e-5
    )


def test_a_packed_run_continues_packed_and_unpacked(ranks, unpacked, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Each step holds the same examples either way, so that a checkpoint fits both."""
    at = (
        {"training": PACKED | {"train_iters": 3}},
        {"training": PACKED | {"train_iters": 6}},
        {"training": UNPACKED},
    )
    ranks(1, run_training, tmp_path, target, at[0])
    ranks(2, run_training, tmp_path, target, at[1] | {"parallel": layout(pp=2)})
    rest = one_report(ranks(1, run_training, tmp_path, target, at[2]))
    expected = {
        "steps": unpacked["steps"][6:],
        "validation": unpacked["validation"][-len(rest["validation"]) :],
    }
    assert_same(rest, expected, relative=1e-5)


def losses_of_documents(workdir: Path, target: Path) -> list[dict[tuple[str, int], torch.Tensor]]:
    """Unpacked and packed: by document, [6, positions]."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training.batches import micro_batches, plan_batch
    from megatron_fuse.training.loss import make_forward_step
    from megatron_fuse.training.target import build_target

    recipe = make_tiny_recipe(workdir, target, training=UNPACKED)
    runtime = start_runtime()
    (model,) = build_target(recipe, read_target(recipe))
    dataset = SyntheticDataset()
    ranks = {"data_parallel_size": 1}
    found = []
    for pack_into in (None, 64):
        weights = {"inference": (0.1, 0.05), "training": (1.0, 0.5)}
        plan = plan_batch(
            dataset, dataset.train[:24], weights, pack_into=pack_into, micro_batch_size=1, **ranks
        )
        place = {"data_parallel_rank": 0, "with_targets": True, "device": runtime.device}
        batches = micro_batches(dataset, plan, **ranks, **place)
        forward_step = make_forward_step(micro_batches=plan.micro_batches, sources=3)
        losses: dict[tuple[str, int], torch.Tensor] = {}
        for sequence in plan.sequences:
            lengths = [len(dataset.document(*document).tokens) - 1 for document in sequence]
            output = forward_step(batches, model)[0].detach()[:, 0]  # [6, s]
            parts = output[:, : sum(lengths)].split(lengths, dim=1)
            losses |= dict(zip(sequence, parts, strict=True))
        found.append(losses)
    return found


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES)]
)
def test_a_packed_document_has_the_losses_that_it_has_alone(ranks, tmp_path, family) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target", layers=4, family=family)
    alone, packed = ranks(1, losses_of_documents, tmp_path, target)[0]
    assert alone.keys() == packed.keys() and len(alone) > 40
    for document, losses in alone.items():
        torch.testing.assert_close(
            packed[document], losses, rtol=1e-5, atol=1e-5, msg=lambda m, d=document: f"{d}: {m}"
        )


def refusal_under_transformer_engine(workdir: Path, target: Path, sections: dict[str, Any]) -> str:
    from types import SimpleNamespace

    from megatron_fuse.errors import UserError
    from megatron_fuse.target import read_target
    from megatron_fuse.training import target as targets

    recipe = make_tiny_recipe(workdir, target, **sections)
    with pytest.MonkeyPatch.context() as patched:
        config = SimpleNamespace(transformer_impl="transformer_engine")
        patched.setattr(targets, "transformer_config", lambda *_, **__: config)
        try:
            targets.build_target(recipe, read_target(recipe))
        except UserError as error:
            return str(error)
    return "built"


def test_transformer_engine_does_not_pack_in_fp32(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (message,) = ranks(1, refusal_under_transformer_engine, tmp_path, target, {"training": PACKED})
    assert "packed sequences only in bf16. Set training.precision to bf16" in message
