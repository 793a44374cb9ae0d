"""Reports on finished stages.

    python tools/report.py alignment --recipe examples/quickstart/recipe.yaml
    python tools/report.py alignment WORKDIR/fusion/exact-skip-T2

`alignment`: how each source's distributions came over into the target's tokens. Prints tables and writes
WORKDIR/reports/alignment/MAP-UNMATCHED-T/alignment.{json,png,html}.
"""

import argparse

from megatron_fuse.errors import exit_code
from megatron_fuse.fusion_data.directory import add_fusion_data_arguments, fusion_data_recipe
from megatron_fuse.report import alignment_text, write_alignment_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", choices=["alignment"], help="what the report is on")
    add_fusion_data_arguments(parser)
    recipe = fusion_data_recipe(parser.parse_args())
    report, directory = write_alignment_report(recipe)
    print(f"\n{alignment_text(report)}\n\nwritten to {directory}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
