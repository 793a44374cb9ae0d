"""The one exception for what a user can mend, and the door through which every command reports it."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_fuse.processes import end_with_torchrun


class UserError(Exception):
    """A usage or data error. The message names the file, line or key, both values where two disagree, and the mend."""


def exit_code(main: Callable[[], None]) -> int:
    """Runs a command; a UserError becomes one message on stderr and exit code 2, anything else keeps its traceback.

    So does what the operating system says of a named file that no code of ours looks at first: no permission, no such directory.
    """
    end_with_torchrun()
    try:
        main()
    except UserError as error:
        return _report(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _report(f"{error.filename or 'writing'}: {error.strerror}")
    return 0


def _report(message: str) -> int:
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record:  # torchrun ends with a page of its own, and quotes there what the first failing rank wrote
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(record).write_text(json.dumps(content), encoding="utf-8")
    if not record or os.environ.get("RANK") == "0":  # most errors are those of every rank
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
