"""torchrun without a traceback of its own at Ctrl-C and SIGTERM, for commands that start it.

    python -m megatron_fuse.torchrun --standalone --nproc-per-node=2 SCRIPT ...

The ranks have received the signal then, and have said what there is to say.
"""

import megatron_fuse.start  # noqa: F401  # isort: split

import os

from torch.distributed.elastic.multiprocessing.api import SignalException


def main() -> int:
    level = os.environ.get("LOGLEVEL")
    os.environ["LOGLEVEL"] = level or "ERROR"  # read when this is imported; it tells of each signal that it sends
    from torch.distributed.run import main as run

    if level is None:
        del os.environ["LOGLEVEL"]  # the ranks' affair
    try:
        run()
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
