"""HTML from values; everything that is not marked as HTML is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .rows import Spread

NONE = "\N{EN DASH}"
"""Shown in place of a missing value."""


class Raw(str):
    """Text that is already HTML."""


def safe(value: Any) -> Raw:
    return value if isinstance(value, Raw) else Raw(html.escape(str(value)))


def tag(name: str, *content: Any, **attributes: Any) -> Raw:
    """An element. In attribute names a trailing underscore is dropped and other underscores become hyphens."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Raw(f"<{name}{pairs}>{''.join(map(safe, content))}</{name}>")


def join(parts: Iterable[Any], between: str = "") -> Raw:
    return Raw(html.escape(between).join(map(safe, parts)))


def small(*content: Any) -> Raw:
    return tag("p", *content, class_="note")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, label: str, kind: str = "numbers") -> Raw:
    """A table in its own scrolling box; the first cell of each row is its heading."""
    lines = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells)) for first, *cells in rows]
    heading = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    content = tag("table", heading, tag("tbody", *lines), class_=kind)
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def folded(summary: Any, *content: Any) -> Raw:
    return tag("details", tag("summary", summary), *content)


def number(value: float, like: float | None = None) -> str:
    """The value with about three significant digits, or, as the deviation of ``like``, with as many decimals."""
    if math.isnan(value):
        return NONE
    size = abs(value if like is None else like)
    if value == 0 or (like is not None and size >= 5e-4):
        return "0" if value == 0 else minus(f"{value:.{_decimals(size)}f}")
    if size < 5e-4 or size >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return minus(f"{mantissa}·10{superscript(int(exponent))}")
    return minus(f"{value:.{_decimals(size)}f}")


def _decimals(size: float) -> int:
    return 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3


def percent(share: float, digits: int = 2) -> str:
    if math.isnan(share):
        return NONE
    return "never" if math.isinf(share) else f"{100 * share:.{digits}f}"


def spread(value: Spread, *, percentage: bool = False, best: bool = False) -> Raw:
    """ "98.30 ± 0.12", the deviation in smaller type, the best of a column in bold."""
    mean: Raw | str = percent(value.mean) if percentage else number(value.mean)
    mean = tag("b", mean) if best else safe(mean)
    if math.isnan(value.deviation):
        return mean
    deviation = percent(value.deviation) if percentage else number(value.deviation, value.mean)
    return join([mean, tag("span", f" ± {deviation}", class_="deviation")])


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return NONE
    if seconds < 120:
        short = f"{max(1000 * seconds, 1):.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
        return short if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(amount: int, one: str, many: str = "") -> str:
    return f"{amount} {one if amount == 1 else many or one + 's'}"


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
