"""The one exception for what a user can mend, and the door through which every command reports it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A usage or data error. The message names the file, line or key, both values where two disagree, and the mend."""


def exit_code(main: Callable[[], None]) -> int:
    """Runs a command; a UserError becomes one message on stderr and exit code 2, anything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
