"""One result of a check: a number, and the limit that it must hold."""

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """`what` was measured as `value` in `unit`. Build a Row with the functions below."""

    what: str
    value: float | str | None = None  # None if nothing was measured
    unit: str = ""
    limit: str = ""  # "<= 2.2"; "" if there is no limit
    ok: bool | None = None  # whether the limit holds; None if there is no limit
    reason: str = ""  # why there is no value, or what is wrong
    check: str = ""  # the name of the check; the process of the check adds it

    @property
    def verdict(self) -> str:
        """`ok`, `FAILED`, `not run`, or "" for a value without a limit."""
        if self.ok is None:
            return "not run" if self.value is None else ""
        return "ok" if self.ok else "FAILED"

    def json(self) -> str:
        """The row and its verdict as one line of JSON."""
        return json.dumps({"verdict": self.verdict, **asdict(self)}, ensure_ascii=False, allow_nan=False)


def measured(what: str, value: float | str, unit: str = "") -> Row:
    """A value without a limit. A float that is not finite gives a failed row."""
    if isinstance(value, float) and not math.isfinite(value):
        return failed(what, f"is {value}")
    return Row(what, value, unit)


def held(what: str, value: float, unit: str, limit: str) -> Row:
    """A value and the limit that it must hold: a comparison and a number, as in `<= 2.2`."""
    comparison, bound = limit.split()
    if not math.isfinite(value):
        return Row(what, unit=unit, limit=limit, ok=False, reason=f"is {value}")
    return Row(
        what, value, unit, limit, ok=value <= float(bound) if comparison == "<=" else value >= float(bound)
    )


def measured_or_held(what: str, value: float, unit: str, limit: str, *, counts: bool) -> Row:
    """A value whose limit counts only on some machines: with tiny sizes, times mean nothing.

    counts: the limit counts.
    """
    return held(what, value, unit, limit) if counts else measured(what, value, unit)


def holds(what: str, ok: bool, reason: str = "") -> Row:
    """A condition that holds or not. reason: what is wrong; it is dropped if the condition holds."""
    return Row(what, "yes" if ok else "no", ok=ok, reason="" if ok else reason)


def failed(what: str, reason: str) -> Row:
    """A measurement that failed, so that there is no value."""
    return Row(what, ok=False, reason=reason)


def not_run(what: str, reason: str) -> Row:
    """A measurement that this machine cannot make."""
    return Row(what, reason=reason)
