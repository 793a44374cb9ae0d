"""Every row of every document, and every choice, against the reference in road_reference.py and road_reference_rows.py."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from road_reference import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    AlpacaSide,
    ByteLevelSide,
    Conversation,
    LossySide,
    Row,
    SentencePieceSide,
    Side,
    Turn,
    converse,
    cross_entropy,
    least,
    read,
    vote,
)
from road_reference_rows import Mass, Pair, Rules, teacher_row
from small_fusion import run_before_fusion
from small_models import small_recipe, write_rows
from small_tokenizers import CHATML, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from megatron_fuse.advantage.scores import load_scores
from megatron_fuse.fusion_data import MATCHES, Document, FusionDataset, build_fusion_data
from megatron_fuse.instructions import load_examples, open_instructions
from megatron_fuse.instructions.examples import Example
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import open_responses, response_shards

SEQ_LENGTH = 250
TEXTS = [
    "Sure: the internationalization of 123 stations is 45.",
    "日本 and été are words.\n\n  Indented\ttext, 12 + 30 = 42. 🙂",
    "12 is the answer",
    " begins with a space, and ends with one ",
    "\n\nbegins with lines,\0 a NUL",
    "internationalization nation station, hello world",
    "ends as text: </s> and <|im_end|>, ▁ literal",
    "cafe\u0301 is decomposed, ½ of it",
    "user assistant hello world. " * 12,  # too long for one of the two
]
# Earlier questions and answers of some examples.
EARLIER = {
    1: [("Before?", TEXTS[5])],
    3: [("One?", TEXTS[6]), ("Two?", TEXTS[2])],
    4: [("Once more?", TEXTS[7])],
    5: [("Nothing?", ""), ("Next to nothing?", " \n")],
    8: [("Long ago?", TEXTS[3])],
}
SYSTEM_MESSAGE = {2: "Be brief.", 3: "Answer the user."}


def level_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens go from the middle of a word into the next, so that they begin and end inside the others' often."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    pairs = [pair for text in TEXTS for pair in pairwise(text.split())]
    backend.train_from_iterator([f"{a[len(a) // 2 :]} {b[: (len(b) + 1) // 2]}" for a, b in pairs], trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n) for n in (3, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML)


def make_sides(root: Path) -> dict[str, Side]:
    return {
        "piece": SentencePieceSide((root / "piece/tokenizer.model").read_bytes()),
        "level": ByteLevelSide(level_tokenizer().backend_tokenizer),
        "alpaca": AlpacaSide((root / "piece/tokenizer.model").read_bytes()),
        "lossy": LossySide((root / "lossy/tokenizer.model").read_bytes()),
    }


def save_models(root: Path) -> None:
    make_tokenizer("sentencepiece", root / "piece")
    make_tokenizer("t5", root / "lossy")
    level_tokenizer().save_pretrained(root / "level")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sides = make_sides(root)
    torch.manual_seed(7)
    # More columns of logits than ids, as real models have.
    models = {
        "piece": LlamaForCausalLM(LlamaConfig(vocab_size=len(sides["piece"].pieces) + 3, **sizes)),
        "level": MistralForCausalLM(MistralConfig(vocab_size=len(sides["level"].pieces) + 5, **sizes)),
        "lossy": LlamaForCausalLM(LlamaConfig(vocab_size=len(sides["lossy"].pieces) + 8, **sizes)),
    }
    for name, steps in (("piece", 30), ("level", 15), ("lossy", 15)):
        model = models[name]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.25)
            liken_by_beginning(model.get_output_embeddings().weight, sides[name].pieces)
        teach(model, sides[name], steps)
        model.save_pretrained(root / name)


def liken_by_beginning(weight: torch.Tensor, pieces: list[bytes | None]) -> None:
    """weight [v, h]. Tokens that begin with the same bytes become likely together, as they are to a model that can spell. Special
    tokens and columns that are no token's are like a space, so that they turn up."""
    size = weight.shape[1]
    vector_of: dict[bytes, torch.Tensor] = defaultdict(lambda: torch.randn(size))
    for token in range(len(weight)):
        piece = (pieces[token] if token < len(pieces) else None) or b" "
        parts = [vector_of[piece[:n]] for n in range(1, len(piece) + 1)]
        own = 0.1 * torch.randn(size)  # some bytes have two tokens
        weight[token] = own + torch.stack(parts).sum(0) / len(parts) ** 0.5


def teach(model: PreTrainedModel, side: Side, steps: int) -> None:
    """Some of the texts, so that a row is likely to hold what comes; in the others its mass lies anywhere."""
    model.get_output_embeddings().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        for number, text in enumerate(TEXTS[:6]):
            ids = torch.tensor([converse(side, [Turn(f"Question {number}?", text)]).ids])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def example_row(number: int, text: str) -> dict[str, object]:
    turns = [*EARLIER.get(number, []), (f"Question {number}?", text)]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    if number in SYSTEM_MESSAGE:
        messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGE[number]})
    return {"id": f"e{number}", "messages": messages}


