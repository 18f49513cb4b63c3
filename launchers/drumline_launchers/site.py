"""A site: a cluster's properties, in a YAML file that is validated like a recipe but never part of one."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from drumline.recipe.section import Count, Name, Positive, Section, Slug

Line = Annotated[str, Field(pattern=r"^[^\x00\n\r]*$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[^\n\r]*)?$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:+@-]*$")]
SlurmList = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:+@,\[\]-]*$")]
Adapters = Annotated[str, Field(pattern=r"^[\^=]{0,2}[A-Za-z0-9_][A-Za-z0-9_.:,-]*$")]


def _text_of_number(value: Any) -> Any:
    """YAML reads `60` as a number; Slurm's own forms of a limit are text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


TimeLimit = Annotated[
    str,
    BeforeValidator(_text_of_number),
    Field(
        pattern=r"^([0-9]+|[0-9]+:[0-9]{2}|[0-9]+:[0-9]{2}:[0-9]{2}|[0-9]+-[0-9]{1,2}(:[0-9]{2}(:[0-9]{2})?)?|UNLIMITED|INFINITE)$"
    ),
]
"""Minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]], or UNLIMITED."""
Memory = Annotated[str, BeforeValidator(_text_of_number), Field(pattern=r"^[0-9]+[KMGT]?$")]
"""Megabytes, or with a unit; 0 is all of a node's memory."""
Mail = Annotated[str, Field(pattern=r"^[A-Za-z0-9._%+-]+(@[A-Za-z0-9.-]+)?$")]


class Container(Section):
    """The image that the ranks run in; `python` is the interpreter inside it."""

    kind: Literal["apptainer", "pyxis"]
    image: Name
    python: Name = "python"
    mounts: list[Line] = Field(default_factory=list)


class Fabric(Section):
    """The network: interfaces of NCCL and gloo, InfiniBand adapters of NCCL."""

    interface: Adapters | None = None
    infiniband: Adapters | None = None


class Bandwidths(Section):
    """Measured links in GB/s, as `drumline doctor --preflight` prints them: the plan's step time uses them.

    `within`, `between`: bus bandwidths of an all-reduce within a node and between nodes. `copy`: from the
    host's memory to a GPU.
    """

    within: Positive | None = None
    between: Positive | None = None
    copy_: Positive | None = Field(default=None, alias="copy")


class SecretReference(Section):
    """A key of a Kubernetes Secret, by name."""

    name: Name
    key: Name


class Kubernetes(Section):
    """Namespace, image and volumes of a Kubernetes cluster.

    `kind`: a Kubeflow TrainJob (of `runtime`), a JobSet, or an Indexed Job. `claim`: the volume claim that
    holds run folders, mounted at `mount`. `secrets` maps environment variables to keys of Secrets.
    """

    kind: Literal["trainjob", "jobset", "job"] = "trainjob"
    namespace: Name = "default"
    image: Name
    runtime: Name = "torch-distributed"
    claim: Name
    mount: Annotated[str, Field(pattern=r"^/[^\n\r:]*$")] = "/runs"
    shared_memory: Annotated[str, Field(pattern=r"^[0-9]+(Mi|Gi)$")] = "16Gi"
    gpu_resource: Name = "nvidia.com/gpu"
    service_account: Name | None = None
    node_selector: dict[str, str] = Field(default_factory=dict)
    secrets: dict[Variable, SecretReference] = Field(default_factory=dict)


MailEvent = Literal["begin", "end", "fail", "requeue", "time_limit", "all"]


class MailRules(Section):
    """Who gets Slurm's mails, and about what."""

    user: Mail
    events: list[MailEvent] = Field(default_factory=lambda: list[MailEvent](("end", "fail")))


SITE = "site.yaml"
"""The site's copy in a run folder."""
SLOW_NODE_RATIO = 0.8


class Site(Section):
    """Partition, hardware, limits and set-up of a cluster.

    `environment`: names of the submitter's variables to pass on. `setup`: shell lines to run before anything
    starts. `sbatch`: further sbatch options, one per item. `warning_s`: seconds before the time limit at
    which the run saves. `preflight`: a job first measures its nodes' links; a node below `slow_node_ratio`
    times the median of the others is slow. `gpu_hour_price`: of a GPU for an hour, in whatever currency.
    """

    site: Slug
    partition: SlurmList | None = None
    account: SlurmName | None = None
    qos: SlurmName | None = None
    gpu: str | None = None
    gpu_type: SlurmName | None = None
    gpus_per_node: Count | None = None
    cpus_per_node: Count | None = None
    memory_per_node: Memory | None = None
    time_limit: TimeLimit | None = None
    warning_s: Count = 120
    setup: list[Line] = Field(default_factory=list)
    python: Name | None = None
    container: Container | None = None
    kubernetes: Kubernetes | None = None
    environment: list[Variable] = Field(default_factory=list)
    fabric: Fabric = Fabric.model_construct()
    bandwidths: Bandwidths = Bandwidths.model_construct()
    exclude: list[SlurmList] = Field(default_factory=list)
    runs: str | None = None
    cache: str | None = None
    mail: MailRules | None = None
    sbatch: list[Option] = Field(default_factory=list)
    preflight: bool = False
    slow_node_ratio: Annotated[float, Field(gt=0, lt=1)] = SLOW_NODE_RATIO
    gpu_hour_price: Annotated[float, Field(gt=0)] | None = None

    def to_plain(self, *, only_stated: bool = False) -> dict[str, Any]:
        """The site as the mapping that its file holds; `only_stated`: without keys that the file left out."""
        return self.model_dump(by_alias=True, exclude_unset=only_stated)
