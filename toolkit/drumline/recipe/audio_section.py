"""The recipe's `data.audio` section: what becomes of a recording before a model hears it."""

from typing import Annotated, Literal

from pydantic import Field

from drumline.recipe.section import Count, Name, Section


class Audio(Section):
    """Features of a recording, one channel at `sampling_rate`, always of so many `seconds`.

    `log_mel`: Whisper's spectrogram of `mels` bands. `waveform`: samples of mean 0 and variance 1, as wav2vec
    2 takes them. `processor`: a folder or a model of the hub with a preprocessor_config.json, whose feature
    extractor is used in place of both. Shorter recordings are filled with silence. What does not fit is cut
    off where a class is learnt, and the row is dropped where a text is.
    """

    features: Literal["log_mel", "waveform"] = "log_mel"
    sampling_rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    mels: Count = 80
    processor: Name | None = None
