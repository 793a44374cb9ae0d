"""The results of an open-ended evaluation as Markdown, as JSON, and as an HTML page with the answers."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from megatron_fuse.evaluation.open_ended.chart import draw_win_rates
from megatron_fuse.evaluation.open_ended.judgements import Judgement
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.results import Judged, OpenEndedResults
from megatron_fuse.evaluation.open_ended.win_rates import PairResult, Rate, Tally
from megatron_fuse.reporting.cards import CARD_STYLE, folded
from megatron_fuse.reporting.layout import (
    Table,
    escape,
    html_page,
    html_picture,
    html_table,
    markdown_table,
    save_picture,
    save_text,
)
from megatron_fuse.storage import write_json, write_jsonl

EXPLANATION = (
    "Win rates in per cent: wins and half of the ties, of all decided comparisons; ± one standard error, and "
    "the 95 % interval, by a bootstrap over prompts. `length-controlled`: the win rate that a regression "
    "predicts for answers of equal length."
)
_SHOWN = 24  # prompts on the page
_QUESTION, _ANSWER = (600, 10), (500, 9)  # characters and lines that are seen at once
_OUTCOMES = {1.0: "wins", 0.5: "tie", 0.0: "loses", None: "no verdict"}


def write_results(results: OpenEndedResults, output: Path) -> None:
    """Writes OUTPUT/open_ended.{json,md,html,png} and OUTPUT/judgements.jsonl."""
    write_json(output / "open_ended.json", results.as_json())
    write_jsonl(output / "judgements.jsonl", results.judgement_rows())
    save_text(output / "open_ended.md", results_markdown(results))
    png = save_picture(draw_win_rates(results.judges), output / "open_ended.png")
    save_text(output / "open_ended.html", _page(results, png))


def results_markdown(results: OpenEndedResults) -> str:
    lines = []
    for title, table in _tables(results):
        lines += [f"**{title}**", "", *markdown_table(table), ""]
    notes = [f"- {note}" for note in results.notes]
    return "\n".join([*lines, EXPLANATION, *([""] if notes else []), *notes, ""])


def _tables(results: OpenEndedResults) -> Iterator[tuple[str, Table]]:
    """(title, table) of everything: the answers, and by judge the win rates and those by category."""
    yield "Answers", _answers_table(results)
    for judged in results.judges:
        yield f"Win rates by {judged.judge}", _win_rates_table(judged)
        if any(len(pair.categories) > 1 for pair in judged.pairs):
            yield f"Win rates by {judged.judge}, by category", _categories_table(judged)


def _answers_table(results: OpenEndedResults) -> Table:
    rows = []
    for model in results.answers:
        counts = results.counts(model)
        numbers = [counts.answers, counts.empty, counts.truncated]
        rows.append([model, *map(str, numbers), f"{counts.characters:.0f}"])
    return ["model", "answers", "empty", "truncated", "mean characters"], rows


def _win_rates_table(judged: Judged) -> Table:
    heading = ["", "wins", "ties", "losses", "no verdict", "win rate", "95 %", "length-controlled", "95 %"]
    rows = []
    for pair in judged.pairs:
        rows.append(_win_rates_row(_name(pair), pair.overall))
        if len(pair.turns) > 1:
            rows += [
                _win_rates_row(f"{_name(pair)}, turn {turn}", found) for turn, found in pair.turns.items()
            ]
    return heading, rows


def _win_rates_row(name: str, tally: Tally) -> list[str]:
    counts = [tally.wins, tally.ties, tally.losses, tally.no_verdict]
    rates = [text for rate in (tally.win_rate, tally.controlled) for text in (_text(rate), _interval(rate))]
    return [name, *map(str, counts), *rates]


def _categories_table(judged: Judged) -> Table:
    categories = sorted({category for pair in judged.pairs for category in pair.categories})
    rows = [
        [
            category,
            *(
                _text(found.win_rate) if (found := pair.categories.get(category)) else "-"
                for pair in judged.pairs
            ),
        ]
        for category in categories
    ]
    return ["category", *map(_name, judged.pairs)], rows


def _name(pair: PairResult) -> str:
    return f"{pair.model} against {pair.opponent}"


def _text(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    error = "" if rate.standard_error is None else f" ± {100 * rate.standard_error:.1f}"
    return f"{100 * rate.value:.1f}{error}"


def _interval(rate: Rate | None) -> str:
    if rate is None or rate.low is None or rate.high is None:
        return "-"
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def _page(results: OpenEndedResults, png: bytes) -> str:
    parts = ["<h1>Open-ended evaluation</h1>\n", html_picture(png, "Win rates of every pair by every judge")]
    parts += [f"<h2>{escape(title)}</h2>\n{html_table(table)}" for title, table in _tables(results)]
    parts.append(f'<p class="note">{escape(EXPLANATION)}</p>\n')
    if results.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in results.notes) + "</ul>\n")
    shown = _from_all_categories(results.prompts, _SHOWN)
    parts.append(f"<h2>Answers to {len(shown)} of {len(results.prompts)} prompts</h2>\n")
    parts += [_card(results, prompt, turn) for prompt in shown for turn in range(1, len(prompt.turns) + 1)]
    return html_page("Open-ended evaluation", "".join(parts), CARD_STYLE)


def _from_all_categories(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts: the first of every category, then the second ones, and so on."""
    of_category: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        of_category.setdefault(prompt.category, []).append(prompt)
    in_turn = [prompt for row in zip_longest(*of_category.values()) for prompt in row if prompt is not None]
    return in_turn[:count]


def _card(results: OpenEndedResults, prompt: Prompt, turn: int) -> str:
    """One turn of a prompt with the answers of all models side by side, and what the judges said."""
    caption = [f"prompt {prompt.id}", *([prompt.category] if prompt.category else [])]
    answers = "".join(
        f'<div class="answer" style="border-color:#999"><b>{escape(model)}</b> '
        f'<span class="note">{len(answer.text):,} characters{", truncated" * answer.truncated}</span>'
        f'<div class="text">{folded(answer.text, _ANSWER)}</div></div>'
        for model, found in results.answers.items()
        if (answer := found.get((prompt.id, turn)))
    )
    columns = 3 if len(results.answers) > 2 else 2
    verdicts = "".join(
        f"<li>{escape(judged.judge)}: {escape(_verdict(judgement))}</li>"
        for judged in results.judges
        for judgement in judged.judgements
        if judgement.comparison.place == (prompt.id, turn)
    )
    return (
        f'<div class="card"><h3>{escape(" · ".join(caption))}, turn {turn}</h3>'
        f'<div class="instruction text">{folded(prompt.turns[turn - 1], _QUESTION)}</div>'
        f'<div class="answers" style="grid-template-columns: repeat({columns}, 1fr)">{answers}</div>'
        f"<ul>{verdicts}</ul></div>\n"
    )


def _verdict(judgement: Judgement) -> str:
    comparison, outcome = judgement.comparison, _OUTCOMES[judgement.preference]
    return f"{comparison.model} against {comparison.opponent}: {outcome}"
