"""The training job; the same as `python -m megatron_fuse.pretrain`, also under torchrun:
megatron_fuse/pretrain.py.
"""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import exit_code
from megatron_fuse.pretrain import main

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
