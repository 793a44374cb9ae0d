"""How close an answer is to the ground truth: BLEU, ROUGE-L and BERTScore, each by its maintained package.

The alternative to the vote of reward models is the score 0.25 BLEU + 0.25 ROUGE-L + 0.5 BERTScore (arXiv
2408.04998). The paper does not say how the three are computed. Here each is from 0 to 1, computed as its
package does it:

BLEU       sacrebleu, of a sentence: tokenization 13a, case kept, exponential smoothing, and effective order,
           which leaves out
           the lengths of n-grams that a short answer cannot have
ROUGE-L    rouge-score, F-measure of the longest common subsequence of the whole texts, without stemming; its
           words are runs of
           a-z and 0-9, so that a text in another script has 0
BERTScore  bert-score, F1 in fp32, without idf weights and without rescaling; a text that is longer than the
encoder can read is
           cut there
"""

import importlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.bars import without_bars
from megatron_fuse.huggingface.limits import longest_text
from megatron_fuse.huggingface.loading import this_device
from megatron_fuse.huggingface.loading_checks import check_before_loading
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.config_file import load_config
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.own_code import not_loadable
from megatron_fuse.recipe import ReferenceOptions

logger = logging.getLogger(__name__)

MEASURES = ("bleu", "rouge_l", "bertscore")  # the columns, and the names of the options for their weights
_PAIRS = 64  # answers compared at once
_NO_LIMIT = 2**31 - 1


def reference_measures(
    options: ReferenceOptions,
    responses: Sequence[str],
    references: Sequence[str],
) -> np.ndarray:
    """BLEU, ROUGE-L and BERTScore of n responses against one reference each: float32 [n, 3].

    NaN in the row of an empty response, and in the column of BERTScore without a bertscore_model. The encoder
    stays loaded for the next call. Raises UserError if a package is missing or the encoder cannot be used.
    """
    bleu = _package("sacrebleu.metrics").BLEU(effective_order=True)
    rouge = _package("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    measures = np.full((len(responses), len(MEASURES)), np.nan, np.float32)
    answered = [row for row, response in enumerate(responses) if response.strip()]
    for row in answered:
        measures[row, 0] = bleu.sentence_score(responses[row], [references[row]]).score / 100
        measures[row, 1] = rouge.score(references[row], responses[row])["rougeL"].fmeasure
    if options.bertscore_model and answered:
        texts = [responses[row] for row in answered], [references[row] for row in answered]
        measures[answered, 2] = _bertscore(options.bertscore_model, options.bertscore_layer, *texts)
    if answered:
        means = measures[answered].mean(0)
        shown = ", ".join(
            f"{name} {mean:.3f}" for name, mean in zip(MEASURES, means, strict=True) if mean == mean
        )
        logger.debug(f"answers against the ground truth: {len(answered):,}, on average {shown}")
    return measures


def used_weights(options: ReferenceOptions) -> dict[str, float]:
    """The weights of the measures with a weight above 0, divided by their sum.

    Raises UserError if BERTScore has a weight but no model, and options.without_bertscore does not allow to
    leave it out.
    """
    weights = {name: getattr(options, name) for name in MEASURES if getattr(options, name) > 0}
    if "bertscore" in weights and options.bertscore_model is None:
        if options.without_bertscore == "refuse":
            raise UserError(
                f"reference.bertscore is {options.bertscore}, but there is no reference.bertscore_model. "
                "Name the directory of an encoder there. Or set reference.without_bertscore to renormalize, "
                "which scales the other weights to a sum of 1."
            )
        del weights["bertscore"]
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def combine(measures: np.ndarray, options: ReferenceOptions) -> np.ndarray:
    """The weighted mean of measures [..., 3]: float64 [...], NaN if a used measure is NaN. Raises UserError
    as used_weights does."""
    weights = used_weights(options)
    total = np.zeros(measures.shape[:-1])
    for name, weight in weights.items():
        total += weight * measures[..., MEASURES.index(name)].astype(np.float64)
    return total


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{package} cannot be imported ({error}). Run pip install 'megatron-fuse[reference]'."
        ) from error


def _bertscore(model: str, layer: int | None, responses: list[str], references: list[str]) -> np.ndarray:
    """float32 [n]: F1"""
    compare = _package("bert_score.utils").bert_cos_score_idf
    encoder, tokenizer = _load_encoder(model, layer)
    # As BERTScorer without idf: all tokens have weight 1, the tokens that frame the text have weight 0.
    token_weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
    f1 = np.empty(len(responses), np.float32)
    # Sorted by length, so that there is little padding. In parts, because the package keeps the states of all
    # texts of a call.
    order = np.argsort([len(a) + len(b) for a, b in zip(responses, references, strict=True)], kind="stable")
    for start in range(0, len(order), _PAIRS):
        rows = order[start : start + _PAIRS]
        hypotheses, truths = [responses[row] for row in rows], [references[row] for row in rows]
        scores = compare(
            encoder, truths, hypotheses, tokenizer, token_weights, batch_size=_PAIRS, device=encoder.device
        )
        f1[rows] = scores[:, 2].numpy()
    return f1


@lru_cache(maxsize=1)
def _load_encoder(model: str, layer: int | None) -> tuple[Any, Any]:
    """An encoder up to a layer (default: all of it) and its tokenizer, as bert-score's functions expect them.

    bert-score's own loader guesses the architecture from the path. It takes the longest text from the
    tokenizer, but many tokenizers do not say it. Raises UserError unless the model is an encoder with all
    weights and with the tokens that frame a text.
    """
    where = "reference.bertscore_model"
    directory = resolve_model(model, where)

    def load(auto_class: Any, **options: Any) -> Any:
        try:
            with without_bars():
                return auto_class.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False, **options
                )
        except Exception as error:  # transformers raises many kinds for missing, damaged or unknown files
            raise not_loadable(directory, error, where) from error

    check_before_loading(AutoModel, directory, where, trust_remote_code=False)
    config, tokenizer = load_config(directory), load(AutoTokenizer)
    # Bert-score asks for it with every text, in vain.
    if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
        tokenizer = load(AutoTokenizer, add_prefix_space=True)
    layers = getattr(config, "num_hidden_layers", 0)
    if layer is not None and layer > layers:
        raise UserError(f"reference.bertscore_layer is {layer}, but {directory} has only {layers} layers")
    framing = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    if config.is_encoder_decoder or None in framing:
        raise UserError(
            f"{where}: {directory} is not an encoder whose tokenizer has CLS, SEP and padding. Name an "
            "encoder such as BERT, RoBERTa or DeBERTa."
        )
    config.num_hidden_layers = layer or layers
    encoder, report = load(AutoModel, config=config, dtype=torch.float32, output_loading_info=True)
    # Which BERTScore does not read.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"{where}: {directory} has no weights for {', '.join(missing[:3])}. Name a complete model."
        )
    for name, parameter in encoder.named_parameters():
        refuse_non_finite(parameter, f"{where}: {directory}: {name}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(encoder) or _NO_LIMIT)
    return encoder.to(this_device()).eval(), tokenizer
