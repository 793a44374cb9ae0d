"""The advantage report as one HTML page that needs nothing beside it, and as a few lines for a terminal."""

from typing import Any

from megatron_fuse.report.advantage.card_page import html_card, swatch
from megatron_fuse.report.advantage.charts import rule_in_words
from megatron_fuse.report.advantage.numbers import GROUND_TRUTH, NOBODY, most_wins
from megatron_fuse.report.advantage.observations import FLAGS
from megatron_fuse.reporting.cards import CARD_STYLE
from megatron_fuse.reporting.layout import (
    Table,
    escape,
    html_page,
    html_picture,
    html_table,
    percent,
    text_table,
)

_STYLE = """
ul.findings { padding-left: 1.2em; font-size: 1.06em; }
p.key > span { margin-right: 1.2em; white-space: nowrap; }
.swatch { display: inline-block; width: .85em; height: .85em; border: 1px solid #444; vertical-align: -.08em; margin-right: .3em; }
"""


def advantage_page(report: dict[str, Any], charts: dict[str, tuple[str, bytes]]) -> str:
    """charts: by file name (charts.py) what it shows, and the PNG, which becomes part of the page."""

    def picture(name: str) -> str:
        return html_picture(charts[name][1], charts[name][0]) if name in charts else ""

    findings = "".join(f"<li>{escape(finding)}</li>" for finding in _findings(report))
    names = [GROUND_TRUTH, *report["sources"]]
    key = "".join(f"<span>{swatch(report['sources'], name)}{escape(name)}</span>" for name in names)
    parts = [
        f'<h1>Advantage</h1>\n<p class="note">{escape(_origin(report))}</p>\n',
        f'<ul class="findings">{findings}</ul>\n<p class="key">{key}</p>\n',
        f"<h2>Who wins</h2>\n{picture('wins')}{_paragraph(_margins(report))}",
    ]
    if report["modes"]:
        parts.append(f"<h2>The two modes</h2>\n{picture('modes') or _paragraph(_modes(report))}")
    if report["reward_models"]:
        parts.append(f"<h2>The reward models</h2>\n{_reward_model_tables(report)}")
    parts.append(
        f"<h2>Where they win</h2>\n{''.join(picture(name.replace(' ', '_')) for name in report['groups'])}"
    )
    if "category" not in report["groups"]:
        parts.append(_paragraph("No example has a category."))
    parts.append(f"<h2>How long the answers are</h2>\n{picture('lengths')}{_system_messages(report)}")
    parts.append(
        f"<h2>What the answers are like</h2>\n{html_table(_answers_table(report))}{_paragraph(_ANSWERS)}"
    )
    cards = "".join(html_card(card, report["sources"]) for card in report["cards"])
    parts.append(f"<h2>{len(report['cards'])} examples</h2>\n{cards}")
    return html_page("Advantage report", "".join(parts), _STYLE + CARD_STYLE)


def advantage_text(report: dict[str, Any]) -> str:
    """The report's main numbers for a terminal."""
    findings = [f"  {finding}" for finding in _findings(report)]
    return "\n".join([_origin(report), *text_table(_wins_table(report)), *findings])


def _origin(report: dict[str, Any]) -> str:
    examples, rules = (
        report["examples"],
        [f"{rule_in_words(report, mode)} ({mode} mode)" for mode in report["rules"]],
    )
    validation = f"; the {examples['validation']:,} of validation are not" if examples["validation"] else ""
    return (
        f"{report['fusion_data']}: {examples['counted']:,} examples are counted{validation}. Chosen by "
        f"{', '.join(rules)}."
    )


def _findings(report: dict[str, Any]) -> list[str]:
    sentences = []
    for mode, (name, share) in most_wins(report).items():
        nobody = report["wins"][mode][NOBODY]
        none = f"; no source in {percent(nobody['share'])}" if nobody["examples"] else ""
        sentences.append(
            f"{mode.capitalize()} mode: {name} wins most often, {percent(share)} of the examples{none}."
        )
    if report["modes"]:
        sentences.append(_modes(report))
    if report["reward_models"]:
        sentences.append(_reward_models(report))
    median = report["lengths"]["groups"][0]["median"]
    answers = [length for name, length in median.items() if name != GROUND_TRUTH and length]
    if answers:
        times = dict.fromkeys(
            f"{median[GROUND_TRUTH] / length:.1f}" for length in (max(answers), min(answers))
        )
        sentences.append(
            f"The median ground truth is {' to '.join(times)} times as long as a source's median answer."
        )
    return sentences


def _modes(report: dict[str, Any]) -> str:
    modes = report["modes"]
    if not modes["examples"]:
        return "No example has a winner in both modes."
    return (
        f"The same source wins in both modes in {percent(modes['agree'])} of {modes['examples']:,} examples, "
        f"where chance gives {percent(modes['chance'])} (kappa {_kappa(modes['kappa'])})."
    )


