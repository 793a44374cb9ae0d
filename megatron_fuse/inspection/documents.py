"""View of one document of the fusion data: each token with the distribution that predicts it."""

from itertools import groupby
from typing import Any

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.alignment import MATCHES
from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.recipe import Recipe
from megatron_fuse.selection.rules import NONE
from megatron_fuse.text_safety import printable
from megatron_fuse.tokenization import Tokenizer


def find_example(dataset: FusionDataset, index: int | None, example_id: str | None) -> int:
    """The number of an example that is given by number or by id.

    Raises UserError if there is no such example.
    """
    examples = len(dataset.example_ids)
    if example_id is not None:
        if example_id not in dataset.example_ids:
            raise UserError(
                f"--id {example_id}: there is no such example. There are {examples} examples; the first is "
                f"{dataset.example_ids[0]!r}."
            )
        return dataset.example_ids.index(example_id)
    if index is None or not 0 <= index < examples:
        raise UserError(
            f"--index {index}: there is no such example. Examples are numbered from 0 to {examples - 1}."
        )
    return index


def view_document(
    recipe: Recipe, dataset: FusionDataset, mode: str, example: int, source: str | None = None
) -> dict[str, Any]:
    """{"id", "mode", "source", "tokens": [{"id", "text", "supervised", "match", "entries": [{"id", "text",
    "logprob"}], "tail"}]}

    The entries at a token are the teacher's distribution that PREDICTS it, at the KL temperature. tail is the
    mass outside them. source: default the selected source; null in the view if none is selected. Raises
    UserError if the mode has no document of this example.
    """
    document = dataset.document(mode, example, source)
    name = dataset.example_ids[example]
    if not len(document.tokens):
        if mode not in dataset.selections:
            raise UserError(
                f"--mode {mode}: there are no documents, because the recipe's schedule gives this mode no "
                "weight"
            )
        whose = (
            f"of source {source!r}"
            if source
            else "(no source's answer was selected, or its margin is too small)"
        )
        raise UserError(
            f"example {name!r} has no {mode} document {whose}. It was left out: see the counts in "
            "manifest.json."
        )
    tokenizer = load_format(recipe.target, "target").tokenizer
    bounds = ragged.offsets(document.counts)
    row = np.cumsum(document.supervised) - 1
    tokens = []
    for position, token in enumerate(document.tokens.tolist()):
        supervised = bool(document.supervised[position])
        entries = slice(*bounds[row[position] :][:2]) if supervised else slice(0, 0)
        logprobs = document.teacher_logprobs[entries].astype(np.float64)
        tokens.append(
            {
                "id": token,
                "text": token_text(tokenizer, token),
                "supervised": supervised,
                "match": MATCHES[document.match[row[position]]] if supervised else "skip",
                "entries": [
                    {"id": entry, "text": token_text(tokenizer, entry), "logprob": logprob}
                    for entry, logprob in zip(
                        document.teacher_ids[entries].tolist(), logprobs.tolist(), strict=True
                    )
                ],
                "tail": float(1 - np.exp(logprobs).sum()),
            }
        )
    return {
        "id": name,
        "mode": mode,
        "source": source or dataset.selected_source(mode, example),
        "tokens": tokens,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text. Bytes that are no whole character are shown as \\xNN, special tokens by their name."""
    piece = tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""
    if token in tokenizer.special_ids or not piece:
        return tokenizer.token_text(token) or f"<{token}>"
    return piece.decode("utf-8", errors="backslashreplace")


def format_view(view: dict[str, Any], dataset: FusionDataset) -> str:
    """The view as text: the conversation with its token boundaries, then one line for every supervised
    token.
    """
    tokens = view["tokens"]
    labels = [token for token in tokens if token["supervised"]]
    matched = sum(token["match"] != "skip" for token in labels)
    lines = [
        f"example {printable(view['id'])} | mode {view['mode']} | source {view['source'] or 'none'}",
        *_reasons(view, dataset),
        f"{len(tokens)} tokens, {len(labels)} supervised, {matched} of them with teacher entries",
        "",
        *conversation_lines(tokens),
        "",
        f"{'position':>8}  {'label':<16} {'match':<9} {'tail':>6}  teacher's entries, in per cent",
    ]
    for position, token in enumerate(tokens):
        if not token["supervised"]:
            continue
        entries = "  ".join(f"{e['text']!r} {100 * np.exp(e['logprob']):.1f}" for e in token["entries"])
        line = (
            f"{position:>8}  {token['text']!r:<16} {token['match']:<9} {100 * token['tail']:>5.1f}%  "
            f"{entries}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def conversation_lines(tokens: list[dict[str, Any]]) -> list[str]:
    """The text of tokens {text, supervised} with token boundaries.

    One part for every run of supervised tokens, and one for every run of context.
    """
    return [
        f"[{'learned' if supervised else 'context'}] "
        f"{'│'.join(printable(token['text'], prose=True) for token in run)}"
        for supervised, run in groupby(tokens, key=lambda token: token["supervised"])
    ]


def _reasons(view: dict[str, Any], dataset: FusionDataset) -> list[str]:
    """The reasons of the choice between the sources, one line per source, and its margin."""
    selection = dataset.selections.get(view["mode"])
    if selection is None:
        return []
    example = dataset.example_ids.index(view["id"])
    lines = []
    for column, source in enumerate(dataset.sources):
        mark = "*" if selection.source[example] == column else " "
        available = selection.arrays["available"][example, column]
        lines.append(
            f"  {mark} {source}: {_reason(selection.arrays, example, column) if available else 'left out'}"
        )
    if selection.source[example] != NONE:
        margin, weight = selection.arrays["margin"][example], selection.weight[example]
        lines.append(f"  margin {margin:.4g} {_margin_unit(selection.arrays)}, weight {weight:.4g}")
    return lines


def _margin_unit(arrays: dict[str, np.ndarray]) -> str:
    if "category_score" in arrays:
        return "standard deviations of the scores"
    if "votes" in arrays:
        return "votes" if arrays["scores"].shape[2] != 1 else "of score"
    return "nats per byte" if "ce_sum" in arrays and "score" not in arrays else "of score"


def _reason(arrays: dict[str, np.ndarray], example: int, column: int) -> str:
    """The numbers by which one source was compared with the others."""
    if "category_score" in arrays:
        return f"mean score in the category {arrays['category_score'][example, column]:.3f} deviations"
    if "votes" in arrays:
        scores = ", ".join(f"{score:.3f}" for score in arrays["scores"][example, column])
        return f"{arrays['votes'][example, column]} votes, scores {scores or 'none'}"
    if "reference" in arrays:
        measures = ", ".join(f"{v:.3f}" for v in arrays["reference"][example, column])
        return f"score {arrays['score'][example, column]:.3f} of BLEU, ROUGE-L, BERTScore {measures}"
    if "ce_sum" in arrays:
        nats, count = arrays["ce_sum"][example, column], arrays["response_bytes"][example]
        return f"cross-entropy {nats:.2f} nats, {nats / max(count, 1):.4f} per byte"
    return "chosen by chance"
