"""The types of record.json: validated when a record is written and when it is read.

Keys that these models lack are kept: a later version may have added them. Numbers that are not finite are
refused, since they are not JSON.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

SLURM_ID = r"^[0-9]{1,15}(_[0-9]{1,7})?$"
KUBERNETES_ID = r"^(job|jobset|trainjob)/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
NAMESPACE = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""A time in ISO format."""
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=1 << 20)]
Outcome = Literal["finished", "stopped", "failed"] | None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class SlurmJob(_Part):
    """A submitted Slurm job; its id goes to scancel."""

    target: Literal["slurm"]
    id: Annotated[str, Field(pattern=SLURM_ID)]


class KubernetesJob(_Part):
    """A submitted Kubernetes object; its id and namespace go to kubectl."""

    target: Literal["kubernetes"]
    id: Annotated[str, Field(pattern=KUBERNETES_ID)]
    namespace: Annotated[str, Field(pattern=NAMESPACE)]


class Split(_Part):
    """per_device × gpus × accumulation of an attempt."""

    per_device: Count
    gpus: Count
    accumulation: Count


class Attempt(_Part):
    """One start of the run's processes."""

    number: Count
    cause: Text
    split: Split
    started: Moment
    ended: Moment | None
    outcome: Outcome
    kind: Text | None = None
    step: Count | None = None
    from_step: Count | None = None
    checkpoint: Text | None = None
    message: Text | None = None
    command: list[Text] = []
    environment: dict[str, str] = {}
    cleared: list[str] = []
    changed: dict[str, list[Any]] = {}
    start_s: dict[str, Annotated[float, Field(strict=False)]] | None = None
    memory: dict[str, Any] | None = None
    devices: list[dict[str, Any]] = []


class Data(_Part):
    """What the run read."""

    fingerprint: Text | None
    tokenizer: Text | None = None
    samples: Count | None = None


class Code(_Part):
    """The code that the run used, as `runs/code.py` reads it."""

    commit: Text | None = None
    remote: Text | None = None
    project: Text = "."
    diff: str = ""
    untracked: dict[str, str] = {}
    left_out: dict[str, str] = {}
    factories: dict[str, str] = {}


class Gpu(_Part):
    """One GPU that nvidia-smi lists."""

    name: str
    driver: str
    memory: str


class Hardware(_Part):
    """The machine on which the run was started."""

    gpus: list[Gpu] = []
    cpu: str | None = None
    platform: str | None = None
    host: str | None = None


class Weights(_Part):
    """Checksum and sums of the final weights."""

    step: Count
    checksum: str | None = None
    sha256: str | None = None
    elements: Count
    norm: Annotated[float, Field(strict=False)]
    sketch: list[Annotated[float, Field(strict=False)]]


class Steps(_Part):
    """The plan's steps."""

    total: Count


class Batch(_Part):
    """The plan's batch."""

    effective: Count
    per_device: Count
    gpus: Count
    accumulation: Count


class PlanFacts(_Part):
    """What of the first attempt's plan other commands show."""

    steps: Steps
    batch: Batch


class Parent(_Part):
    """The run that this one reproduces."""

    run: str | None = None


class Ancestor(_Part):
    """A run before this one, and the step at which this one, or the next ancestor, began from it."""

    run: str
    step: Count
    what: Literal["weights", "state"]
    recipe: dict[str, Any] | None = None
    training_sha256: str | None = None


class Reproduced(_Part):
    """The verdict of `drumline reproduce`."""

    verdict: str


class BegunAnew(_Part):
    """A beginning at step 1 by `resume --from-scratch`: the first attempt of it, and what was kept."""

    attempt: Count
    kept: list[str]


class RecipeName(_Part):
    """The recipe, of which only the name is read without validating it as a recipe."""

    recipe: str


class Record(_Part):
    """record.json."""

    record_version: Literal[1] = 1
    recipe: RecipeName
    recipe_sha256: str | None = None
    training_sha256: str
    plan: PlanFacts
    data: Data
    code: Code | None = None
    versions: dict[str, str | None] = {}
    hardware: Hardware | None = None
    container: str | None = None
    command: list[str] = []
    parent: Parent | None = None
    ancestry: list[Ancestor] = []
    created: Moment | None = None
    attempts: list[Attempt]
    restarts: Count
    outcome: Outcome
    weights: Weights | None = None
    jobs: list[Annotated[SlurmJob | KubernetesJob, Field(discriminator="target")]] = []
    reproduced: Reproduced | None = None
    begun_anew: list[BegunAnew] = []


def why_no_record(found: Any) -> str:
    """What is wrong with a record, by the path of the first wrong key; "" if nothing is."""
    try:
        Record.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ""
