"""Which source has the advantage, where, by how much, and how far those who decide it agree."""

import logging
from pathlib import Path
from typing import Any

from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.report.advantage.cards import card, choose_cards
from megatron_fuse.report.advantage.charts import advantage_charts
from megatron_fuse.report.advantage.numbers import advantage_numbers
from megatron_fuse.report.advantage.observations import observe, read_texts
from megatron_fuse.report.advantage.page import advantage_page, advantage_text
from megatron_fuse.reporting.layout import save_picture, save_text
from megatron_fuse.stages import Context
from megatron_fuse.storage import write_json

logger = logging.getLogger(__name__)

__all__ = ["advantage_report", "advantage_text", "write_advantage_report"]


def advantage_report(context: Context) -> dict[str, Any]:
    """The numbers (numbers.py) with the fusion directory's name and the cards (cards.py).

    Raises UserError where fusion data or a stage before are missing, or where the schedule learns from no
    source.
    """
    seen = observe(context)
    choices = choose_cards(seen)
    numbers = [int(seen.numbers[choice.example]) for choice in choices]
    texts = read_texts(context, numbers)
    cards = [card(seen, choice, *texts[number]) for choice, number in zip(choices, numbers, strict=True)]
    return {"fusion_data": str(fusion_directory(context.recipe)), **advantage_numbers(seen), "cards": cards}


def write_advantage_report(context: Context) -> tuple[dict[str, Any], Path]:
    """Writes WORKDIR/reports/advantage/FUSION/advantage.{json,html} and a PNG per chart; returns the
    numbers and the directory.
    """
    logger.info("advantage report: reading instructions, answers and selections")
    recipe, report = context.recipe, advantage_report(context)
    directory = recipe.workdir / "reports" / "advantage" / fusion_directory(recipe).name
    write_json(directory / "advantage.json", report)
    charts = {
        name: (title, save_picture(figure, directory / f"{name}.png"))
        for name, (title, figure) in advantage_charts(report).items()
    }
    save_text(directory / "advantage.html", advantage_page(report, charts))
    return report, directory
