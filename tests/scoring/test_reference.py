"""Laws of the score against the ground truth: each measure is its definition, whatever else is measured
beside it.
"""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from log_lines import logged
from small_models import TEXT, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import ReferenceOptions
from megatron_fuse.scoring.reference import combine, reference_measures, used_weights

ANSWERS = [
    ("The quick brown fox jumps.", "The quick brown dog sleeps, and the fox jumps over it."),
    ("It is 42", "What is 12 + 30? It is 42."),
    ("pear, fig, apple", "Sort: pear, apple, fig."),
    ("A quick fox", "A quick fox"),
    ("over the lazy dog " * 40, "The lazy dog."),  # longer than either encoder reads
    ("no word of it", "Yes"),
    ("日本", "日本 and 42"),
]
LAYERS, POSITIONS = 3, 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


def save_encoder(directory: Path, family: str) -> Path:
    """A random encoder whose tokenizer does not say how long a text may be.

    BERT with a language model's head and no pooler.
    """
    directory.mkdir()
    if family == "bert":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        pieces.normalizer, pieces.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        pieces.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials))
        frame = [("[CLS]", pieces.token_to_id("[CLS]")), ("[SEP]", pieces.token_to_id("[SEP]"))]
        pieces.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=frame)
        BertTokenizerFast(tokenizer_object=pieces).save_pretrained(directory)
        config = BertConfig(vocab_size=pieces.get_vocab_size(), max_position_embeddings=POSITIONS, **SIZES)
        kind = BertForMaskedLM
    else:
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        pieces = Tokenizer(models.BPE())
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
        pieces.train_from_iterator(TEXT, trainer)
        pieces.model.save(str(directory))
        RobertaTokenizer.from_pretrained(directory).save_pretrained(directory)
        ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        config = RobertaConfig(
            vocab_size=pieces.get_vocab_size(), max_position_embeddings=POSITIONS + 2, **SIZES, **ends
        )
        kind = RobertaModel
    torch.manual_seed(3)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that words differ
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("t5")  # bert-score's own loader takes what lies here for a T5
    return {family: save_encoder(root / family, family) for family in ("bert", "roberta")}


