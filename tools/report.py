"""The same as `megatron-fuse report`: megatron_fuse/cli/report.py."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import door
from megatron_fuse.errors import exit_code

main = door("report")

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
