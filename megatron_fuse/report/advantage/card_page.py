"""One example of the advantage report as HTML: who won and why, the instruction, and every answer."""

import json
from typing import Any

from megatron_fuse.report.advantage.charts import colour_of
from megatron_fuse.report.advantage.numbers import GROUND_TRUTH, NOBODY
from megatron_fuse.report.advantage.observations import FLAGS
from megatron_fuse.reporting.cards import folded
from megatron_fuse.reporting.layout import escape, html_table

# Characters and lines that are seen at once.
_INSTRUCTION, _SYSTEM, _ANSWER, _ONE_OF_MANY = (600, 10), (160, 2), (400, 7), (240, 5)
_MANY = 5  # answers from which on three stand side by side


def swatch(sources: list[str], name: str) -> str:
    return f'<span class="swatch" style="background:{colour_of(sources, name)}"></span>'


def html_card(card: dict[str, Any], sources: list[str]) -> str:
    won = ", ".join(
        f"{mode} mode: {winner or NOBODY}{_weight(card, mode)}" for mode, winner in card["winners"].items()
    )
    caption = [f"example {card['id']}", *([card["category"]] if card["category"] else []), f"wins in {won}"]
    system = f'<p class="note">System: {folded(card["system"], _SYSTEM)}</p>' if card["system"] else ""
    turns = card["messages"]
    spoken = [folded(_spoken(turn), _INSTRUCTION) for turn in turns]
    if len(turns) > 1:
        spoken = [f"<b>{escape(turn['role'])}:</b> {text}" for turn, text in zip(turns, spoken, strict=True)]
    given = [answer for answer in card["answers"] if answer["text"] is not None]
    many = len(given) >= _MANY
    answers = "".join(_answer(answer, sources, _ONE_OF_MANY if many else _ANSWER) for answer in given)
    columns = 1 if len(given) == 1 else 3 if many else 2
    return (
        f'<div class="card"><h3>{escape(_sentence(card["reason"]))}</h3><p '
        f'class="note">{escape(" · ".join(caption))}</p>{system}'
        f'<div class="instruction text">{"<br>".join(spoken)}</div>{_scores(card)}'
        f'<div class="answers" style="grid-template-columns: repeat({columns}, 1fr)">{answers}</div></div>\n'
    )


def _spoken(turn: dict[str, Any]) -> str:
    """The text of a turn, with the tools that it calls."""
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    shown = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(filter(None, (turn["content"], *shown))) if calls else turn["content"]


def _weight(card: dict[str, Any], mode: str) -> str:
    weight = card["weights"][mode]
    if weight == 1 or not card["winners"][mode]:
        return ""
    return f" (barely: counts {weight:g})" if weight else " (barely: dropped)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scores(card: dict[str, Any]) -> str:
    """One row per source; only the columns that the recipe's rules fill."""
    rows = []
    columns: list[str] = []
    for answer in card["answers"][1:]:
        cells = {
            f"score: {reward_model}": _number(score)
            for reward_model, score in answer.get("scores", {}).items()
        }
        cells |= {"votes": str(answer["votes"])} if "votes" in answer else {}
        cells |= {name: _number(value) for name, value in answer.get("reference", {}).items()}
        cells |= {"nats per byte": _number(answer["nats_per_byte"])} if "nats_per_byte" in answer else {}
        flags = [flag for flag in FLAGS if answer.get(flag)]
        same = [f"same text as {answer['same_as']}"] if answer["same_as"] else []
        cells["remarks"] = ", ".join([f"wins in {mode} mode" for mode in answer["wins"]] + flags + same)
        columns = list(cells)
        rows.append([answer["name"], *cells.values()])
    return html_table((("source", *columns), rows))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _answer(answer: dict[str, Any], sources: list[str], size: tuple[int, int]) -> str:
    name, text = answer["name"], answer["text"]
    won = "".join(f'<span class="won">{mode} winner</span>' for mode in answer.get("wins", []))
    if answer.get("same_as"):
        shown = f'<span class="note">the same text as {escape(answer["same_as"])}</span>'
    else:
        shown = folded(text, size) if text else '<span class="note">(no text)</span>'
    truth = " truth" if name == GROUND_TRUTH else ""
    return (
        f'<div class="answer{truth}" '
        f'style="border-color:{colour_of(sources, name)}"><b>{escape(name)}</b>{won} '
        f'<span class="note">{len(text):,} characters</span><div class="text answer-text">{shown}</div></div>'
    )
