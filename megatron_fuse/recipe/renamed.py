"""Keys of a recipe that were renamed.

Release 0.1 still reads the old name, with a warning that gives the new one.
"""

import os
import warnings
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.yaml_files import Keys, Place
from megatron_fuse.text_safety import printable

# Old key -> new key, both of the same section.
RENAMED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("selection", "judges"): ("selection", "reward_models"),
    ("data", "held_out"): ("data", "validation_samples"),
}


def renamed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a recipe with every old key under its new name. A new name that is there wins."""
    for (section, old), (_, new) in RENAMED.items():
        options = content.get(section)
        if isinstance(options, dict) and old in options:
            options = {
                new if key == old and new not in options else key: value for key, value in options.items()
            }
            options.pop(old, None)
            content = content | {section: options}
    return content


def with_new_names(content: dict[str, Any], place: Place) -> tuple[dict[str, Any], Place]:
    """`renamed`, and the place of a key in the content as it was given. Warns of each old key.

    Raises UserError if an old key and its new name are both given.
    """
    given: dict[Keys, Keys] = {}
    for old, new in RENAMED.items():
        options = content.get(old[0])
        if isinstance(options, dict) and old[1] in options:
            if new[1] in options:
                raise UserError(given_twice(place(old), ".".join(new), ".".join(old)))
            warn_of_old_name(place(old), ".".join(new))
            given[new] = old
    return renamed(content), lambda keys: place((*given.get(keys[:2], keys[:2]), *keys[2:]))


def given_twice(place: str, new: str, old: str) -> str:
    """The message of an error about an old name beside the new one."""
    return f"{place}: the old name of {new}, which is given too: leave out {old}"


def warn_of_old_name(place: str, new: str) -> None:
    """place: the old key with its file and line, or the old flag. Under torchrun only rank 0 warns."""
    if os.environ.get("RANK", "0") != "0":
        return
    warnings.warn(
        f"{printable(place)} is deprecated: write {new}. Release 0.2 will refuse it",
        FutureWarning,
        stacklevel=3,
    )
