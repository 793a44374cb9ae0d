"""Errors of a capture in Megatron name the source and the fix. The error of one rank ends all ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from killable_ranks import KillableRanks, run_module
from megatron_captures import SIZES, in_megatron, layout, run_captures
from safetensors.torch import load_file, save_file
from small_models import save_model
from transformers import LlamaConfig

from megatron_fuse.capture import require_backend
from megatron_fuse.capture.megatron_layout import source_architecture
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import make_recipe


def error_of(content: dict[str, Any]) -> str:
    try:
        run_captures(content)
    except UserError as error:
        return str(error)
    return "no error"


def damaged(directory: Path, tensor: str, value: float) -> Path:
    """The model with one element of a tensor replaced."""
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor].view(-1)[0] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def with_model(
    in_process: dict[str, Any], tmp_path: Path, directory: Path, **parallel: int
) -> dict[str, Any]:
    """The recipe with `wide` alone, of another directory, in Megatron."""
    source = {**in_process["sources"]["wide"], "model": str(directory)}
    return in_megatron({**in_process, "sources": {"wide": source}}, tmp_path, **parallel)


def test_logits_that_are_not_finite_name_the_example(ranks, in_process, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Path(shutil.copytree(in_process["sources"]["wide"]["model"], tmp_path / "model"))
    # Finite weights, whose products are not.
    damaged(model, "model.norm.weight", 3e38)
    damaged(model, "lm_head.weight", 3e38)
    [message] = ranks(1, error_of, with_model(in_process, tmp_path, model, **layout()))
    assert "sources.wide: the logits are NaN or infinite in example 'e" in message


def test_a_model_that_megatron_cannot_read_names_the_fix(in_process: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "mpt", "mpt")
    message = error_of(with_model(in_process, tmp_path, model))
    assert "sources.wide.backend is megatron, but Megatron cannot read this model" in message
    assert "MptForCausalLM is not supported" in message and "the backend hf reads" in message


def test_a_source_with_longrope_reads_no_longer_texts_than_its_frequencies_are_for(
    in_process: dict[str, Any], tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "long")
    content = in_megatron(in_process, tmp_path)
    content["sources"]["wide"]["model"] = str(tmp_path / "long")
    with pytest.raises(
        UserError, match=r"training\.seq_length of at most 64, or remove sources\.wide\.backend"
    ):
        source_architecture(make_recipe(content), "wide")


@pytest.mark.parametrize("parallel", [layout(tp=2), layout(pp=2)])
def test_too_few_processes_are_refused(
    in_process: dict[str, Any], tmp_path: Path, parallel: dict[str, int]
) -> None:
    message = error_of(in_megatron(in_process, tmp_path, **parallel))
    assert "pipeline_model_parallel_size is 2, but the number of processes is 1" in message


def test_a_layout_that_does_not_fit_the_model_is_refused(
    in_process: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any rank waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = error_of(in_megatron(in_process, tmp_path, **layout(tp=3)))
    assert "sources.wide.parallel: --tensor-model-parallel-size 3 does not divide" in message


def test_a_layout_needs_the_backend(in_process: dict[str, Any]) -> None:
    source = {**in_process["sources"]["wide"], "parallel": layout(tp=2)}
    with pytest.raises(UserError, match="parallel divides a source of backend megatron, but backend is hf"):
        make_recipe({**in_process, "sources": {"wide": source}})


def test_the_command_line_cannot_choose_another_backend(in_process: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(in_megatron(in_process, tmp_path, **layout()))
    require_backend(recipe, "wide", "training", "megatron")
    with pytest.raises(UserError, match=r"--backend hf: sources\.wide\.backend is megatron\. Change it"):
        require_backend(recipe, "wide", "training", "hf")


def test_the_error_of_one_rank_ends_all(in_process: dict[str, Any], tmp_path: Path) -> None:
    """A weight that only the second of two stages reads is damaged: the first stage meets no error."""
    model = Path(shutil.copytree(in_process["sources"]["wide"]["model"], tmp_path / "model"))
    damaged(model, "model.layers.3.mlp.down_proj.weight", float("nan"))
    content = with_model(in_process, tmp_path, model, **layout(pp=2))
    path = tmp_path / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps(content))
    words = ["megatron_fuse.cli", "capture", "--recipe", str(path), "--mode", "training"]
    ranks = KillableRanks()
    try:
        children = ranks.start(2, tmp_path / "outputs", run_module, words, torchrun=True)
        (code,) = ranks.wait(children, hangs_after=600)
    finally:
        ranks.close()
    printed = "".join(output.read_text() for output in (tmp_path / "outputs").iterdir())
    assert code != 0
    assert "model.layers.3.mlp.down_proj.weight" in printed, printed[-4000:]
