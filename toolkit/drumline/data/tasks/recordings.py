"""Recordings of rows, which are decoded and made features while they are read."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.audio import AudioPipeline
from drumline.data.tasks.base import Arrays, Encoded, Row, StoredRows, field_of
from drumline.recipe.data_section import Data

RECORDING = "recording"
"""The array with the bytes of a recording's file."""


def encode_recording(
    pipeline: AudioPipeline | None, row: Row, data: Data, parts: dict[str, Any], is_cut: bool
) -> Encoded:
    """A sample of a recording and what else it has; `count` is 0 where it is too long and may not be cut."""
    assert pipeline
    _, raw = field_of(row, str(data.audio_field))
    fits = pipeline.fits(raw)
    if not fits and not is_cut:
        return Encoded(count=0, was_truncated=True)
    file = {RECORDING: np.frombuffer(raw, dtype=np.uint8)}
    sample = Encoded(**{"count": 1, **parts, "arrays": {**parts.get("arrays", {}), **file}})
    return replace(sample, was_truncated=sample.was_truncated or not fits)


def heard(pipeline: AudioPipeline | None, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
    """The model's inputs of these rows by name, such as input_features float32 [n, mels, frames]."""
    assert pipeline
    return pipeline.features(
        [pipeline.samples(raw.tobytes()) for raw in rows.array(RECORDING, indices)]
    )


def silence(pipeline: AudioPipeline | None, count: int) -> Arrays:
    """The inputs of so many recordings, all zero."""
    assert pipeline
    rate = pipeline.spec.sampling_rate
    one = pipeline.features([np.zeros(rate, dtype=np.float32)])
    return {
        name: np.zeros((count, *values.shape[1:]), values.dtype) for name, values in one.items()
    }