def plain_bertscore(directory: Path, family: str, layer: int, response: str, reference: str) -> float:
    """arXiv 1904.09675, section 3: each word's best cosine on the other side, averaged both ways; one text
    at a time.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()

    def states(text: str) -> torch.Tensor:
        within_a_sentence = " " + text.strip() if family == "roberta" else text.strip()
        words = tokenizer(within_a_sentence, add_special_tokens=False).input_ids[: POSITIONS - 2]
        ids = torch.tensor([[tokenizer.cls_token_id, *words, tokenizer.sep_token_id]])
        with torch.no_grad():
            found = model(ids, output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(found.double(), dim=1)

    ours, theirs = states(response), states(reference)
    cosine = ours @ theirs.T  # a word may be matched with the other text's frame, which itself counts nothing
    precision, recall = cosine.max(1).values[1:-1].mean().item(), cosine.max(0).values[1:-1].mean().item()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bertscore_is_the_formula_whatever_shares_its_batch(
    encoders: dict[str, Path], family: str, layer: int | None
) -> None:
    options = ReferenceOptions(bertscore_model=str(encoders[family]), bertscore_layer=layer)
    expected = [plain_bertscore(encoders[family], family, layer or LAYERS, *pair) for pair in ANSWERS]
    assert np.ptp(expected) > 0.1, "the case tells nothing"
    found = reference_measures(options, *zip(*ANSWERS, strict=True))[:, 2]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    order = np.random.default_rng(5).integers(0, len(ANSWERS), 150)  # several batches, each text many times
    mixed = reference_measures(options, *zip(*(ANSWERS[n] for n in order), strict=True))[:, 2]
    np.testing.assert_allclose(mixed, np.array(expected)[order], atol=1e-5)


def plain_bleu(response: list[str], reference: list[str]) -> float:
    """Papineni et al. 2002 for one sentence: effective order, and zeros replaced by 1/2, 1/4, ... of a
    match (Chen and Cherry 2014).
    """
    logs, halvings = [], 0
    for n in range(1, 5):
        grams, wanted = ([tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (response, reference))
        if not grams:
            break
        matched = (Counter(grams) & Counter(wanted)).total()
        if n == 1 and not matched:
            return 0.0
        halvings += not matched
        logs.append(math.log((matched or 0.5**halvings) / len(grams)))
    brevity = min(0.0, 1 - len(reference) / len(response))
    return math.exp(brevity + sum(logs) / len(logs))


def plain_rouge_l(response: list[str], reference: list[str]) -> float:
    """Lin 2004: F of the longest common subsequence."""
    length = np.zeros((len(response) + 1, len(reference) + 1), int)
    for i, a in enumerate(response):
        for j, b in enumerate(reference):
            length[i + 1, j + 1] = length[i, j] + 1 if a == b else max(length[i, j + 1], length[i + 1, j])
    return 2 * length[-1, -1] / (len(response) + len(reference))


def test_bleu_and_rouge_are_their_formulas() -> None:
    random = np.random.default_rng(8)
    texts = [
        [
            " ".join(random.choice(["fox", "dog", "pear", "fig", "over"], size))
            for size in random.integers(1, 12, 2)
        ]
        for _ in range(300)
    ]
    measures = reference_measures(ReferenceOptions(), *zip(*texts, strict=True))
    words = [[text.split() for text in pair] for pair in texts]
    np.testing.assert_allclose(measures[:, 0], [plain_bleu(*pair) for pair in words], atol=1e-6)
    np.testing.assert_allclose(measures[:, 1], [plain_rouge_l(*pair) for pair in words], atol=1e-6)
    assert np.isnan(measures[:, 2]).all()  # no model


def test_an_empty_answer_has_no_measure_and_the_truth_itself_has_all(encoders: dict[str, Path]) -> None:
    options = ReferenceOptions(bertscore_model=str(encoders["bert"]))
    truth = ["What is 12 + 30? It is 42.", "Sort: pear, apple, fig.", "Yes"]
    with logged("debug") as said:
        measures = reference_measures(options, ["", truth[1], " \n"], truth)
    assert np.isnan(measures[[0, 2]]).all()
    np.testing.assert_allclose(measures[1], 1, atol=1e-6)
    np.testing.assert_allclose(combine(measures, options), [np.nan, 1, np.nan], atol=1e-6)
    line = "answers against the ground truth: 1, on average bleu 1.000, rouge_l 1.000, bertscore 1.000"
    assert said.getvalue() == f"debug: {line}\n"
    with logged("debug") as said:
        assert reference_measures(options, ["", " "], truth[:2]).shape == (2, 3) and not said.getvalue()
    assert reference_measures(options, [], []).shape == (0, 3)


def test_weights_of_the_measures() -> None:
    measures = np.array([[[0.5, 0.25, 1.0], [0.0, 0.5, np.nan]]], np.float32)  # any leading shape
    full = ReferenceOptions(bertscore_model="somewhere")
    assert used_weights(full) == {"bleu": 0.25, "rouge_l": 0.25, "bertscore": 0.5}
    np.testing.assert_array_equal(combine(measures, full), [[0.6875, np.nan]])
    with pytest.raises(
        UserError, match=r"reference.bertscore is 0.5, but there is no .*bertscore_model.*renormalize"
    ):
        combine(measures, ReferenceOptions())
    without = ReferenceOptions(without_bertscore="renormalize")
    assert used_weights(without) == {"bleu": 0.5, "rouge_l": 0.5}
    np.testing.assert_array_equal(combine(measures, without), [[0.375, 0.25]])
    alone = ReferenceOptions(bleu=0, rouge_l=3, bertscore=0)  # needs no consent: it was never to count
    np.testing.assert_array_equal(combine(measures, alone), [[0.25, 0.5]])
    assert combine(measures, alone).dtype == np.float64


@pytest.mark.parametrize(
    ("module", "package"), [("sacrebleu.metrics", "sacrebleu"), ("rouge_score", "rouge-score")]
)
def test_a_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(
        UserError, match=rf"{package} cannot be imported .*pip install 'megatron-fuse\[reference\]'"
    ):
        reference_measures(ReferenceOptions(), ["a"], ["b"])


def test_what_is_no_encoder_is_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    def measure(model: Path, layer: int | None = None) -> None:
        reference_measures(ReferenceOptions(bertscore_model=str(model), bertscore_layer=layer), ["a"], ["b"])

    with pytest.raises(UserError, match=r"reference.bertscore_model: .*none' is not a directory"):
        measure(tmp_path / "none")
    with pytest.raises(UserError, match=r"reference.bertscore_layer is 4, but .*bert has only 3 layers"):
        measure(encoders["bert"], 4)
    decoder = save_model(tmp_path / "decoder", "llama")
    with pytest.raises(UserError, match=r"decoder is not an encoder whose tokenizer has CLS"):
        measure(decoder)
    headless = save_encoder(tmp_path / "headless", "bert")
    (headless / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"headless/model.safetensors is not a complete safetensors file"):
        measure(headless)
