"""Numbers as people read them: never a power of ten."""

import pytest

from drumline.units import format_bytes, format_count, format_flops


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format_bytes(1010 * 2**20), "1,010 MiB"),
        (format_bytes(1023.9 * 2**20), "1,024 MiB"),
        (format_bytes(999.4 * 2**10), "999 KiB"),
        (format_bytes(13.44 * 2**30), "13.4 GiB"),
        (format_bytes(12), "12 B"),
        (format_count(999.7e6), "1,000M"),
        (format_count(8.03e9), "8.03B"),
        (format_flops(999.9e12), "1,000 TFLOP"),
        (format_flops(5e21), "5,000 EFLOP"),
    ],
)
def test_numbers(text: str, wanted: str) -> None:
    assert text == wanted
