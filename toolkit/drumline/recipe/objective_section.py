"""The recipe's `objective` and `loss` sections: what is minimised, and how it is computed."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from drumline.recipe.section import (
    AddedLater,
    FactoryName,
    Fraction,
    NonNegative,
    Positive,
    Section,
    require_factory,
)


@dataclass(frozen=True)
class ObjectiveFacts:
    """Properties of an objective, so that other code need not compare names.

    `keys`: of the recipe's section that it takes, with their defaults. `sequences`: of tokens that a forward
    reads of a row. `unpaired`: of a preference, whether rows have one completion and a label.
    `baseline_sequences`: read of a row without a gradient before the step, for a number that all its losses
    share. `metrics`: what steps and evaluations report beside the loss, if not what the task's are.
    """

    keys: dict[str, Any]
    sequences: int = 1
    unpaired: bool | None = None
    baseline_sequences: int = 0
    metrics: tuple[str, ...] = ()

    @property
    def has_reference(self) -> bool:
        """Whether losses compare with the log-probabilities of the model before training."""
        return "reference" in self.keys


_REFERENCE = {"reference": "stored"}
_OF_PAIRS = (
    "reward_accuracy",
    "reward_margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
)
OBJECTIVES = {
    "cross_entropy": ObjectiveFacts({}),
    "mse": ObjectiveFacts({}),
    "bce": ObjectiveFacts({}),
    "dpo": ObjectiveFacts(
        {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0}
        | _REFERENCE,
        sequences=2,
        unpaired=False,
        metrics=_OF_PAIRS,
    ),
    "ipo": ObjectiveFacts(
        {"beta": 0.1, "sft_weight": 0.0} | _REFERENCE,
        sequences=2,
        unpaired=False,
        metrics=_OF_PAIRS,
    ),
    "orpo": ObjectiveFacts({"beta": 0.1}, sequences=2, unpaired=False, metrics=_OF_PAIRS),
    "simpo": ObjectiveFacts(
        {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
        sequences=2,
        unpaired=False,
        metrics=_OF_PAIRS,
    ),
    "kto": ObjectiveFacts(
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | _REFERENCE,
        unpaired=True,
        baseline_sequences=1,
        metrics=tuple(name for name in _OF_PAIRS if name != "reward_margin"),
    ),
    "custom": ObjectiveFacts({"factory": None, "options": {}}),
}
"""Properties of each value of `objective.name`; the code of the objectives is in `train/objectives/`."""

_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
_LOSS_TYPES = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]


class Objective(Section):
    """What is minimised; by default what the task is for.

    `mse`: the mean squared error of a row's outputs. `bce`: the mean binary cross-entropy of a row's labels.
    `custom` is a function of the recipe's project (`factory`, with `options`).

    Of preferences: `dpo` (Rafailov et al. 2023), with the loss types of TRL; `ipo` (Azar et al. 2023); `orpo`
    (Hong et al. 2024), whose λ is `beta`; `simpo` (Meng et al. 2024), with its target margin `gamma`; `kto`
    (Ethayarajh et al. 2024), of rows with one completion and a label. `label_smoothing`: the share of pairs
    whose order is taken to be wrong. `sft_weight`: times the chosen completion's cross-entropy, a mean over
    its tokens, is added. `reference`: log-probabilities of the model before training, computed once and
    `stored`, or of the model with its `adapter_off` in each step.
    """

    name: Literal["cross_entropy", "mse", "bce", "dpo", "ipo", "orpo", "simpo", "kto", "custom"] = (
        "cross_entropy"
    )
    factory: FactoryName | None = None
    options: dict[str, Any] = {}
    beta: Annotated[Positive | None, AddedLater()] = None
    loss_type: Annotated[_LOSS_TYPES | None, AddedLater()] = None
    label_smoothing: Annotated[Annotated[float, Field(ge=0, lt=0.5)] | None, AddedLater()] = None
    gamma: Annotated[NonNegative | None, AddedLater()] = None
    sft_weight: Annotated[NonNegative | None, AddedLater()] = None
    desirable_weight: Annotated[Positive | None, AddedLater()] = None
    undesirable_weight: Annotated[Positive | None, AddedLater()] = None
    reference: Annotated[Literal["stored", "adapter_off"] | None, AddedLater()] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The defaults of the named objective."""
        facts = OBJECTIVES.get(str(values.get("name"))) if isinstance(values, dict) else None
        if facts is None or facts.unpaired is None:
            return values
        stated = {key: value for key, value in values.items() if value is not None}
        return {**facts.keys, **stated}

    @model_validator(mode="after")
    def _keys_belong_to_the_name(self) -> Self:
        require_factory(self, self.name == "custom", ("factory", "options"))
        keys = {key for facts in OBJECTIVES.values() for key in facts.keys}
        foreign = sorted(
            key
            for key in keys - {"factory", "options"} - set(self.facts.keys)
            if getattr(self, key) is not None
        )
        if foreign:
            takes = ", ".join(self.facts.keys) or "no key of its own"
            raise ValueError(
                f"{', '.join(foreign)} has no meaning for {self.name}, which takes {takes}. Nearest: "
                + " ".join(f"objective.{key}=null" for key in foreign)
            )
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing is of loss_type {', '.join(_SMOOTHED)}, not {self.loss_type}. Nearest: "
                "objective.label_smoothing=0.0"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "loss_type exo_pair needs label_smoothing above 0, because its targets are (1 - it, it). "
                "Nearest: objective.label_smoothing=0.001"
            )
        return self

    @property
    def facts(self) -> ObjectiveFacts:
        """Properties of this objective."""
        return OBJECTIVES[self.name]


class Loss(Section):
    """How the cross-entropy is computed; `chunked` never keeps all logits in memory at once.

    `label_smoothing`: share of each target that is spread evenly over all classes or tokens, in training.
    `z_loss`: this times the squared logarithm of the softmax' denominator is added to each token's loss, in
            training.
    """

    chunked: bool = False
    label_smoothing: Annotated[Fraction, AddedLater()] = 0.0
    z_loss: Annotated[NonNegative, AddedLater()] = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether training counts the cross-entropy alone."""
        return not (self.label_smoothing or self.z_loss)

    @model_validator(mode="after")
    def _one_regulariser(self) -> Self:
        if self.label_smoothing and self.z_loss:
            raise ValueError(
                "loss.label_smoothing and loss.z_loss do not go together. Nearest: loss.label_smoothing=0.0"
            )
        return self
