"""Reports on finished stages.

    megatron-fuse report advantage --recipe examples/quickstart/recipe.yaml
    megatron-fuse report alignment WORKDIR/fusion/exact-skip-T2

`advantage`: which source wins in each mode, on which examples, and how far reward models and modes agree; ten
examples to read.
`alignment`: how well each source's distributions fit the target's tokens.

Prints the main numbers. Writes WORKDIR/reports/REPORT/MAP-UNMATCHED-T/REPORT.{json,html}, with the charts
beside them as PNGs.
"""

import argparse

from megatron_fuse.cli.fusion_data_arguments import add_fusion_data_arguments
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", choices=("advantage", "alignment"), help="subject of the report")
    add_fusion_data_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with importing():
        from megatron_fuse.dataset.directory import fusion_data_recipe
        from megatron_fuse.report import (
            advantage_text,
            alignment_text,
            write_advantage_report,
            write_alignment_report,
        )
        from megatron_fuse.stages import Context
    write, text = {
        "advantage": (write_advantage_report, advantage_text),
        "alignment": (write_alignment_report, alignment_text),
    }[arguments.report]
    report, directory = write(Context(fusion_data_recipe(arguments)))
    say(f"\n{text(report)}\n\nwritten to {directory}")
