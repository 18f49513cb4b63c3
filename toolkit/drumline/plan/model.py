"""The Plan: an immutable record with every number resolved.

It is the only interface between the command line, the launchers and the workers. It uses plain dataclasses
to spare a dry run the time to build pydantic validators; pydantic is used to read a Plan back and to
publish its JSON Schema.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from drumline.errors import PlanError
from drumline.files import parse_json
from drumline.memory.ranges import ByteRange, Verdict
from drumline.plan.batch import Split
from drumline.plan.mesh import Mesh, mesh_of
from drumline.plan.schedule import Curve
from drumline.plan.steps import Clock, Place, whole_samples
from drumline.recipe.schema import Recipe

if TYPE_CHECKING:
    from drumline.plan.order import Indices

PLAN_VERSION = 1


@dataclass(frozen=True)
class SplitInvariance:
    """Whether training is the same up to rounding under another split, and why or why not.

    `unknown`: the project's own loss decides it, which `drumline verify` tries.
    """

    level: Literal["rounding", "none", "unknown"]
    why: str


@dataclass(frozen=True)
class RampFacts:
    """The steps after those of the stage before, up to `until_step`, with a split of their own."""

    until_step: int
    effective: int
    per_device: int
    accumulation: int


@dataclass(frozen=True)
class BatchFacts:
    """The split; effective = per_device × gpus × accumulation. `ramp`: the stages before it."""

    effective: int
    per_device: int
    gpus: int
    accumulation: int
    remainder: Literal["keep", "drop", "carry"]
    nodes: int
    ramp: list[RampFacts] = field(default_factory=list)

    def per_device_at(self, step: int) -> int:
        """`per_device` of a step."""
        stage = next((stage for stage in self.ramp if step <= stage.until_step), None)
        return stage.per_device if stage else self.per_device

    @property
    def split(self) -> Split:
        """The three factors."""
        return Split(self.per_device, self.gpus, self.accumulation)


@dataclass(frozen=True)
class StepFacts:
    """Counts of optimizer steps and samples; fields that need the number of samples are None without it."""

    samples: int | None
    per_epoch: int | None
    epochs: float | None
    total: int
    forwards_per_step: int
    last_batch: int | None
    tokens_per_step: int | None
    warmup: int


FITS: dict[Verdict, bool | None] = {
    "fits": True,
    "tight": True,
    "does_not_fit": False,
    "unknown": None,
}
"""Whether a plan may start, by verdict; None if nothing is known."""

VERDICT_WORDS: dict[Verdict, str] = {
    "fits": "fits",
    "tight": "tight",
    "does_not_fit": "does not fit",
    "unknown": "capacity unknown",
}


@dataclass(frozen=True)
class MemoryFacts:
    """Peak memory of a rank in bytes.

    `verdict` compares `device` with the capacity: `tight` if the expected bytes fit and the high ones do not;
    `fits` is true for `fits` and `tight`, null for `unknown`.
    `parts`: allocated bytes at the peak by part. `phases`: the peak of allocated bytes in each phase.
    `basis`: for each range, where it comes from. `host_bytes`: pinned host memory of one rank, for its part
    of an asynchronous checkpoint and for offloaded state.
    """

    unit: str
    parts: dict[str, int]
    phases: dict[str, int]
    allocated: ByteRange | None
    reserved: ByteRange | None
    device: ByteRange | None
    capacity: int | None
    fits: bool | None
    method: Literal["closed-form", "traced", "measured", "unknown"]
    peak_phase: str | None
    why: str
    basis: dict[str, str]
    host_bytes: int | None
    verdict: Verdict = "unknown"  # the default is for plans that were written without one


@dataclass(frozen=True)
class Cost:
    """Size of the model, of a step and of a checkpoint; None if it cannot be computed from the recipe.

    `flops_per_step` is of one optimizer step on all ranks. `weights_bytes`: of a pretrained model's files,
    where they are at hand; `load_seconds`: to read and hand them out. `trained`: of the parameters, those of
    an adapter among both. `frozen_bytes`: of a checkpoint's, those of weights that are not trained, which a
    run writes once.
    """

    parameters: int | None
    flops_per_step: int | None
    checkpoint_bytes: int | None
    weights_bytes: int | None = None  # the defaults are for plans that were written without them
    load_seconds: float | None = None
    trained: int | None = None
    frozen_bytes: int = 0


@dataclass(frozen=True)
class Seconds:
    """A time as a range; hours where a field says so."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class TimeFacts:
    """Estimated time of an optimizer step and of the whole run; waiting for data is not counted.

    `parts`: seconds of a step by what they are spent on. `samples_per_s` and `tokens_per_s` are of all GPUs
    together, without padding. `hours`: of all steps, and of what is `beside` them: seconds of the run's
    evaluations (None: how many rows there are is not known) and of waiting for its saves. `energy_kwh`: of
    the boards at their full power. `basis`: where the rates come from. `cost`: of the GPU-hours, where a site
    states their price.
    """

    step_s: Seconds
    parts: dict[str, float]
    samples_per_s: float
    tokens_per_s: float | None
    mfu: float | None
    hours: Seconds
    gpu_hours: float
    energy_kwh: float | None
    basis: str
    cost: float | None = None
    beside: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteFacts:
    """What a plan takes from a site file: the price of a GPU for an hour, and measured bandwidths.

    Those are in GB/s (10^9 bytes a second), as `drumline doctor --preflight` measures them: bus bandwidths of
    an all-reduce `within` a node and `between` nodes, and of a `copy` from the host's memory to a GPU.
    """

    gpu_hour_price: float | None = None
    within: float | None = None
    between: float | None = None
    copy: float | None = None


