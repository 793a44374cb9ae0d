"""The same as `megatron-fuse merge`: megatron_fuse/cli/merge.py."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import door
from megatron_fuse.errors import exit_code

main = door("merge")

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
