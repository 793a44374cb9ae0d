"""The advantage report's pictures. A source has one colour in all of them; each says in its title what it
shows, in which unit and of how many examples."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from megatron_fuse.report.advantage.numbers import GROUND_TRUTH, NOBODY, most_wins
from megatron_fuse.reporting.colours import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from megatron_fuse.reporting.layout import percent

# Neighbours differ in lightness too. Black is the ground truth.
SOURCE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
MODE_MARKERS = {"training": "o", "inference": "s"}
_BY_CATEGORY = "best mean score in the category"
_WIDTH = 11  # inches: 14 px a point of 10 in a page of 1280 px
_COLUMNS = 4  # most panels side by side
_INTERVAL = "line: 95 % interval"
_LABEL = 44  # characters of a group's name that are shown
_STYLE: dict[Any, Any] = {  # matplotlib types the keys by one literal of all names
    "text.parse_math": False,  # names and texts of the data may hold a dollar sign
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


def colour_of(sources: Sequence[str], name: str) -> str:
    if name == GROUND_TRUTH:
        return "#000000"
    return "#FFFFFF" if name == NOBODY else SOURCE_COLOURS[list(sources).index(name) % len(SOURCE_COLOURS)]


def advantage_charts(report: dict[str, Any]) -> dict[str, tuple[str, Figure]]:
    """By file name: what the chart shows, and the chart."""
    with mpl.rc_context(_STYLE):
        charts = {"wins": _draw_wins(report), "lengths": _draw_lengths(report)}
        if report["modes"] and report["modes"]["examples"]:
            charts["modes"] = _draw_modes(report)
        charts |= {name.replace(" ", "_"): _draw_groups(report, name) for name in report["groups"]}
    return charts


def _draw_wins(report: dict[str, Any]) -> tuple[str, Figure]:
    wins, sources = report["wins"], report["sources"]
    names = [*sources, NOBODY]
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.32 * len(names)))
    panels = figure.subplots(1, len(wins), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (mode, by_source) in zip(panels, wins.items(), strict=True):
        for row, name in enumerate(names):
            share, low, high = (100 * by_source[name][key] for key in ("share", "low", "high"))
            hatch = "////" if name == NOBODY else None
            axes.barh(
                row, share, color=colour_of(sources, name), edgecolor="#444444", linewidth=0.6, hatch=hatch
            )
            axes.hlines(row, low, high, color="black", linewidth=1)
            label = f"{percent(by_source[name]['share'])} ({by_source[name]['examples']:,})"
            axes.annotate(label, (high, row), (6, 0), textcoords="offset points", va="center")
        axes.set_title(f"{mode} mode: {rule_in_words(report, mode)}", loc="left")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
    top = 100 * max(by_source[name]["high"] for by_source in wins.values() for name in names)
    panels[0].set_xlim(0, 1.35 * top)  # room for the numbers
    panels[0].set_xticks([tick for tick in panels[0].get_xticks() if tick <= min(100, 1.35 * top)])
    panels[0].invert_yaxis()
    key = f"per cent of the examples, {_INTERVAL}"
    return _titled(figure, _most_wins_in_words(report), report["examples"]["counted"], key)


def _most_wins_in_words(report: dict[str, Any]) -> str:
    most = most_wins(report)
    names = {name for name, _ in most.values()}
    if len(most) == 2 and len(names) == 1:
        return (
            f"{names.pop()} wins most often in both modes "
            f"({' and '.join(percent(share) for _, share in most.values())})"
        )
    sentences = [
        f"{name} wins most often in {mode} mode ({percent(share)})" for mode, (name, share) in most.items()
    ]
    return ", ".join(sentences) or "No source wins"


def rule_in_words(report: dict[str, Any], mode: str) -> str:
    rule = report["rules"][mode]
    if mode == "training":
        return {
            "sum": "least cross-entropy",
            "per_byte": "least cross-entropy a byte",
            "per_token": "least cross-entropy a token",
            "average": "least cross-entropy, of all sources mixed",
            "winner": "the winner of the answers",
            "by_category": _BY_CATEGORY,
            "random": "chance",
        }[rule]
    if rule == "random":
        return "chance"
    if rule == "reference":
        return "nearest to the ground truth"
    if rule == "by_category":
        return _BY_CATEGORY
    reward_models = len(report["reward_models"]["favourites"]) if report["reward_models"] else 0
    return (
        f"vote of {reward_models} reward models"
        if reward_models > 1
        else "score of one reward model"
        if reward_models
        else "the only source"
    )


def _draw_modes(report: dict[str, Any]) -> tuple[str, Figure]:
    sources, modes = report["sources"], report["modes"]
    figure = Figure(figsize=(min(_WIDTH, 5.5 + 0.7 * len(sources)), 1.5 + 0.4 * len(sources)))
    axes = figure.subplots()
    shares = [[100 * count / modes["examples"] for count in row] for row in modes["table"]]
    # The darkest is a mid-grey.
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1.6 * max(map(max, shares)), aspect="auto")
    for row, row_shares in enumerate(shares):
        for column, share in enumerate(row_shares):
            axes.text(column, row, f"{share:.1f}", ha="center", va="center")
        frame: dict[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 2, "clip_on": False}
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, **frame))  # the same source in both modes
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(sources) > _COLUMNS else {}
    axes.set_xticks(range(len(sources)), sources, **slant)
    axes.set_yticks(range(len(sources)), sources)
    axes.set_ylabel("winner in training mode")
    title = (
        f"Both modes choose the same source in {percent(modes['agree'])}, by chance it would be "
        f"{percent(modes['chance'])}"
    )
    return _titled(
        figure, title, modes["examples"], "winner in inference mode (cells: per cent of the examples)"
    )


def _draw_groups(report: dict[str, Any], name: str) -> tuple[str, Figure]:
    """One panel per source, one row per group, a mark with its 95 % interval per mode."""
    sources, groups, modes = report["sources"], report["groups"][name], list(report["wins"])
    figure, panels = _panels(sources, groups)
    intervals = [
        interval for group in groups for wins in group["wins"].values() for interval in wins.values()
    ]
    highest = 100 * max(interval["high"] for interval in intervals)
    shift = 0.16 if len(modes) == 2 else 0
    for source, axes in zip(sources, panels, strict=True):
        for mode, side in zip(modes, (-shift, shift), strict=False):
            face = colour_of(sources, source) if mode == "inference" else "white"
            for row, group in enumerate(groups):
                share, low, high = (
                    100 * group["wins"][mode][source][key] for key in ("share", "low", "high")
                )
                axes.hlines(row + side, low, high, color="#666666", linewidth=1.2)
                axes.plot(
                    share, row + side, MODE_MARKERS[mode], color=face, markeredgecolor="black", clip_on=False
                )
        axes.set_xlim(0, highest)
        axes.grid(axis="x", color="#DDDDDD")
    marks = {"training": "○ training mode", "inference": "■ inference mode"}
    key = ", ".join(["wins, per cent of a row's examples", *(marks[mode] for mode in modes), _INTERVAL])
    return _titled(figure, _finding(report, name), report["examples"]["counted"], key)


def _finding(report: dict[str, Any], name: str) -> str:
    """The source and mode whose share of wins differs most between two groups whose 95 % intervals do not
    overlap.
    """
    groups, clear = report["groups"][name], []
    for mode in report["wins"]:
        for source in report["sources"]:
            rows = [(group["wins"][mode][source], group["group"]) for group in groups]
            (least, low), (most, high) = (pick(rows, key=lambda row: row[0]["share"]) for pick in (min, max))
            if least["high"] < most["low"]:
                clear.append((most["share"] - least["share"], source, mode, least, low, most, high))
    if not clear:
        return f"No source's share of wins varies clearly by {name}: the 95 % intervals overlap"
    _, source, mode, least, low, most, high = max(clear, key=lambda row: row[0])
    return (
        f"By {name}, {source}'s share of wins in {mode} mode varies most: {percent(least['share'], 0)} "
        f"({_short(low)}) to {percent(most['share'], 0)} ({_short(high)})"
    )


def _draw_lengths(report: dict[str, Any]) -> tuple[str, Figure]:
    """One panel per source, one row per group: the median length of its answers beside that of the ground
    truth.
    """
    groups, sources = report["lengths"]["groups"], report["sources"]
    if report["lengths"]["by"] == "system message":  # numbered as in the page's table
        ranks = {
            system["text"]: f"{rank}. "
            for rank, system in enumerate(report["system_messages"]["frequent"], 1)
        }
        groups = [{**group, "group": f"{ranks.get(group['group'], '')}{group['group']}"} for group in groups]
    whole = groups[0]["median"]
    answering = [source for source in sources if source in whole]
    figure, panels = _panels(answering or [GROUND_TRUTH], groups)
    mark: dict[str, Any] = {"clip_on": False, "markeredgecolor": "black"}
    for name, axes in zip(answering or [GROUND_TRUTH], panels, strict=True):
        for row, group in enumerate(groups):
            truth, answer = group["median"][GROUND_TRUTH], group["median"][name]
            if answer is not None:
                axes.hlines(row, min(truth, answer), max(truth, answer), color="#AAAAAA", linewidth=2)
                axes.plot(answer, row, "o", color=colour_of(sources, name), markersize=8, **mark)
            axes.plot(truth, row, "D", color=colour_of(sources, GROUND_TRUTH), markersize=5, **mark)
        axes.grid(axis="x", color="#DDDDDD")
    longest = max(length or 0 for group in groups for length in group["median"].values())
    panels[0].set_xlim(0, 1.04 * longest)
    title = f"The median ground truth has {whole[GROUND_TRUTH]:,.0f} characters"
    medians = [whole[source] for source in answering if whole[source] is not None]
    if medians:
        extent = " to ".join(dict.fromkeys(f"{length:,.0f}" for length in (min(medians), max(medians))))
        title += f", a source's median answer {extent}"
    key = "median characters, ◆ ground truth" + ", ● answer" * bool(answering)
    return _titled(figure, title, report["examples"]["counted"], key)


def _panels(names: Sequence[str], groups: Sequence[dict[str, Any]]) -> tuple[Figure, list[Axes]]:
    """Panels with the groups as rows, the first on top."""
    columns = min(len(names), _COLUMNS)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(_WIDTH, 0.7 + lines * (0.9 + 0.3 * len(groups))))
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # by _STYLE
    engine.set(wspace=0.05)  # the numbers under neighbours stay apart
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(name, loc="left", fontweight="bold")
        axes.set_yticks(
            range(len(groups)), [f"{_short(group['group'])} ({group['examples']:,})" for group in groups]
        )
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    for axes in grid[len(names) :]:
        axes.remove()
    for axes in grid[max(len(names) - columns, 0) : len(names)]:  # the lowest of every column
        axes.tick_params(axis="x", labelbottom=True)
    return figure, grid[: len(names)]


def _short(text: str) -> str:
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= _LABEL else f"{line[: _LABEL - 1]}…"


def _titled(figure: Figure, title: str, examples: int, key: str) -> tuple[str, Figure]:
    """key: what marks and numbers mean, under the chart."""
    number = f"n\u00a0=\u00a0{examples:,}\u00a0examples"  # in one line
    figure.suptitle(f"{title} ({number})", x=0.008, ha="left", fontweight="bold", fontsize=11, wrap=True)
    figure.supxlabel(key, fontsize=10)
    return title, figure
