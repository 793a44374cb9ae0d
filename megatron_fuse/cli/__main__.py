"""`python -m megatron_fuse.cli COMMAND`: `megatron-fuse COMMAND` for torchrun and for other commands."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import main
from megatron_fuse.errors import exit_code

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