NO_SITE = SiteFacts()


@dataclass(frozen=True)
class Advice:
    """One re-planned change at the same effective batch.

    `cost`: estimated GPU time divided by that of the plan (`plan/step_time.py`); above 1 costs more.
    `changes_training`: the samples of a step stay, but what is learnt from them is not the same.
    """

    change: dict[str, Any]
    device_high: int
    cost: float
    why: str
    verdict: Verdict = "unknown"
    changes_training: bool = False


@dataclass(frozen=True)
class SourceFacts:
    """A source of a mixture: prepared rows (None where that is not known), samples of an epoch (`share`)."""

    label: str
    rows: int | None
    share: int


def mean_of_quantiles(values: Sequence[int]) -> float:
    """The mean of what has these values at equal steps of its distribution."""
    if len(values) == 1:
        return values[0]
    return sum((a + b) / 2 for a, b in itertools.pairwise(values)) / (len(values) - 1)


@dataclass(frozen=True)
class DataFacts:
    """The prepared data: content fingerprint, cache path, number of validation samples.

    `row_tokens`: input tokens of the longest row that the run reads. `row_lengths`: of training rows at 0 %,
    1 %, … 100 % of them, where rows are padded. `mixture`: its sources, in the order of their
    rows. `rows`: content fingerprint of the training rows alone, of `fingerprint` a part.
    """

    fingerprint: str | None
    cache: str | None
    validation_samples: int | None
    row_tokens: int | None = None  # the defaults are for plans that were written without them
    row_lengths: list[int] | None = None
    rows: str | None = None
    mixture: list[SourceFacts] = field(default_factory=list)

    def padding(self, rows: int) -> float | None:
        """Expected share of padding in micro-batches of so many rows drawn at random; None if not known.

        Of 1 − mean / E[max], where the largest of `rows` lengths has the distribution F to the power `rows`.
        """
        if not self.row_lengths:
            return None
        last = len(self.row_lengths) - 1
        pairs = list(itertools.pairwise(self.row_lengths))
        mean = mean_of_quantiles(self.row_lengths)
        most = sum(
            (a + b) / 2 * (((n + 1) / last) ** rows - (n / last) ** rows)
            for n, (a, b) in enumerate(pairs)
        )
        return max(0.0, 1 - mean / most) if most else None


