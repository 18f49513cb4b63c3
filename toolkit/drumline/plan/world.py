"""What planning knows from outside the recipe. Pure: the session reads it and passes it in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from drumline.plan.model import NO_SITE, SiteFacts, StartFacts

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration
    from drumline.plan.start import Parent


@dataclass(frozen=True)
class World:
    """Facts from outside the recipe (files, prepared data, host), read by the caller; `resolve` is pure.

    `batchnorm`: whether a factory's model has it. `weights`: shapes of the tensors of a pretrained model,
    by name. `row_tokens`: tokens of the longest row that the run reads, or else of all prepared ones.
    `row_lengths`: as in DataFacts. `mixture`: prepared rows of each source by its label; `mixture_lengths`:
    as `row_lengths`, of each. `sequences`: of tokens that a prepared row holds.
    `parent`: the checkpoint that `start_from` names; `start`: of a run that has begun, what its plan says of
    that, instead. `problems`: what was found wrong with the data; `notes`: of the model. Both are told.
    `site`: of the cluster that is planned for.
    """

    model_config: dict[str, Any] | None = None
    weights: Mapping[str, tuple[int, ...]] | None = None
    weights_bytes: int | None = None
    samples: int | None = None
    validation_samples: int | None = None
    row_tokens: int | None = None
    row_lengths: list[int] | None = None
    mixture: Mapping[str, int] | None = None
    mixture_lengths: list[list[int]] | None = None
    fingerprint: str | None = None
    rows: str | None = None
    cache: str | None = None
    classes: int | None = None
    sequences: int | None = None
    host_memory_bytes: int | None = None
    calibration: "Calibration | None" = None
    batchnorm: Literal["yes", "no", "unknown"] = "no"
    parent: "Parent | None" = None
    start: StartFacts | None = None
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    site: SiteFacts = NO_SITE


NOTHING_KNOWN = World()
