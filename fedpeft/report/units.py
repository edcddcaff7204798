"""Numbers as people read them: the one place where a report's numbers become text."""

from __future__ import annotations

import math
from collections.abc import Collection

NOTHING = "–"
ROUNDING = 1e-5
"""A relative error below this is what float32 makes of an exact result."""

_BYTE_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_COUNT_STEPS = ((1e9, "B"), (1e6, "M"))


def human_bytes(size: float | None) -> str:
    """Decimal units, three digits: `1_840_000` is `1.84 MB`."""
    if size is None:
        return NOTHING
    for step, unit in _BYTE_STEPS:
        if size >= step * 0.9995:
            return f"{_three_digits(size / step)} {unit}"
    return f"{size:.0f} B"


def human_count(number: float | None) -> str:
    """`22_713_216` is `22.7 M`; below a million every digit is shown: `147,456`."""
    if number is None:
        return NOTHING
    for step, unit in _COUNT_STEPS:
        if number >= step * 0.9995:
            return f"{_three_digits(number / step)} {unit}"
    return f"{number:,.0f}"


def human_seconds(seconds: float | None) -> str:
    """`8.31 s`, `42 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def short_seconds(seconds: float) -> str:
    """As `human_seconds`, below a tenth of a second in milliseconds: `3.62 ms`."""
    return f"{_three_digits(1000 * seconds)} ms" if seconds < 0.0995 else human_seconds(seconds)


def human_energy(joules: float) -> str:
    """`5.3 J`, `2.16 kJ`, `0.42 mJ`: three digits."""
    for step, unit in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")):
        if joules >= step * 0.9995:
            return f"{_three_digits(joules / step)} {unit}"
    return f"{1e6 * joules:.0f} µJ"


def percent(share: float | None, spread: float | None = None) -> str:
    """`0.713` is `71.3 %`; with a spread of `0.034`, `71.3 ± 3.4 %`."""
    if share is None:
        return NOTHING
    around = "" if spread is None else f" ± {100 * spread:.1f}"
    return f"{100 * share:.1f}{around} %"


def relative(share: float | None) -> str:
    """An error over what it is an error of: `0.281` is `28.1 %`, `0.00042` is `0.042 %`, `4e-9` is `< 0.001 %`."""
    if share is None or math.isnan(share):
        return NOTHING
    if 0 < share < ROUNDING:
        return f"< {100 * ROUNDING:g} %"
    return f"{100 * share:.3f} %" if 0 < share < 5e-4 else percent(share)


def between(numbers: Collection[float], joint: str = " to ") -> str:
    """The least and the greatest of whole numbers, or the one that all of them are: `2 to 8`, or `4`."""
    least, greatest = round(min(numbers)), round(max(numbers))
    return str(least) if least == greatest else f"{least}{joint}{greatest}"


def points(difference: float) -> str:
    """A difference of two shares in percentage points: `5.2 points above`."""
    size = round(100 * abs(difference), 1)
    side = "above" if difference > 0 else "below"
    return f"{size:.1f} points {side}" if size else "level with"


def times(ratio: float | None) -> str:
    """How many times less: `312 ×`."""
    return NOTHING if ratio is None else f"{_three_digits(ratio)} ×"


def _three_digits(number: float) -> str:
    if number < 9.995:
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"
