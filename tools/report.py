"""Reports on finished stages.

    python tools/report.py advantage --recipe examples/quickstart/recipe.yaml
    python tools/report.py alignment WORKDIR/fusion/exact-skip-T2

`advantage`: which source wins in either mode, where, and how far judges and modes agree; ten examples to read.
`alignment`: how each source's distributions came over into the target's tokens.

Prints the main numbers and writes WORKDIR/reports/REPORT/MAP-UNMATCHED-T/REPORT.{json,html} with the charts beside them as PNGs.
"""

import argparse

import megatron_fuse.start  # noqa: F401
from megatron_fuse.dataset.directory import add_fusion_data_arguments, fusion_data_recipe
from megatron_fuse.errors import exit_code
from megatron_fuse.report import advantage_text, alignment_text, write_advantage_report, write_alignment_report
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import say

REPORTS = {
    "advantage": (write_advantage_report, advantage_text),
    "alignment": (write_alignment_report, alignment_text),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", choices=list(REPORTS), help="what the report is on")
    add_fusion_data_arguments(parser)
    arguments = parser.parse_args()
    write, text = REPORTS[arguments.report]
    report, directory = write(Context(fusion_data_recipe(arguments)))
    say(f"\n{text(report)}\n\nwritten to {directory}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
