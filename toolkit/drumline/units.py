"""Formats bytes, counts, FLOPs and durations for people; divisors of integers. Pure."""

MIB = 1 << 20
GIB = 1 << 30


def format_bytes(count: float) -> str:
    """Format bytes with a binary unit and three significant digits: `13.4 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{format_number(count)} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB" if count < 1000 else f"{count:,.0f} TiB"


def format_count(count: float) -> str:
    """Format a large count with a suffix and three significant digits: `124M`, `8.03B`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(count) >= limit:
            return f"{format_number(count / limit)}{suffix}"
    return f"{count:,.0f}"


def format_flops(count: float) -> str:
    """Format floating-point operations with an SI prefix and three significant digits: `54 PFLOP`."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{format_number(count / limit)} {prefix}FLOP"
    return f"{count:,.0f} FLOP"


def format_number(number: float) -> str:
    """Three significant digits, or all whole ones from a thousand on, where `g` writes a power of ten."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as `45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def divisors(number: int) -> list[int]:
    """All positive divisors of a positive integer, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
