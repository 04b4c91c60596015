"""Numbers between bounds as expressions of a grammar."""

from __future__ import annotations

from edgevlm.gbnf import literal

# Digits of a number that has no bound: float64 has no more.
_DIGITS = 16
_FRACTION = f'("." [0-9]{{1,{_DIGITS}}})?'


def integers(low: int | None, high: int | None) -> str:
    """An expression for the integers from low to high, as JSON has them; "" if there are none."""
    ways: list[str] = []
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        ways += [f'"-" ({way})' for way in _joined(least, None if low is None else -low)]
    if high is None or high >= 0:
        ways += _joined(max(low or 0, 0), high)
    return " | ".join(ways)


def numbers(low: int | None, high: int | None, *, above: bool, below: bool) -> str:
    """An expression for the decimal numbers from low to high; "" if there are none.

    `above` leaves low itself out, `below` high itself.
    """
    ways: list[str] = []
    if low is None or low < 0:
        most = None if low is None else -low
        if high is None or high >= 0:
            ways += [f'"-" ({way})' for way in _decimals(0, most, True, above)]
        else:
            ways += [f'"-" ({way})' for way in _decimals(-high, most, below, above)]
    if high is None or high >= 0:
        inside = low is None or low < 0
        ways += _decimals(max(low or 0, 0), high, above and not inside, below)
    return " | ".join(ways)


def _decimals(low: int, high: int | None, above: bool, below: bool) -> list[str]:
    """Ways to write a number from low to high, 0 or more."""
    if high is not None and low > high:
        return []
    edge = [] if below or high is None else [f'{literal(str(high))} "." "0" | {literal(str(high))}']
    if low == high:
        return [] if above else edge
    nonzero = f'"." [0-9]{{0,{_DIGITS - 1}}} [1-9]'
    first = f"{literal(str(low))} {nonzero if above else _FRACTION}"
    between = _joined(low + 1, None if high is None else high - 1)
    return [first, *(f"({way}) {_FRACTION}" for way in between), *edge]


def _joined(low: int, high: int | None) -> list[str]:
    """Ways to write an integer from low to high, 0 or more, without leading zeros."""
    least = str(low)
    if high is None:
        n = len(least)
        longer = f"[1-9] [0-9]{{{n},{max(_DIGITS - 1, n)}}}"
        return [*_same_length(least, "9" * n), longer]
    ways: list[str] = []
    for n in range(len(least), len(str(high)) + 1):
        begin = least if n == len(least) else "1" + "0" * (n - 1)
        end = str(high) if n == len(str(high)) else "9" * n
        if begin <= end:
            ways += _same_length(begin, end)
    return ways


def _same_length(low: str, high: str) -> list[str]:
    """Ways to write the digits from low to high, which are equally many."""
    n = len(low) - 1
    if low == "0" * (n + 1) and high == "9" * (n + 1):
        return [f"[0-9]{{{n + 1}}}"]
    if n == 0:
        return [f"[{low}-{high}]"]
    if low[0] == high[0]:
        return [f"{literal(low[0])} ({' | '.join(_same_length(low[1:], high[1:]))})"]
    ways = [f"{literal(low[0])} ({' | '.join(_same_length(low[1:], '9' * n))})"]
    if int(low[0]) + 1 < int(high[0]):
        ways.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{n}}}")
    return [*ways, f"{literal(high[0])} ({' | '.join(_same_length('0' * n, high[1:]))})"]
