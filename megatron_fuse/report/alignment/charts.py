"""The alignment report as a picture: how the rows of every source and class of text were aligned, and the
mass they keep.
"""

from typing import Any

from matplotlib.figure import Figure

from megatron_fuse.reporting.colours import BLUE, GREEN, ORANGE, PALE_GREY, SKY

# From the surest match to none.
MATCH_COLOURS = {"exact": BLUE, "condition": SKY, "onehot": ORANGE, "skip": PALE_GREY}
MATCH_NAMES = {"exact": "exact", "condition": "conditioned", "onehot": "one-hot", "skip": "skipped"}
MASS_COLOUR = GREEN


def draw_alignment(report: dict[str, Any]) -> Figure:
    """One panel per source and mode, one bar per class of text, the mass kept beside it."""
    teachers = report["teachers"]
    heights = [0.75 + 0.32 * len(teacher["rows"]) for teacher in teachers]  # inches
    figure = Figure(figsize=(10, 1.0 + sum(heights)), layout="constrained")
    ratios = {"width_ratios": [5, 2], "height_ratios": heights}
    panels = figure.subplots(len(teachers), 2, squeeze=False, gridspec_kw=ratios)
    drawn = [name for name in MATCH_COLOURS if any(teacher["rows"]["all"][name] for teacher in teachers)]
    for (aligned, kept), teacher in zip(panels, teachers, strict=True):
        _draw_shares(aligned, teacher, drawn)
        _draw_mass(kept, teacher)
        for axes in (aligned, kept):
            axes.invert_yaxis()
            axes.set_xlim(0, 100)
            axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("supervised tokens, in per cent")
    panels[-1, 1].set_xlabel("mean stored mass, in per cent")
    (bars, names), (masses, mass_names) = (axes.get_legend_handles_labels() for axes in panels[0])
    names += mass_names
    figure.legend(bars + masses, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _draw_shares(axes: Any, teacher: dict[str, Any], drawn: list[str]) -> None:
    names = list(teacher["rows"])
    begin = [0.0] * len(names)
    for match in drawn:
        shares = [100 * (teacher["rows"][name][match] or 0) for name in names]
        axes.barh(
            names, shares, left=begin, color=MATCH_COLOURS[match], label=MATCH_NAMES[match], height=0.75
        )
        begin = [left + share for left, share in zip(begin, shares, strict=True)]
    axes.set_title(
        f"{teacher['source']}, {teacher['mode']} mode", loc="left", fontsize="medium", fontweight="bold"
    )
    axes.set_yticks(range(len(names)), [f"{name} ({teacher['rows'][name]['rows']:,})" for name in names])


def _draw_mass(axes: Any, teacher: dict[str, Any]) -> None:
    names = list(teacher["rows"])
    masses = [100 * (teacher["rows"][name]["mass"] or 0) for name in names]
    axes.barh(names, masses, color=MASS_COLOUR, label="mass kept", height=0.75)
    captured = teacher["captured"]["mass"] or 0
    axes.axvline(100 * captured, color="black", linewidth=1, linestyle="--", label="mass captured")
    axes.set_yticks([])
