"""Models that bring Python code of their own: it runs where the user allows it by name, and nothing asks at the terminal.

transformers asks `Do you wish to run the custom code?` on standard input wherever `trust_remote_code` is left out. So every
`from_pretrained` in this project passes it, as False where there is no option for it.
"""

from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.text_safety import brief


def not_loadable(directory: Path, error: BaseException, where: str = "", allowed_by: str | None = None) -> UserError:
    """The error for a model directory that transformers refused.

    where: the recipe's key that names it, if there is one. allowed_by: the key or option that would run the model's own code.
    """
    place = f"{where}: " if where else ""
    if "trust_remote_code" not in str(error):
        return UserError(f"{place}cannot load {directory}: {brief(str(error))}")
    remedy = f"read that code, and set {allowed_by} if you trust it" if allowed_by else "nothing here runs such code"
    return UserError(f"{place}{directory} can be loaded only by Python code that comes with it: {remedy}")
