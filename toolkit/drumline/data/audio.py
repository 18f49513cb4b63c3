"""Recordings: decoded by soundfile, resampled by soxr, made features by transformers' extractors."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.errors import DataError
from drumline.recipe.audio_section import Audio

Samples = NDArray[np.float32]
"""One channel, from -1 to 1."""


@dataclass(frozen=True)
class AudioPipeline:
    """What becomes of the recordings of a section."""

    spec: Audio

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor; DataError where its sampling rate is not the section's."""
        from transformers import (
            AutoFeatureExtractor,
            Wav2Vec2FeatureExtractor,
            WhisperFeatureExtractor,
        )

        spec = self.spec
        if spec.processor is not None:
            try:
                found = AutoFeatureExtractor.from_pretrained(spec.processor)
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise DataError(f"data.audio.processor: {spec.processor}: {first}") from None
            if found.sampling_rate != spec.sampling_rate:
                raise DataError(
                    f"data.audio.sampling_rate: {spec.sampling_rate}, and {spec.processor} takes "
                    f"{found.sampling_rate}. Nearest: data.audio.sampling_rate={found.sampling_rate}"
                )
            return found
        if spec.features == "waveform":
            return Wav2Vec2FeatureExtractor(sampling_rate=spec.sampling_rate)
        return WhisperFeatureExtractor(
            feature_size=spec.mels, sampling_rate=spec.sampling_rate, chunk_length=spec.seconds
        )

    def features(self, recordings: list[Samples]) -> dict[str, NDArray[np.float32]]:
        """The model's inputs by name, each of the same length whatever the other recordings are."""
        found = self.extractor(
            recordings,
            sampling_rate=self.spec.sampling_rate,
            padding="max_length",
            max_length=self.spec.seconds * self.spec.sampling_rate,
            truncation=True,
            return_tensors="np",
        )
        return {
            name: np.asarray(values, dtype=np.int64 if name == "attention_mask" else np.float32)
            for name, values in found.items()
        }

    def samples(self, raw: bytes) -> Samples:
        """The recording in a file, with its channels mixed and resampled."""
        samples, rate = _read(raw)
        if rate == self.spec.sampling_rate:
            return samples
        import soxr

        return np.asarray(soxr.resample(samples, rate, self.spec.sampling_rate), dtype=np.float32)

    def fits(self, raw: bytes) -> bool:
        """Whether a recording, which is decoded to see that it can be, is not longer than `seconds`."""
        samples, rate = _read(raw)
        if not len(samples):
            raise DataError("a recording without a sample")
        return len(samples) <= self.spec.seconds * rate


def _read(raw: bytes) -> tuple[Samples, int]:
    """Samples of one channel, and how many a second has; DataError for what is no recording."""
    try:
        import soundfile
        import soxr  # noqa: F401  # so that its absence is told before the first step
    except ImportError as error:
        raise DataError(
            f"data.audio: {error.name} is not installed. Nearest: pip install 'drumline[audio]'"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"no recording that can be read: {error}") from None
    if not np.isfinite(samples).all():
        raise DataError("a recording with samples that are not finite")
    return np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32), int(rate)
