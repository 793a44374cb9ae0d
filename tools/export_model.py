"""The same as `megatron-fuse export`: megatron_fuse/cli/export.py."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import door
from megatron_fuse.errors import exit_code

main = door("export")

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
