"""Reports on the artifacts of the stages: numbers as JSON, charts and one HTML page under WORKDIR/reports."""

from megatron_fuse.report.advantage import advantage_text, write_advantage_report
from megatron_fuse.report.alignment import alignment_text, write_alignment_report

__all__ = ["advantage_text", "alignment_text", "write_advantage_report", "write_alignment_report"]
