"""The recipe's keys, their types and the rules that one section can check alone.

Everything is strict and frozen: an unknown key, a float for a count, or a string for a number is refused.
Rules across sections (the batch equation, the strategy table) are in `drumline.plan`.
"""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from drumline.recipe.data_section import ALONE, TASKS, Data
from drumline.recipe.evaluation_section import After, EarlyStopping, Evaluation
from drumline.recipe.model_section import Model
from drumline.recipe.objective_section import Loss, Objective
from drumline.recipe.schedule_section import Duration, Schedule
from drumline.recipe.section import (
    AddedLater,
    Count,
    Epochs,
    FactoryName,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Samples,
    Section,
    Slug,
    require_factory,
)


class RampStage(Section):
    """The first steps of a run, up to `until_step`, with an effective batch of their own."""

    until_step: Count
    effective: Samples


class Batch(Section):
    """The batch equation: effective = per_device × gpus × accumulation; missing terms are derived.

    `ramp`: stages with other batches before it, in order; each is split over the same GPUs.
    """

    effective: Samples | None = None
    per_device: Samples | None = None
    gpus: Samples | None = None
    accumulation: Samples | None = None
    remainder: Literal["keep", "drop", "carry"] = "keep"
    weighting: Literal["token", "sample"] = "token"
    ramp: Annotated[list[RampStage], AddedLater()] = []

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        steps = [stage.until_step for stage in self.ramp]
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"ramp: until_step {', '.join(map(str, steps))} do not ascend")
        return self


class StartFrom(Section):
    """Begin from a checkpoint of another run, which may have trained something else.

    `run`: its folder, or that of one of its checkpoints. `step`: which checkpoint; by default the newest.
    `weights`: what the model has learnt, for a training of its own from step 1. `state`: optimizer, step and
    place in the data as well, so that the steps are counted on. `training_sha256`: what that run trained; it
    is filled in, and checked where it is stated.
    """

    run: Name
    step: Count | None = None
    what: Literal["weights", "state"] = "weights"
    training_sha256: str | None = None


class NodeRange(Section):
    """The fewest and the most nodes that a scheduler may give a run."""

    min: Count
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Card(Section):
    """A kind of GPU that drumline's table lacks, stated by hand.

    `memory_gib`: what a process can use, as torch reports it. `bf16_tflops`: dense peak; null if it has none.
    """

    name: Slug
    memory_gib: Positive
    bf16_tflops: Positive | None = None


class Cluster(Section):
    """The kind of device, how many of them a node has, and the number of nodes."""

    gpu: str | Card = "cpu"
    gpus_per_node: Count | None = None
    nodes: Count | NodeRange | None = None

    @property
    def gpu_name(self) -> str:
        """The device's name, also of one that is stated by hand."""
        return self.gpu.name if isinstance(self.gpu, Card) else self.gpu


class Strategy(Section):
    """How parameters, gradients and optimizer state are distributed over the ranks.

    Under FSDP2, `reshard`: when gathered weights are freed, after each forward, each backward, or the last
    backward of a step; `reduce`: whether gradients are reduced in each micro-batch or once in a step.
    """

    name: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    shard: Literal["all", "node"] = "all"
    offload: Literal["none", "optimizer"] = "none"
    reshard: Annotated[Literal["forward", "backward", "step"], AddedLater()] = "forward"
    reduce: Annotated[Literal["micro_batch", "step"], AddedLater()] = "micro_batch"

    @model_validator(mode="after")
    def _keys_belong_to_the_strategy(self) -> Self:
        if self.reshard != "forward" and self.name != "fsdp":
            raise ValueError(f"reshard: {self.reshard} belongs to strategy fsdp, not {self.name}")
        if self.reduce != "micro_batch" and self.name != "fsdp":
            raise ValueError(f"reduce: {self.reduce} belongs to strategy fsdp, not {self.name}")
        if self.offload != "none" and not self.name.startswith("zero"):
            raise ValueError(f"offload belongs to zero1, zero2 and zero3, not {self.name}")
        if self.shard == "node" and self.name != "fsdp":
            raise ValueError(f"shard: node belongs to strategy fsdp, not {self.name}")
        return self


