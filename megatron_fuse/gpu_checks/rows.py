"""One figure of a check, and what is required of it."""

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """`what` was measured as `value` in `unit`. Build it with the functions below."""

    what: str
    value: float | str | None = None  # None where nothing was measured
    unit: str = ""
    limit: str = ""  # "<= 2.2"; "" where nothing is required
    ok: bool | None = None  # whether what is required holds; None where nothing is
    reason: str = ""  # why there is no value, or what is wrong
    check: str = ""  # the name of the check, which its process adds

    @property
    def verdict(self) -> str:
        """`ok`, `FAILED`, `not run`, or nothing for a figure of which nothing is required."""
        if self.ok is None:
            return "not run" if self.value is None else ""
        return "ok" if self.ok else "FAILED"

    def json(self) -> str:
        """One line."""
        return json.dumps({"verdict": self.verdict, **asdict(self)}, ensure_ascii=False, allow_nan=False)


def measured(what: str, value: float | str, unit: str = "") -> Row:
    """A figure of which nothing is required."""
    if isinstance(value, float) and not math.isfinite(value):
        return failed(what, f"is {value}")
    return Row(what, value, unit)


def held(what: str, value: float, unit: str, limit: str) -> Row:
    """A figure and the limit that it has to hold: a comparison and a number, as in `<= 2.2`."""
    comparison, bound = limit.split()
    if not math.isfinite(value):
        return Row(what, unit=unit, limit=limit, ok=False, reason=f"is {value}")
    return Row(what, value, unit, limit, ok=value <= float(bound) if comparison == "<=" else value >= float(bound))


def measured_or_held(what: str, value: float, unit: str, limit: str, *, counts: bool) -> Row:
    """A figure whose limit counts on some machines only: times say nothing where sizes are tiny."""
    return held(what, value, unit, limit) if counts else measured(what, value, unit)


def holds(what: str, ok: bool, reason: str = "") -> Row:
    """Something that is right or wrong. reason: what is wrong."""
    return Row(what, "yes" if ok else "no", ok=ok, reason="" if ok else reason)


def failed(what: str, reason: str) -> Row:
    """Something that ended without a figure, and should not have."""
    return Row(what, ok=False, reason=reason)


def not_run(what: str, reason: str) -> Row:
    """Something that this machine cannot show."""
    return Row(what, reason=reason)