TEMPLATES = {"piece": "vicuna_v1.1", "alpaca": "alpaca", "level": None, "lossy": "vicuna_v1.1"}


def model_options(root: Path, name: str) -> dict[str, str | None]:
    return {"model": str(root / ("piece" if name == "alpaca" else name)), "chat_template": TEMPLATES[name]}


def run_road(root: Path, target: str, names: Sequence[str], supervise: str) -> Recipe:
    """Every stage before fusion data."""
    write_rows(root / "data.jsonl", [example_row(n, text) for n, text in enumerate(TEXTS)])
    sources = {}
    for place, (name, stride) in enumerate(zip(names, (1, 2, 4), strict=True)):
        answers = [TEXTS[(n * stride) % len(TEXTS)] if n != 5 + place else "" for n in range(len(TEXTS))]
        answers[4] = answers[4] + answers[4]
        file = write_rows(
            root / f"{name}.jsonl",
            [{"id": f"e{n}", "response": text, "truncated": n % 3 == 1} for n, text in enumerate(answers)],
        )
        sources[name] = {**model_options(root, name), "responses": str(file)}
    recipe = small_recipe(
        root / f"run-{target}-{supervise}",
        root / "data.jsonl",
        root,
        sources,
        data={"shard_size": 4, "supervise": supervise},
        training={"seq_length": SEQ_LENGTH},
        schedule={"preset": "profuser"},
        capture={"top_k": TOP_K, "top_p": TOP_P, "batch_tokens": 700},
        loss={"teacher_temperature": TEMPERATURE},
        reward_models={name: model_options(root, name) for name in ("piece", "level")},
        selection={"strongest": "level"},
    )
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update=model_options(root, target))})
    run_before_fusion(recipe)
    return recipe


