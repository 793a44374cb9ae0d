"""How well each source's distributions came over into the target's tokens."""

from pathlib import Path
from typing import Any

from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.report.alignment.charts import draw_alignment
from megatron_fuse.report.alignment.numbers import TEXT_CLASSES, alignment_report, text_classes
from megatron_fuse.report.alignment.page import alignment_page, alignment_text
from megatron_fuse.reporting.layout import save_picture, save_text
from megatron_fuse.stages import Context
from megatron_fuse.storage import write_json

__all__ = ["TEXT_CLASSES", "alignment_report", "alignment_text", "text_classes", "write_alignment_report"]


def write_alignment_report(context: Context) -> tuple[dict[str, Any], Path]:
    """Writes WORKDIR/reports/alignment/FUSION/alignment.{json,png,html}; returns the numbers and the
    directory.

    Raises UserError where fusion data or captures are missing, or where nothing is learned from a source.
    """
    recipe, report = context.recipe, alignment_report(context)
    directory = recipe.workdir / "reports" / "alignment" / fusion_directory(recipe).name
    write_json(directory / "alignment.json", report)
    chart = save_picture(draw_alignment(report), directory / "alignment.png")
    save_text(directory / "alignment.html", alignment_page(report, chart))
    return report, directory
