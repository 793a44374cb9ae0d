"""The same as `megatron-fuse generate`: megatron_fuse/cli/generate.py."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import door
from megatron_fuse.errors import exit_code

main = door("generate")

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
