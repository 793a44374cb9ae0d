"""Every row of every document, and every choice, against the reference in road_reference.py."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from road_reference import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    ByteLevelSide,
    Conversation,
    SentencePieceSide,
    aligned,
    converse,
    cross_entropy,
    project,
    read,
    vote,
)
from small_fusion import run_before_fusion
from small_models import small_recipe, write_rows
from small_tokenizers import CHATML, sentencepiece_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from megatron_fuse.advantage.scores import load_scores
from megatron_fuse.fusion_data import MATCHES, Document, FusionDataset, build_fusion_data
from megatron_fuse.instructions import load_examples, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import open_responses, response_shards

SEQ_LENGTH = 190
TEXTS = [
    "Sure: the internationalization of 123 stations is 45.",
    "日本 and été are words.\n\n  Indented\ttext, 12 + 30 = 42. 🙂",
    "12 is the answer",
    " begins with a space, and ends with one ",
    "\n\nbegins with lines",
    "internationalization nation station, hello world",
    "ends as text: </s> and <|im_end|>, ▁ literal",
    "cafe\u0301 is decomposed",
    "user assistant hello world. " * 12,  # too long for one of the two
]


def level_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens cross words, so that they meet the other's boundaries seldom and end inside its tokens often."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(text.split()[::-1]) for text in TEXTS], trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n) for n in (3, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML)


def save_models(root: Path) -> None:
    (root / "piece").mkdir()
    (root / "piece/tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=True))
    level_tokenizer().save_pretrained(root / "level")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "piece/tokenizer.model")).vocab_size()
    torch.manual_seed(7)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=pieces + 3, **sizes))
    mistral = MistralForCausalLM(MistralConfig(vocab_size=len(level_tokenizer()) + 5, **sizes))
    for name, model in (("piece", llama), ("level", mistral)):
        with torch.no_grad():
            for parameter in model.parameters():  # wide: some rows nearly certain, some flat
                if parameter.dim() == 2:
                    parameter.normal_(std=0.25)
            model.get_output_embeddings().weight *= 3
        model.save_pretrained(root / name)


def build(root: Path, target: str) -> Recipe:
    rows = [{"id": f"e{n}", "instruction": f"Question {n}?", "output": text} for n, text in enumerate(TEXTS)]
    write_rows(root / "data.jsonl", rows)
    templates = {"piece": "vicuna_v1.1", "level": None}
    sources = {}
    for place, name in enumerate(templates):
        answers = [TEXTS[(n * (place + 1)) % len(TEXTS)] if n != 5 + place else "" for n in range(len(TEXTS))]
        answers[4] = answers[4] + answers[4]
        file = write_rows(
            root / f"{name}.jsonl",
            [{"id": f"e{n}", "response": text, "truncated": n % 3 == 1} for n, text in enumerate(answers)],
        )
        sources[name] = {"model": str(root / name), "chat_template": templates[name], "responses": str(file)}
    recipe = small_recipe(
        root / f"run-{target}",
        root / "data.jsonl",
        root / target,
        sources,
        data={"shard_size": 4},
        training={"seq_length": SEQ_LENGTH},
        schedule={"preset": "profuser"},
        capture={"top_k": TOP_K, "top_p": TOP_P, "batch_tokens": 700},
        loss={"teacher_temperature": TEMPERATURE},
        reward_models={name: {"model": str(root / name), "chat_template": templates[name]} for name in templates},
        selection={"strongest": "level"},
    )
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"chat_template": templates[target]})})
    run_before_fusion(recipe)
    build_fusion_data(recipe, progress=str)
    return recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("road")
    save_models(root)
    return root


@pytest.mark.parametrize("target", ["piece", "level"])
def test_every_row_of_every_document_and_every_choice(root: Path, target: str) -> None:
    recipe = build(root, target)
    dataset, names = FusionDataset(recipe), list(recipe.sources)
    sides = {
        "piece": SentencePieceSide((root / "piece/tokenizer.model").read_bytes()),
        "level": ByteLevelSide(level_tokenizer().backend_tokenizer),
    }
    models = {name: AutoModelForCausalLM.from_pretrained(root / name) for name in names}
    examples = load_examples(open_instructions(recipe))
    answers = {name: [a for shard in response_shards(open_responses(recipe, name)) for a in shard] for name in names}
    scores = np.stack([[load_scores(recipe, name, judge) for judge in recipe.reward_models] for name in names])
    seen: Counter[str] = Counter()
    for number, example in enumerate(examples):
        question, ce, candidates = example.messages[0]["content"], {}, []
        for name in names:
            answer = answers[name][number]
            candidates.append(answer.response)
            for mode, text, truncated in (
                ("training", example.response, example.truncated),
                ("inference", answer.response, answer.truncated),
            ):
                document, where = dataset.document(mode, number, name), f"{target=} {name=} {mode=} example {number}"
                theirs, ours = (converse(side, question, text, not truncated) for side in (sides[name], sides[target]))
                if not text.strip() or max(len(c.prompt + c.answer) for c in (theirs, ours)) > SEQ_LENGTH + 1:
                    assert (mode, len(document.tokens)) == ("inference", 0), where
                    candidates[-1] = ""
                    seen["left out"] += bool(text)
                    continue
                rows = read(models[name], theirs)
                if mode == "training":
                    ce[name] = cross_entropy(theirs, rows)
                assert document.tokens.tolist() == ours.prompt + ours.answer, where
                assert document.supervised.tolist() == [False] * len(ours.prompt) + [True] * len(ours.answer), where
                expected = [project(sides[name], sides[target], theirs, ours, rows, i) for i in range(len(ours.answer))]
                check_rows(document, expected, where)
                seen.update(MATCHES[code] for code in document.match)
                seen.update(kinds_of_labels(theirs, ours))
        assert dataset.selections["training"].arrays["ce_sum"][number] == pytest.approx([*ce.values()], rel=1e-5)
        assert dataset.selected_source("training", number) == min(ce, key=ce.__getitem__)
        winner = vote(candidates, scores[:, :, number], strongest=1)
        assert dataset.selected_source("inference", number) == (None if winner is None else names[winner])
    # What the texts were chosen for; a label over several source tokens is the hard case.
    assert any(example.truncated for example in examples)
    assert seen["exact"] > 400 and seen["skip"] > 50 and seen["long"] > 20 and seen["cut"] > 0 and seen["left out"], (
        seen
    )


def check_rows(document: Document, expected: list[dict[int, float]], where: str) -> None:
    """Every entry is the expected one, rounded down to float16."""
    assert [MATCHES[code] for code in document.match] == ["exact" if row else "skip" for row in expected], where
    bounds = np.cumsum([0, *document.counts.tolist()])
    assert bounds[-1] == len(document.entry_ids) == len(document.entry_logprobs), where
    for number, row in enumerate(expected):
        entries = slice(bounds[number], bounds[number + 1])
        found = dict(zip(document.entry_ids[entries].tolist(), document.entry_logprobs[entries].tolist(), strict=True))
        assert found.keys() == row.keys(), f"{where} row {number}"
        for token, mass in row.items():
            exact = math.log(mass)
            lost = exact - found[token]
            assert -2e-5 <= lost <= float(np.spacing(np.float16(abs(exact)))) + 2e-5, f"{where} row {number} {token=}"


def kinds_of_labels(theirs: Conversation, ours: Conversation) -> Iterator[str]:
    """long: goes on after the source's first token; cut: such a one that ends inside a source token."""
    for row in range(ours.text_rows):
        place = aligned(theirs, ours, row)
        if place is not None and place < theirs.text_rows and theirs.ends(place) < ours.ends(row):
            yield "long"
            if ours.ends(row) not in [*theirs.begins, len(ours.response)]:
                yield "cut"
