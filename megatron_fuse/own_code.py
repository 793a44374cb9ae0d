"""Models that come with Python code: it runs only if the user allows it by an option.

Nothing asks at the terminal. If `trust_remote_code` is left out, transformers asks `Do you wish to run the
custom code?` on standard input. So every `from_pretrained` in this project passes it, as False if there is no
option for it.
"""

from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.text_safety import brief


def not_loadable(
    directory: Path, error: BaseException, where: str = "", allowed_by: str | None = None
) -> UserError:
    """The error for a model directory that transformers refused to load.

    where: the recipe's key that names the directory, if there is one. allowed_by: the key or option that lets
    the model's own code run; None if there is none.
    """
    place = f"{where}: " if where else ""
    if "trust_remote_code" not in str(error):
        return UserError(f"{place}transformers cannot load {directory}: {brief(str(error))}")
    remedy = (
        f"Read that code, and set {allowed_by} if you trust it."
        if allowed_by
        else "This command does not run such code."
    )
    return UserError(f"{place}{directory} needs Python code that comes with the model. {remedy}")
