"""Makes transformers' attention masks without looking at values: a look would make the host wait.

Transformers asks two questions of tensors in every forward: do the positions show several packed sequences
in a row, and does the padding mask hide nothing? Both are known on the host: rows without `position_ids` are
not packed, and a mask that hides nothing is left out of the micro-batch (`train/batches.py`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_QUESTIONS = ("find_packed_sequence_indices", "fast_all")
_real: dict[str, Callable[..., Any]] = {}
_positions_are_given = False


def answer_without_looking() -> None:
    """From now on in this process; what a version of transformers does not ask is left alone."""
    from transformers import masking_utils

    if _real:
        return
    for name in _QUESTIONS:
        if hasattr(masking_utils, name):
            _real[name] = getattr(masking_utils, name)
    if "find_packed_sequence_indices" in _real:
        masking_utils.find_packed_sequence_indices = _packed_sequences
    if "fast_all" in _real:
        masking_utils.fast_all = _hides_nothing  # type: ignore[attr-defined]


@contextlib.contextmanager
def positions_given(are_given: bool) -> Iterator[None]:
    """In here the micro-batch brings its own `position_ids`, which may show packed sequences."""
    global _positions_are_given
    before, _positions_are_given = _positions_are_given, are_given
    try:
        yield
    finally:
        _positions_are_given = before


def _packed_sequences(position_ids: Any) -> Any:
    return _real["find_packed_sequence_indices"](position_ids) if _positions_are_given else None


def _hides_nothing(mask: Any) -> bool:
    return False