@dataclass(frozen=True)
class StartFacts:
    """The checkpoint of another run that this one begins from (`start_from`).

    `run`: that run's folder. `checkpoint`: its checkpoint's folder; `sha256`: of its manifest.
    `training_sha256`: what that run trained. `place`: where this run's steps are counted on from, the very
    beginning if only weights are taken. `continues_data`: whether the samples go on, since the data and their
    order are those of that run. `rate`: that run's learning rate at the step, where it is known.
    """

    run: str
    checkpoint: str
    sha256: str
    step: int
    what: Literal["weights", "state"]
    training_sha256: str
    place: Place
    continues_data: bool = False
    rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """All that a launcher or a worker needs; see `drumline schema --plan` for its JSON Schema."""

    plan_version: int
    recipe: Recipe
    recipe_sha256: str
    training_sha256: str
    split_invariance: SplitInvariance
    batch: BatchFacts
    steps: StepFacts
    memory: MemoryFacts
    schedule: Curve
    cost: Cost
    data: DataFacts
    advice: list[Advice]
    warnings: list[str]
    start: StartFacts | None = None
    time: TimeFacts | None = None
    site: SiteFacts = NO_SITE

    @property
    def mesh(self) -> Mesh:
        """The layout of ranks over nodes, replicas of the state and samples."""
        return mesh_of(self.recipe, self.batch.gpus, self.batch.nodes)

    @property
    def first_step(self) -> int:
        """The run's first step: the one after those of the run that it goes on from, or 1."""
        return self.start.place.step + 1 if self.start else 1

    def clock(self) -> Clock:
        """The Clock that maps steps to slots; raises PlanError if the number of samples is not known."""
        if self.steps.samples is None:
            raise PlanError("the number of samples is not known; run `drumline prepare` first")
        return clock_of(self.recipe, self.steps.samples, self.batch.effective, self.start)

    def samples_at(self, first: int, end: int) -> "Indices":
        """Prepared rows at the slots first..end (exclusive) of the order: int64."""
        from drumline.plan import order

        assert self.steps.samples is not None
        sources = [(own.rows or 0, own.share) for own in self.data.mixture]
        return order.slot_indices(self.recipe.seed, self.steps.samples, first, end, sources)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `drumline plan --json` prints."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "recipe"
        }
        plain = {
            key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for key, value in fields.items()
        }
        plain["advice"] = [dataclasses.asdict(item) for item in self.advice]
        recipe = self.recipe.model_dump(by_alias=True)
        return {"plan_version": self.plan_version, "recipe": recipe, **plain}

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def read_start(plain: Any) -> StartFacts:
    """Read StartFacts from a record; raises PlanError if they are invalid."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(StartFacts).validate_python(plain)
    except ValidationError as error:
        raise PlanError(f"start: {str(error).splitlines()[0]}") from None


def clock_of(
    recipe: Recipe, samples: int, effective: int, start: StartFacts | None = None
) -> Clock:
    """The Clock of a recipe over so many samples, with this effective batch after its ramp."""
    epochs = recipe.duration.epochs
    return Clock(
        samples,
        effective,
        recipe.batch.remainder,
        whole_samples(samples, epochs) if epochs else None,
        start.place if start else Place(),
        tuple((stage.until_step, stage.effective) for stage in recipe.batch.ramp),
    )


def read_plan(text: str) -> Plan:
    """Read a Plan from `to_json`'s text; raises PlanError if it is invalid or of another version."""
    from pydantic import TypeAdapter

    try:
        plain = parse_json(text)
        found = plain.get("plan_version") if isinstance(plain, dict) else None
        if found != PLAN_VERSION:
            raise PlanError(f"plan_version {found}: this drumline reads version {PLAN_VERSION}")
        return TypeAdapter(Plan).validate_json(text)
    except ValueError as error:
        raise PlanError(f"this is not a plan: {str(error).splitlines()[0]}") from None
