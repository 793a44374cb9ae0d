"""torchrun that prints no traceback at Ctrl-C and SIGTERM, for commands that start it.

    python -m megatron_fuse.torchrun --standalone --nproc-per-node=2 SCRIPT ...

The ranks receive the signal too, and print the message for the user.
"""

import megatron_fuse.start  # noqa: F401

# isort: split

import logging

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main as torchrun


def main() -> int:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)  # else it warns of every signal that it sends
    try:
        torchrun()
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
