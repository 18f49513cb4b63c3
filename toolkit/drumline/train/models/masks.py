"""Makes transformers build attention masks without device synchronisation.

In every forward transformers reads two facts from tensors: whether the positions show packed sequences, and
whether the padding mask masks nothing. Both are known on the host: rows are packed if they have
`position_ids`, and a mask that masks nothing is left out of the micro-batch (`train/batches.py`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_QUESTIONS = ("find_packed_sequence_indices", "fast_all")
_real: dict[str, Callable[..., Any]] = {}
_positions_are_given = False


def answer_without_looking() -> None:
    """Patch transformers in this process; functions that its version does not have are skipped."""
    from transformers import masking_utils

    if _real:
        return
    for name in _QUESTIONS:
        if hasattr(masking_utils, name):
            _real[name] = getattr(masking_utils, name)
    if "find_packed_sequence_indices" in _real:
        masking_utils.find_packed_sequence_indices = packed_sequences
    if "fast_all" in _real:
        masking_utils.fast_all = _hides_nothing  # type: ignore[attr-defined]


@contextlib.contextmanager
def positions_given(are_given: bool) -> Iterator[None]:
    """Context that says whether the micro-batch has `position_ids`, which may show packed sequences."""
    global _positions_are_given
    before, _positions_are_given = _positions_are_given, are_given
    try:
        yield
    finally:
        _positions_are_given = before


def packed_sequences(position_ids: Any) -> Any:
    """The number of each token's document, int64 [n, L]: a new one where positions do not go on by 1."""
    if not _positions_are_given:
        return None
    steps = position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _hides_nothing(mask: Any) -> bool:
    return False
