"""The same as `megatron-fuse check-gpu`: megatron_fuse/cli/check_gpu.py."""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.cli.main import door
from megatron_fuse.errors import exit_code

main = door("check-gpu")

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