def _reward_models(report: dict[str, Any]) -> str:
    reward_models = report["reward_models"]
    if len(reward_models["favourites"]) == 1:
        return f"One reward model, {next(iter(reward_models['favourites']))}, decides by its score."
    kappas = [pair["kappa"] for pair in reward_models["pairs"] if pair["kappa"] is not None]
    extent = " to ".join(dict.fromkeys(map(_kappa, (min(kappas), max(kappas))))) if kappas else "-"
    return (
        f"The {len(reward_models['favourites'])} reward models like one answer best in "
        f"{percent(reward_models['unanimous'])} of the examples with a "
        f"winner, {percent(reward_models['tied'])} are ties of votes; between two of them kappa is {extent}."
    )


def _reward_model_tables(report: dict[str, Any]) -> str:
    """What every reward model likes best, and how often it agrees with the choice; then every pair of
    reward models.
    """
    reward_models = report["reward_models"]
    names = list(reward_models["favourites"])
    rows = [
        [f"likes {source} best", *(percent(reward_models["favourites"][name][source]) for name in names)]
        for source in report["sources"]
    ]
    rows.append(
        ["likes the winner best", *(percent(reward_models["winner"][name]["agree"]) for name in names)]
    )
    rows.append(
        ["kappa with the winner", *(_kappa(reward_models["winner"][name]["kappa"]) for name in names)]
    )
    table = html_table((("share of examples", *names), rows))
    if not reward_models["pairs"]:
        return table
    pairs = [
        [
            " and ".join(pair["reward_models"]),
            f"{pair['examples']:,}",
            percent(pair["agree"]),
            percent(pair["chance"]),
            _kappa(pair["kappa"]),
        ]
        for pair in reward_models["pairs"]
    ]
    return table + html_table(
        (("pair of reward models", "examples", "same favourite", "by chance", "kappa"), pairs)
    )


_LOWERED = {"dropped": "are dropped", "lowered": "count less"}


def _margins(report: dict[str, Any]) -> str:
    sentences = []
    for mode, margins in report["margins"].items():
        lead = margins["median"]
        if lead is None:
            continue
        changed = [
            f"{count:,} barely win and {what}" for key, what in _LOWERED.items() if (count := margins[key])
        ]
        low = f"; {' and '.join(changed)}" if changed else ""
        sentences.append(
            f"{mode.capitalize()} mode: the median winner is ahead by {_lead(report, mode, lead)}{low}."
        )
    return " ".join(sentences)


def _lead(report: dict[str, Any], mode: str, lead: float) -> str:
    rule = report["rules"][mode]
    if rule == "by_category":
        return f"{lead:.3g} standard deviations of the scores"
    if mode == "training" and rule != "winner":
        return f"{lead:.3g} nats per byte"
    if report["reward_models"] and len(report["reward_models"]["favourites"]) > 1:
        return f"{lead:g} vote{'s' * (lead != 1)}"
    return f"{lead:.3g} in score"


def _system_messages(report: dict[str, Any]) -> str:
    systems, examples = report["system_messages"], report["examples"]["counted"]
    if not systems["examples"]:
        by = "by category" if report["lengths"]["by"] else "of all examples"
        return _paragraph(f"No example has a system message: lengths are shown {by}.")
    rows = [
        [f"{rank}. {system['text']}", f"{system['examples']:,}", percent(system["share"])]
        for rank, system in enumerate(systems["frequent"], 1)
    ]
    text = (
        f"{systems['examples']:,} of {examples:,} examples have a system message, of "
        f"{systems['different']:,} different ones; "
        f"the {len(rows)} most frequent:"
    )
    return _paragraph(text) + html_table((("system message", "examples", "share"), rows), "texts")


_ANSWERS = (
    "Lengths are of answers that are not empty; tokens are of each source's own tokenizer. Truncated: cut "
    "off by a limit; refused: declines to answer; unmatched: a file of answers has none for the example."
)


def _answers_table(report: dict[str, Any]) -> Table:
    flags = ("answers", *FLAGS)
    measures = [(unit, kind) for unit in ("characters", "tokens") for kind in ("mean", "median")]
    rows = [
        [
            name,
            *("-" if answers[flag] is None else f"{answers[flag]:,}" for flag in flags),
            *(
                "-" if answers[unit][kind] is None else f"{answers[unit][kind]:,.0f}"
                for unit, kind in measures
            ),
        ]
        for name, answers in report["answers"].items()
    ]
    return ("", *flags, *(f"{unit}, {kind}" for unit, kind in measures)), rows


def _wins_table(report: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            *(
                f"{percent(by_source[name]['share'])} ({by_source[name]['examples']:,})"
                for by_source in report["wins"].values()
            ),
        ]
        for name in (*report["sources"], NOBODY)
    ]
    return ("wins", *(f"{mode} mode" for mode in report["wins"])), rows


def _kappa(kappa: float | None) -> str:
    return "-" if kappa is None else f"{kappa:.2f}"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n" if text else ""
