"""Seeds derived from names, independent of any random numbers drawn before."""

import hashlib
from typing import Any


def derived_seed(*parts: Any) -> int:
    """A 63-bit seed from any sequence of names and numbers."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
