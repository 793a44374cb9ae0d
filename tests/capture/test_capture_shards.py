"""The files of a capture: damage, impossible values and those of another recipe are refused."""

from pathlib import Path

import numpy as np
import pytest
from small_captures import Models, changed, fresh_recipe, read

from megatron_fuse.capture import (
    CAPTURES,
    STATUSES,
    Conversation,
    SparseRows,
    capture,
    capture_shard,
    read_capture_shard,
)
from megatron_fuse.capture.shards import NO_RESPONSE, CaptureShard
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context


@pytest.fixture(scope="module")
def captured_shard(world: tuple[Path, Models], tmp_path_factory: pytest.TempPathFactory) -> CaptureShard:
    recipe = fresh_recipe(world, tmp_path_factory.mktemp("shard"))
    capture(Context(recipe), "beta", "training")
    return read(recipe, "beta", "training")[0]


def test_a_capture_of_something_else_is_refused_with_both_values(fresh: Recipe) -> None:
    artifact = capture(Context(fresh), "beta", "training")
    assert artifact is not None
    for recipe, key in [
        (changed(fresh, capture={"top_k": 4}), "top_k = 10, but now options.top_k = 4"),
        (changed(fresh, capture={"top_p": 1.0}), "top_p = 0.95, but now options.top_p = 1.0"),
        (changed(fresh, loss={"teacher_temperature": 3.0}), r"temperatures = \[2.0\]"),
        (fresh.model_copy(update={"sources": {"beta": fresh.sources["gamma"]}}), "tokenizer = "),
    ]:
        with pytest.raises(UserError, match=key):
            Context(recipe).open(CAPTURES, "beta", "training")
    with pytest.raises(UserError, match=r"options.top_k = 10, but now options.top_k = 4"):
        capture(Context(changed(fresh, capture={"top_k": 4})), "beta", "training")
    # Another budget or another source in the recipe is the same capture.
    same = changed(fresh, capture={"batch_tokens": 77}).model_copy(
        update={"sources": {"beta": fresh.sources["beta"]}}
    )
    assert Context(same).open(CAPTURES, "beta", "training").sha256 == artifact.sha256


def test_a_damaged_shard_is_refused_by_name(fresh: Recipe) -> None:
    artifact = capture(Context(fresh), "alpha", "inference")
    assert artifact is not None
    path = artifact.files(".safetensors")[1]
    good = path.read_bytes()
    for damaged in (good[:-9], b"", good[:100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-00001.safetensors: cannot be read as a capture"):
            read_capture_shard(path)
    flipped = bytearray(good)
    flipped[-40] ^= 1  # within a number, where nothing but the checksum tells
    path.write_bytes(flipped)
    with pytest.raises(
        UserError, match=r"shard-00001.safetensors: the sha256 is .* Restore the file, or remove"
    ):
        capture_shard(artifact, 1)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("lse", (1, 1), np.nan, "lse is not finite in row 1"),
        ("lse", (2, 0), -np.inf, "lse is not finite in row 2"),
        ("token_logprobs", 3, np.nan, "token_logprobs is not finite in row 3"),
        ("token_logprobs", 3, np.inf, "token_logprobs is not finite in row 3"),
        ("entry_logits", -1, np.nan, "entry_logits is not finite in row "),
        ("entry_logits", -1, 0.5, "entry_logits rise in row "),
        ("entry_ids", 0, 10**6, "an entry's id is not one of the model's .* in row 0"),
        ("entry_ids", -1, -1, "an entry's id is not one of the model's .* in row "),
        ("starts", 4, -1, "starts and ends are out of order in row 4"),
        ("starts", 4, 10**6, "starts and ends are out of order in row 4"),
        ("ends", 4, 0, "starts and ends are out of order in row 4"),
        ("counts", 0, 77, "counts add up to"),
        ("offsets", 1, 10**6, "offsets do not divide its"),
    ],
)
def test_what_no_capture_holds_is_refused_by_file_and_row(
    captured_shard: CaptureShard, tmp_path: Path, name: str, place: int, value: float, message: str
) -> None:
    arrays = vars(captured_shard) | {name: getattr(captured_shard, name).copy()}
    arrays[name][place] = value
    path = tmp_path / "shard-00000.safetensors"
    CaptureShard(**arrays).save(path)
    with pytest.raises(UserError, match=f"shard-00000.safetensors: {message}"):
        read_capture_shard(path)


def test_arrays_of_other_lengths_are_refused(captured_shard: CaptureShard, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    for name in sorted(vars(captured_shard).keys() - {"offsets", "vocab_size"}):
        CaptureShard(**(vars(captured_shard) | {name: getattr(captured_shard, name)[:-1]})).save(path)
        with pytest.raises(
            UserError, match=r"but the other arrays need|counts add up to|offsets do not divide"
        ):
            read_capture_shard(path)


def test_a_shard_of_which_nothing_was_captured_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    conversations = [Conversation(name, None) for name in "abc"]
    CaptureShard.of(conversations, np.full(3, NO_RESPONSE), SparseRows.none(1)).save(path)
    shard = read_capture_shard(path)
    assert [STATUSES[code] for code in shard.status] == ["no_response"] * 3
    assert shard.offsets.tolist() == [0] * 4 and shard.lse.shape == (0, 2) and np.isnan(shard.ce_sum).all()
    assert len(shard.all_spans([0, 7, 9])) == 0