class LrScaling(Section):
    """Scales the peak learning rate from a reference batch: lr × B/ref (linear) or lr × sqrt(B/ref)."""

    rule: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: Count | None = None

    @model_validator(mode="after")
    def _rule_has_its_reference(self) -> Self:
        if (self.rule == "none") != (self.reference_batch is None):
            raise ValueError(
                f"rule {self.rule} {'takes no' if self.rule == 'none' else 'needs a'} "
                f"reference_batch (it is {self.reference_batch})"
            )
        return self


class ParameterGroup(Section):
    """Parameters with a rate or a weight decay of their own; `match` is a pattern of their names.

    `lr_ratio`: of the schedule's rate. `weight_decay`: instead of the optimizer's, also for vectors.
    """

    match: Name
    lr_ratio: NonNegative = 1.0
    weight_decay: NonNegative | None = None


class Optimizer(Section):
    """The update rule. Weight decay acts on tensors of two or more dimensions only, unless `groups` say more.

    The first of `groups` that matches a parameter holds for it. `layer_decay`: the rate of each layer is this
    times that of the layer above it. `muon` orthogonalises the momentum of matrices in the layers and treats
    all else as adamw does, at the same rate.

    `custom` is a function of the recipe's project (`factory`, with `options`): it gets the parameter groups
    and the peak learning rate, and returns a torch optimizer. `states`: how many tensors of a parameter's
    size it keeps per parameter, for the memory estimate.
    """

    name: Literal["adamw", "adam", "sgd", "adamw_8bit", "adafactor", "lion", "muon", "custom"] = (
        "adamw"
    )
    lr: Positive
    weight_decay: NonNegative = 0.0
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    momentum: Fraction = 0.0
    nesterov: bool = False
    max_grad_norm: Positive | None = 1.0
    implementation: Literal["fused", "foreach"] | None = None
    lr_scaling: LrScaling = LrScaling.model_construct()
    groups: Annotated[list[ParameterGroup], AddedLater()] = []
    layer_decay: Annotated[float, Field(gt=0, le=1), AddedLater()] = 1.0
    factory: Annotated[FactoryName | None, AddedLater()] = None
    options: Annotated[dict[str, Any], AddedLater()] = {}
    states: Annotated[int | None, Field(ge=0, le=16), AddedLater()] = None

    @model_validator(mode="after")
    def _keys_belong_to_the_rule(self) -> Self:
        require_factory(self, self.name == "custom", ("factory", "options", "states"))
        own = {
            "adamw": {"betas", "eps"},
            "adam": {"betas", "eps"},
            "adamw_8bit": {"betas", "eps"},
            "lion": {"betas"},
            "muon": {"betas", "eps", "momentum"},
            "sgd": {"momentum", "nesterov"},
        }
        foreign = set().union(*own.values()) - own.get(self.name, set())
        foreign &= self.model_fields_set
        changed = sorted(
            key for key in foreign if getattr(self, key) != type(self).model_fields[key].default
        )
        if changed:
            raise ValueError(f"{', '.join(changed)} has no meaning for {self.name}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class Ema(Section):
    """An exponential moving average of the trained weights, in fp32, beside the weights.

    average ← `decay` × average + (1 − decay) × weight after each step. `evaluate`: evaluations are made with
    the averages as well.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]
    evaluate: bool = True


class Checkpoint(Section):
    """When to save and what to keep: the last n, the best n, and steps divisible by `keep_every`."""

    every_steps: Count | None = None
    every_epochs: Annotated[Epochs | None, AddedLater()] = None
    every_minutes: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] | None = None
    keep_last: Count = 2
    keep_best: Annotated[int, Field(ge=0)] = 1
    keep_every: Count | None = None
    asynchronous: bool = Field(default=True, alias="async")
    on_error: Literal["stop", "continue"] = "stop"


class Anomalies(Section):
    """Steps with a loss or gradient that is not finite are skipped; `max_skipped` in a row end the run.

    A spike is a loss more than `spike_sigma` standard deviations above the mean of the last `spike_window`
    losses; it is logged, and skipped with `skip_spikes`.
    """

    max_skipped: Count = 20
    spike_sigma: Positive | None = 6.0
    spike_window: Annotated[int, Field(ge=2, le=10000)] = 100
    skip_spikes: bool = False


class Launch(Section):
    """Which launcher starts the processes, and when the supervisor restarts the run or reports a rank.

    `hang_timeout_s`: how long a rank may stay in one phase. `hang_factor`: in a step, this many times the
    median step time is the limit, if that is shorter. `straggler_ratio`: a rank is reported whose forward
    passes take more than this many times the median of all ranks.
    """

    launcher: Literal["torchrun", "accelerate", "deepspeed"] = "torchrun"
    max_restarts: Annotated[int, Field(ge=0)] = 3
    hang_timeout_s: Annotated[float, Field(gt=0, le=10**7, allow_inf_nan=False)] = 600.0
    hang_factor: Annotated[float, Field(ge=2)] | None = None
    straggler_ratio: Annotated[float, Field(gt=1)] | None = 2.0


class Wandb(Section):
    """Weights & Biases: project, entity and mode; a recipe never contains its API key."""

    project: Name
    entity: Name | None = None
    mode: Literal["online", "offline"] = "offline"


class Logging(Section):
    """How often metrics are flushed and shown, which trackers get them, and what else is measured.

    `noise_scale`: estimate the gradient noise scale, which tells how much a larger batch would help.
    """

    every_steps: Count = 10
    wandb: Wandb | None = None
    tensorboard: bool = False
    noise_scale: bool = False


class Recipe(Section):
    """One training as the user asks for it; unset fields are resolved by `drumline.plan`.

    `project`: the folder of the recipe's own code (its factories); default: the recipe's folder.
    """

    recipe: Slug
    schema_version: Annotated[int, Field(ge=1, le=1)] = Field(alias="schema")
    description: str = ""
    project: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: Model
    data: Data
    batch: Batch
    cluster: Cluster = Cluster.model_construct()
    strategy: Strategy = Strategy.model_construct()
    precision: Literal["fp32", "bf16", "bf16-pure", "fp16"] = "fp32"
    optimizer: Optimizer
    objective: Annotated[Objective, AddedLater()] = Objective.model_construct()
    loss: Loss = Loss.model_construct()
    schedule: Schedule = Schedule.model_construct()
    duration: Duration
    ema: Annotated[Ema | None, AddedLater()] = None
    evaluation: Evaluation | None = None
    early_stopping: EarlyStopping | None = None
    checkpoint: Checkpoint = Checkpoint.model_construct()
    anomalies: Anomalies = Anomalies.model_construct()
    launch: Launch = Launch.model_construct()
    logging: Logging = Logging.model_construct()
    start_from: Annotated[StartFrom | None, AddedLater()] = None

    @property
    def after(self) -> list[After]:
        """The commands that checkpoints are owed."""
        return self.evaluation.after if self.evaluation else []

    @property
    def row_evaluation(self) -> Evaluation | None:
        """The section, if rows are evaluated."""
        return self.evaluation if self.evaluation and self.evaluation.has_rows else None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_objective(cls, values: Any) -> Any:
        """The objective of the task, where none is stated."""
        data = values.get("data") if isinstance(values, dict) else None
        facts = TASKS.get(str(data.get("task"))) if isinstance(data, dict) else None
        if facts is None or facts.objectives[0] == "cross_entropy":
            return values
        stated = values.get("objective")
        if isinstance(stated, dict | None) and not (stated or {}).get("name"):
            return {**values, "objective": {**(stated or {}), "name": facts.objectives[0]}}
        return values

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> Self:
        if self.early_stopping and not self.row_evaluation:
            raise ValueError("early_stopping needs an evaluation section")
        if self.row_evaluation and self.data.validation == 0 and not self.data.evaluation:
            raise ValueError(
                "evaluation needs data.validation above 0, such as 0.01, or data.evaluation"
            )
        if self.data.evaluation and not self.row_evaluation:
            raise ValueError(
                "data.evaluation is never evaluated. Nearest: evaluation.every_steps=100"
            )
        return self

    @model_validator(mode="after")
    def _metric_is_reported(self) -> Self:
        metric = self.early_stopping.metric if self.early_stopping else ""
        named = [name for name in self.data.evaluation or () if name != ALONE]
        if self.data.mixture and self.data.validation:
            named = list(self.data.sources())
        if self.ema and self.ema.evaluate:
            if "ema" in named:
                raise ValueError(
                    "ema: a set of evaluation data is called ema, too. Nearest: another name, or "
                    "ema.evaluate=false"
                )
            named.append("ema")
        if metric.count("/") == 2 and metric.split("/")[1] not in named:
            raise ValueError(
                f"early_stopping.metric: {metric}: no such evaluation; there are {', '.join(named) or 'none'}"
            )
        measured = metric.rpartition("/")[2]
        reported = ("loss", *self.data.metrics, *self.objective.facts.metrics)
        if metric and measured not in reported and not self.objective.factory:
            raise ValueError(
                f"early_stopping.metric: {metric}: task {self.data.task} has {', '.join(reported)}"
            )
        return self

    @model_validator(mode="after")
    def _objective_suits_the_task(self) -> Self:
        wanted, objective = self.data.facts.objectives, str(self.objective.name)
        if objective not in (*wanted, "custom"):
            raise ValueError(
                f"objective.name: {objective} is not for task {self.data.task}, which has "
                f"{', '.join(wanted)}. Nearest: objective.name={wanted[0]}"
            )
        if self.objective.reference == "adapter_off" and self.model.adapter is None:
            raise ValueError(
                "objective.reference: adapter_off needs model.adapter. Nearest: "
                "objective.reference=stored"
            )
        is_state = self.start_from is not None and self.start_from.what == "state"
        if self.objective.reference == "stored" and is_state:
            raise ValueError(
                "objective.reference: stored is the model before training, which start_from.what=state has "
                "left. Nearest: start_from.what=weights, whose weights are then the reference"
            )
        return self

    @model_validator(mode="after")
    def _duration_counts_tokens(self) -> Self:
        if self.duration.tokens and not self.data.facts.counts_tokens:
            raise ValueError(f"duration.tokens needs task causal_lm, not {self.data.task}")
        if self.duration.tokens and self.data.packs_documents:
            raise ValueError(
                "duration.tokens counts full rows, and rows of documents are not full. Nearest: "
                "duration.epochs or duration.steps"
            )
        return self

    @model_validator(mode="after")
    def _loss_suits_the_task(self) -> Self:
        objective = str(self.objective.name)
        added = "label_smoothing" if self.loss.label_smoothing else "z_loss"
        if not self.loss.is_plain and objective != "cross_entropy":
            whose = "the project's objective" if objective == "custom" else objective
            raise ValueError(
                f"loss.{added} is of cross_entropy, not of {whose}. Nearest: loss.{added}=0.0"
            )
        if self.loss.z_loss and not self.data.facts.is_per_token:
            raise ValueError("loss.z_loss is for tokens, not classes. Nearest: loss.z_loss=0.0")
        if self.loss.chunked and not self.data.facts.is_shifted:
            raise ValueError(
                f"loss.chunked: for a model that predicts the next token, not task {self.data.task}. "
                "Nearest: loss.chunked=false"
            )
        if self.loss.chunked and self.data.sequence_length is None:
            raise ValueError(
                "loss.chunked needs the length of the longest row. Nearest: state data.sequence_length, or "
                "loss.chunked=false"
            )
        return self

    @model_validator(mode="after")
    def _noise_suits_the_task(self) -> Self:
        has_one_text = (
            self.data.task not in ("custom", "preference", "seq2seq")
            and self.data.media_field is None
            and self.data.image is None
            and not self.data.packs_documents
        )
        if self.model.neftune_alpha and (self.model.source == "factory" or not has_one_text):
            raise ValueError(
                "model.neftune_alpha is for a row of one text's tokens, in a model of transformers. Nearest: "
                "model.neftune_alpha=null"
            )
        return self


def factories_of(recipe: Recipe) -> list[str]:
    """Return every `module:function` that the recipe names; a recipe can run no other code."""
    named = (
        recipe.model.factory,
        *recipe.model.edits,
        recipe.data.factory,
        *(own.factory for own in (recipe.data.evaluation or {}).values()),
        *(own.factory for own in recipe.data.mixture or ()),
        recipe.data.task_factory,
        recipe.data.image.transform if recipe.data.image else None,
        recipe.objective.factory,
        recipe.optimizer.factory,
    )
    return [name for name in named if name]


def commands_of(recipe: Recipe) -> list[str]:
    """Return every command that the recipe has run on its checkpoints."""
    return [" ".join(one.run) for one in recipe.after]
