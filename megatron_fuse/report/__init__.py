"""Reports on what the stages made: numbers as JSON, a chart and one HTML page under WORKDIR/reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.recipe import Recipe
from megatron_fuse.report.alignment import alignment_report
from megatron_fuse.report.charts import draw_alignment
from megatron_fuse.report.page import alignment_page, alignment_text
from megatron_fuse.storage import temporary_then_rename, write_json

__all__ = ["alignment_report", "alignment_text", "write_alignment_report"]


def write_alignment_report(recipe: Recipe, progress: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """Writes WORKDIR/reports/alignment/FUSION/alignment.{json,png,html}; returns the numbers and the directory.

    Raises UserError where fusion data or captures are missing, or where nothing is learned from a source.
    """
    report = alignment_report(recipe, progress)
    directory = recipe.workdir / "reports" / "alignment" / fusion_directory(recipe).name
    write_json(directory / "alignment.json", report)
    chart = directory / "alignment.png"
    with temporary_then_rename(chart) as temporary:
        draw_alignment(report, temporary)
    with temporary_then_rename(directory / "alignment.html") as temporary:
        temporary.write_text(alignment_page(report, chart.read_bytes()), encoding="utf-8")
    return report, directory
