"""Checkpoints of Megatron-LM, which know nothing of this project, as Hugging Face directories."""

import argparse
import functools
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import FAMILIES, make_tiny_target

from megatron_fuse.errors import UserError
from megatron_fuse.training.export import checkpoint_in, export_checkpoint


@functools.cache
def _megatron_queue() -> Any:
    """The kind of queue that Megatron-core makes for its saves. It starts a fresh Python for it, which takes
    five seconds; a fork is enough.
    """
    return multiprocessing.get_context("fork").Manager().Queue()


def save_as_megatron_lm(
    model_dir: Path, directory: Path, tensor: int, pipeline: int, extra: str | None, experts: int = 1
) -> None:
    """On a rank: Megatron-core's own `save` of a model with arguments and an optimizer, as in Megatron-LM."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import build_model
    from megatron_fuse.runtime import start_runtime

    start_runtime(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=experts,
    )
    architecture = read_architecture(model_dir)
    layout = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    layout |= {"expert_model_parallel_size": experts}
    model = build_model(architecture, transformer_config(architecture, **layout))
    load_hugging_face_weights([model], model_dir)
    momentum = torch.zeros(1, 3)
    state: dict[str, Any] = {
        "args": argparse.Namespace(num_layers=architecture.num_layers),
        "iteration": 7,
        "model": model.sharded_state_dict(),
        "optimizer": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.weight", momentum, replica_id=dist.get_rank()
        ),
    }
    if extra:
        state["extra"] = ShardedTensor.from_rank_offsets(extra, momentum, replica_id=dist.get_rank())
    checkpoint = directory / "iter_0000007"
    if dist.get_rank() == 0:
        checkpoint.mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    # As in a process of Megatron-LM: a save of another test in this process left a queue of this project.
    filesystem_async._results_queue = _megatron_queue()
    dist_checkpointing.save(state, str(checkpoint))


def families_and_layouts() -> Iterator[Any]:
    for tensor, pipeline, tied in itertools.product((1, 2), (1, 2), (False, True)):
        if tensor * pipeline < 4:
            words = f"{tensor}-{pipeline}-{'tied' if tied else 'untied'}"
            yield pytest.param("llama", tensor, pipeline, tied, id=words)
    for family in FAMILIES:
        plain = family in ("phi3", "olmo2", "gemma3")  # fused weights, norms over all heads, norms around
        marks = [] if plain else pytest.mark.slow
        yield pytest.param(family, 2, 2, "gemma" in family, id=f"{family}-2-2", marks=marks)


@pytest.mark.parametrize(("family", "tensor", "pipeline", "tied"), families_and_layouts())
def test_a_checkpoint_of_megatron_lm_becomes_a_model(  # type: ignore[no-untyped-def]
    ranks, tmp_path: Path, family: str, tensor: int, pipeline: int, tied: bool
) -> None:
    target = make_tiny_target(tmp_path / "target", vocab_size=1003, layers=4, tied=tied, family=family)
    ranks(tensor * pipeline, save_as_megatron_lm, target, tmp_path / "theirs", tensor, pipeline, None)
    checkpoint = checkpoint_in(tmp_path / "theirs")
    assert checkpoint.name == "iter_0000007" and checkpoint == checkpoint_in(checkpoint)
    assert export_checkpoint(checkpoint, target, tmp_path / "model", verify=False) == "fp32"
    before, after = (load_file(path / "model.safetensors") for path in (target, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "experts"),
    [
        pytest.param("mixtral", 1, 1, 4, marks=pytest.mark.slow),
        ("qwen3_moe", 2, 1, 2),
        pytest.param("olmoe", 1, 2, 2, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_mixture_of_megatron_lm_becomes_a_model(  # type: ignore[no-untyped-def]
    ranks, tmp_path: Path, family: str, tensor: int, pipeline: int, experts: int
) -> None:
    target = make_tiny_target(tmp_path / "target", vocab_size=1003, layers=4, family=family)
    ranks(4, save_as_megatron_lm, target, tmp_path / "theirs", tensor, pipeline, None, experts)
    checkpoint = checkpoint_in(tmp_path / "theirs")
    assert export_checkpoint(checkpoint, target, tmp_path / "model", verify=False) == "fp32"
    before, after = (load_file(path / "model.safetensors") for path in (target, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("extra", "changed", "said"),
    [
        ("mtp.layers.eh_proj.weight", {}, "holds mtp.layers.eh_proj.weight, which LlamaForCausalLM of "),
        ("decoder.layers.mlp.router.weight", {}, "holds decoder.layers.0.mlp.router.weight, which LlamaFor"),
        (None, {"num_hidden_layers": 3}, "does not hold all of model.layers.2."),
        (None, {"vocab_size": 1200}, "embedding.word_embeddings.weight of "),
        (None, {"intermediate_size": 72}, "mlp.linear_fc1.weight of "),
    ],
)
def test_what_does_not_fit_the_reference_is_named(  # type: ignore[no-untyped-def]
    ranks, tmp_path: Path, extra: str | None, changed: dict[str, int], said: str
) -> None:
    target = make_tiny_target(tmp_path / "target", vocab_size=1003)
    ranks(1, save_as_megatron_lm, target, tmp_path / "theirs", 1, 1, extra)
    config = json.loads((target / "config.json").read_text())
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match="Name the Hugging Face directory") as refusal:
        export_checkpoint(
            tmp_path / "theirs/iter_0000007", tmp_path / "reference", tmp_path / "model", verify=False
        )
    assert said in str(refusal.value) and str(tmp_path / "theirs") in str(refusal.value)
    assert not (tmp_path / "model").exists()
