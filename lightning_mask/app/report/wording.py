"""Numbers as a person reads them."""

import math


def short(value: float | None) -> str:
    """Return a figure with four digits that count.

    Example:
        >>> short(0.123456), short(12345.6), short(3), short(None)
        ('0.1235', '12,346', '3', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(share: float) -> str:
    """Return a share with as many digits as it needs to be told from nothing and from all.

    Example:
        >>> percent(0.03792), percent(1.0), percent(0.00004), percent(0.99996), percent(0)
        ('3.79 %', '100 %', '0.004 %', '99.996 %', '0 %')
    """
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    distance = min(value, abs(100 - value))
    digits = 2 if distance >= 0.1 else min(6, 1 - math.floor(math.log10(distance))) if distance else 0
    digits = digits if value < 10 or distance < 1 else 1
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + " %"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers between two ends, about as many as asked for.

    Example:
        >>> ticks(0, 300), ticks(2.28, 2.41)
        ([0, 100, 200, 300], [2.3, 2.35, 2.4])
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def seconds(value: float) -> str:
    """Return a time.

    Example:
        >>> seconds(0.18), seconds(75), seconds(7300)
        ('0.18 s', '1 min 15 s', '2 h 1 min')
    """
    if value < 10:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