def with_alignment(recipe: Recipe, vocabulary_map: str, unmatched: str) -> Recipe:
    options = {"vocabulary_map": vocabulary_map, "unmatched": unmatched}
    return recipe.model_copy(update={"alignment": recipe.alignment.model_copy(update=options)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("road")
    save_models(root)
    return root


@dataclass
class Reading:
    """One text of an example as one source has read it. rows: None where the example is left out."""

    mode: str
    example: int
    source: str
    theirs: Conversation
    ours: Conversation
    rows: list[Row] | None

    def __str__(self) -> str:
        return f"example {self.example}, {self.mode} mode, source {self.source}"


def read_all(recipe: Recipe, sides: dict[str, Side], target: Side) -> Iterator[Reading]:
    every_turn = recipe.data.supervise == "every_turn"
    examples = load_examples(open_instructions(recipe))
    for name, source in recipe.sources.items():
        model = AutoModelForCausalLM.from_pretrained(source.model)
        answers = [answer for shard in response_shards(open_responses(recipe, name)) for answer in shard]
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            for mode, final in (
                ("training", (example.response, not example.truncated)),
                ("inference", (answer.response, not answer.truncated)),
            ):
                turns = turns_of(example, *final, earlier=every_turn and mode == "training")
                theirs, ours = (converse(side, turns, example.system) for side in (sides[name], target))
                fits = max(len(theirs.ids), len(ours.ids)) <= SEQ_LENGTH + 1  # the last token is only a label
                rows = read(model, theirs) if final[0].strip() and fits else None
                yield Reading(mode, number, name, theirs, ours, rows)


def turns_of(example: Example, response: str, stop: bool, earlier: bool) -> list[Turn]:
    contents = [message["content"] for message in example.messages]
    before = [Turn(q, a, supervised=earlier) for q, a in zip(contents[0::2], contents[1::2], strict=False)]
    return [*before, Turn(contents[-1], response, stop=stop)]


ALL = ("piece", "level", "lossy")
RULES = ("exact skip", "exact condition", "exact onehot", "em skip", "em condition")


@pytest.mark.parametrize(
    ("target", "names", "supervise", "alignments"),
    [
        ("piece", ALL, "every_turn", RULES),
        ("level", ALL, "every_turn", RULES),
        ("lossy", ALL, "every_turn", RULES),
        ("alpaca", ("piece", "level", "alpaca"), "last_turn", ("exact condition",)),
    ],
)
def test_every_row_of_every_document_and_every_choice(
    root: Path, target: str, names: Sequence[str], supervise: str, alignments: Sequence[str]
) -> None:
    recipe = run_road(root, target, names, supervise)
    sides = make_sides(root)
    readings = list(read_all(recipe, sides, sides[target]))
    for alignment in alignments:
        chosen = with_alignment(recipe, *alignment.split())
        build_fusion_data(chosen, progress=str)
        dataset = FusionDataset(chosen)
        seen: Counter[str] = Counter()
        for reading in readings:
            document = dataset.document(reading.mode, reading.example, reading.source)
            same_vocabulary = sides[reading.source].pieces == sides[target].pieces
            rules = Rules(*alignment.split(), same_vocabulary)
            check_document(document, reading, sides[reading.source], sides[target], rules)
            if reading.rows is not None:
                seen.update(kinds_of_labels(reading.theirs, reading.ours, document))
            elif reading.theirs.text.strip(b"\0"):
                seen["left out"] += 1
        check_choices(chosen, dataset, readings)
        print(alignment, seen)
        check_that_all_was_met(seen, alignment)


def check_document(document: Document, reading: Reading, source: Side, target: Side, rules: Rules) -> None:
    where, ours = f"{reading}, {rules}", reading.ours
    if reading.rows is None:
        assert (reading.mode, len(document.tokens)) == ("inference", 0), where
        return
    assert document.tokens.tolist() == ours.ids, where
    assert np.flatnonzero(document.supervised).tolist() == [token.place for token in ours.tokens], where
    pair = Pair(source, target, reading.theirs, ours, reading.rows, rules)
    expected = [teacher_row(pair, number) for number in range(len(ours.tokens))]
    found = [MATCHES[code] for code in document.match]
    assert found == [match for match, _ in expected], where
    bounds = np.cumsum([0, *document.counts.tolist()])
    assert bounds[-1] == len(document.entry_ids) == len(document.entry_logprobs), where
    for number, (_, mass) in enumerate(expected):
        entries = slice(bounds[number], bounds[number + 1])
        check_row(document.entry_ids[entries], document.entry_logprobs[entries], mass, f"{where}, row {number}")


def check_row(ids: np.ndarray, logprobs: np.ndarray, mass: Mass, where: str) -> None:
    """Every entry is the expected one, rounded down to float16."""
    found = dict(zip(ids.tolist(), logprobs, strict=True))
    assert len(found) == len(ids) and found.keys() == mass.keys(), where
    for token, probability in mass.items():
        exact = math.log(probability)
        slack = 2e-5  # of a capture in float32, batched in another way
        assert rounded_down(exact - slack) <= found[token] <= min(rounded_down(exact + slack), 0), f"{where}, {token=}"


def rounded_down(value: float) -> np.float16:
    nearest = np.float16(value)
    return np.nextafter(nearest, np.float16(-np.inf)) if float(nearest) > value else nearest


def check_choices(recipe: Recipe, dataset: FusionDataset, readings: list[Reading]) -> None:
    names = list(recipe.sources)
    scores = np.stack([[load_scores(recipe, name, judge) for judge in recipe.reward_models] for name in names])
    by_place = {(reading.mode, reading.example, reading.source): reading for reading in readings}
    for number in range(len(TEXTS)):
        trained = [by_place["training", number, name] for name in names]
        ce = [cross_entropy(reading.theirs, reading.rows) for reading in trained if reading.rows is not None]
        assert dataset.selections["training"].arrays["ce_sum"][number] == pytest.approx(ce, rel=1e-5)
        whole = [reading.theirs.all_read() for reading in trained]
        assert number == 5 or dataset.selected_source("training", number) == names[least(ce, whole)], (
            number,
            ce,
            whole,
        )
        answered = [by_place["inference", number, name] for name in names]
        texts = ["" if reading.rows is None else reading.theirs.text[:-1].decode() for reading in answered]
        winner = vote(texts, scores[:, :, number], strongest=1)
        assert dataset.selected_source("inference", number) == (None if winner is None else names[winner])


def kinds_of_labels(theirs: Conversation, ours: Conversation, document: Document) -> Iterator[str]:
    """How labels lie that have a distribution. long: goes on after the source's first token, of which a conditioned row has read
    a part; cut: such a one that ends inside a source token."""
    edges = {edge for token in theirs.tokens for edge in (token.begin, token.end)}
    for label, code in zip(ours.tokens, document.match, strict=True):
        match = MATCHES[code]
        yield match
        if match in ("exact", "condition"):
            first_end = min(edge for edge in edges if edge > label.begin)
            if first_end < label.end:
                yield f"{match} long"
                if label.end not in edges:
                    yield f"{match} cut"


def check_that_all_was_met(seen: Counter[str], alignment: str) -> None:
    """What the texts were chosen for; a label over several source tokens is the hard case."""
    assert seen["exact"] > 400 and seen["exact long"] > 20 and seen["exact cut"] > 0 and seen["left out"], seen
    at_least = {"skip": 50, "condition": 15, "onehot": 50}
    unmatched = alignment.split()[1]
    assert seen[unmatched] >= at_least[unmatched], seen
