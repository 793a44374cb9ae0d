"""Refuses recipes that need what a captured server does not give."""

from megatron_fuse.recipe.models import SourceOptions


def beyond_server(
    sources: dict[str, SourceOptions],
    modes: list[str],
    *,
    temperature: float,
    tail: str,
    unmatched: str,
    mixed: bool,
) -> str | None:
    """Why distributions of a server (backend: server) are not enough for a recipe; None if they are.

    A server gives log-probabilities at temperature 1. At another temperature the ratios of the entries are
    known, but not the log-sum-exp over the vocabulary. modes: those that are captured. mixed: whether the
    distributions of several sources are mixed.
    """
    served = [
        name
        for name, source in sources.items()
        if source.backend == "server" and any(mode not in source.captures for mode in modes)
    ]
    needs = {
        f"loss.tail {tail}": ("loss.tail to renormalize", tail != "renormalize"),
        # It compares the known mass with the tail.
        f"alignment.unmatched {unmatched}": ("alignment.unmatched to skip", unmatched == "condition"),
        # The weights hold for whole distributions.
        "selection.training average": ("selection.training to sum", mixed),
    }
    for key, (fix, is_needed) in needs.items():
        if served and temperature != 1 and is_needed:
            return (
                f"sources.{served[0]} has backend server, which gives log-probabilities at temperature 1 "
                f"only. {key} needs the log-sum-exp at loss.teacher_temperature {temperature:g} too. Set "
                f"loss.teacher_temperature to 1, or {fix}."
            )
    return None
