"""The recipe's `data` section: sources, tasks, and what is evaluated."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from drumline.recipe.audio_section import Audio
from drumline.recipe.image_section import Image
from drumline.recipe.section import (
    AddedLater,
    Count,
    FactoryName,
    Fraction,
    Name,
    Positive,
    Samples,
    Section,
    Slug,
    require_only,
)

ALONE = "evaluation"
"""The name of an evaluation set that is not given one; its metrics have none in theirs."""


@dataclass(frozen=True)
class TaskFacts:
    """Properties of a task, so that other code need not compare task names.

    `is_per_token`: every token has a target (else each row has one or several). `head`: which of
    transformers' classes the model is. `objectives`: what can be minimised; the first if the recipe does not
    say. `is_masked`: rows are padded, so attention needs a mask. `counts_tokens`: every row has
    `sequence_length` tokens, so a duration in tokens is defined. `problem`: transformers' word for what a
    classifier's outputs are. `metrics`: what evaluations report beside the loss.
    """

    is_per_token: bool
    head: Literal["causal_lm", "classification", "token_classification", "masked_lm", "seq2seq"]
    objectives: tuple[str, ...] = ("cross_entropy",)
    is_masked: bool = False
    counts_tokens: bool = False
    problem: str | None = None
    metrics: tuple[str, ...] = ()

    @property
    def is_shifted(self) -> bool:
        """Whether a token's target is the token after it, so that a row's last token is no input."""
        return self.head == "causal_lm"

    @property
    def has_labels(self) -> bool:
        """Whether the head has as many outputs as the data have labels, and is new on a pretrained model."""
        return self.head in ("classification", "token_classification")


TASKS = {
    "causal_lm": TaskFacts(is_per_token=True, head="causal_lm", counts_tokens=True),
    "sft": TaskFacts(is_per_token=True, head="causal_lm"),
    "classification": TaskFacts(
        is_per_token=False, head="classification", is_masked=True, metrics=("accuracy",)
    ),
    "regression": TaskFacts(
        is_per_token=False,
        head="classification",
        objectives=("mse",),
        is_masked=True,
        problem="regression",
        metrics=("mae",),
    ),
    "multi_label": TaskFacts(
        is_per_token=False,
        head="classification",
        objectives=("bce",),
        is_masked=True,
        problem="multi_label_classification",
        metrics=("accuracy", "f1"),
    ),
    "preference": TaskFacts(
        is_per_token=True,
        head="causal_lm",
        objectives=("dpo", "ipo", "orpo", "simpo", "kto"),
    ),
    "token_classification": TaskFacts(
        is_per_token=True, head="token_classification", is_masked=True, metrics=("accuracy",)
    ),
    "masked_lm": TaskFacts(
        is_per_token=True, head="masked_lm", is_masked=True, metrics=("accuracy",)
    ),
    "seq2seq": TaskFacts(is_per_token=True, head="seq2seq", is_masked=True, metrics=("accuracy",)),
    "custom": TaskFacts(is_per_token=True, head="causal_lm"),
}
"""Properties of each value of `data.task`; the code of the tasks is in `data/tasks/`."""


MOST_WORKERS = 4
"""Processes that make samples while a rank trains, if the recipe does not say how many."""


_SOURCES = {
    "builtin": "name",
    "files": "path",
    "hub": "name",
    "factory": "factory",
    "dataset": "factory",
}
"""The key that names the data, by `source`."""


_NAMED_BY = ("name", "path", "factory", "config")
"""Keys that never hold for another source as well."""


_RECORDED = {
    "name",
    "path",
    "factory",
    "options",
    "split",
    "text_field",
    "prompt_field",
    "label_field",
}
"""Keys that every resolved recipe states together, whatever its version."""


_OF_CHATS = {
    "messages_field": ("sft", "preference"),
    "train_on": ("sft",),
    "chat_template": ("sft", "preference"),
    "chat_template_options": ("sft", "preference"),
}
"""Keys of chats, and the tasks that take them."""

_OF_TASKS = {
    **_OF_CHATS,
    "chosen_field": ("preference",),
    "rejected_field": ("preference",),
    "label_names": ("token_classification", "classification"),
    "image_field": ("classification", "regression", "multi_label", "sft"),
    "image": ("classification", "regression", "multi_label", "sft"),
    "audio_field": ("classification", "regression", "multi_label", "seq2seq"),
    "audio": ("classification", "regression", "multi_label", "seq2seq"),
    "target_length": ("seq2seq",),
    "mask_probability": ("masked_lm",),
}
"""Keys that only some tasks take."""


class OtherSource(Section):
    """Data of their own; what is not stated here is as in `data`."""

    source: Literal["builtin", "files", "hub", "factory", "dataset"]
    name: Name | None = None
    path: str | list[str] | None = None
    factory: FactoryName | None = None
    options: dict[str, Any] = {}
    split: str | None = None
    config: Annotated[str | None, AddedLater()] = None
    text_field: str | None = None
    text_pair_field: Annotated[str | None, AddedLater()] = None
    image_field: Annotated[str | None, AddedLater()] = None
    audio_field: Annotated[str | None, AddedLater()] = None
    prompt_field: str | None = None
    completion_field: str | None = None
    chosen_field: Annotated[str | None, AddedLater()] = None
    rejected_field: Annotated[str | None, AddedLater()] = None
    label_field: str | None = None
    messages_field: str | None = None

    @model_validator(mode="after")
    def _source_has_its_key(self) -> Self:
        require_only(self, "source", self.source, _SOURCES)
        return self

    def within(self, data: "Data") -> "Data":
        """The data section of this source alone."""
        update = {
            key: getattr(self, key)
            for key in OtherSource.model_fields
            if getattr(self, key) is not None or key in _NAMED_BY
        }
        return data.model_copy(
            update={**update, "evaluation": None, "mixture": None, "samples": None}
        )


class EvaluationSet(OtherSource):
    """Data that are evaluated and never trained; what is not stated here is as in `data`."""

    @model_validator(mode="after")
    def _is_not_trained(self) -> Self:
        if self.source == "hub" and self.split is None:
            raise ValueError(
                "a set of the hub needs split, such as validation: data.split is trained"
            )
        return self


class MixtureSource(OtherSource):
    """One of several sources; what is not stated here is as in `data`.

    `weight`: its share of the samples of each epoch is this, divided by the sum of all weights. `label`: in
    the names of its metrics; by default made of the file's or data set's name.
    """

    weight: Positive
    label: Slug | None = None

    @property
    def default_label(self) -> str:
        """A label from what names the source."""
        path = self.path[0] if isinstance(self.path, list) else self.path or ""
        stems = [part.partition(".")[0] for part in reversed(path.split("/"))]
        words = (*stems, self.name, self.factory, self.source)
        slugs = (re.sub(r"[^a-z0-9._-]+", "-", (word or "").lower()).strip("-._") for word in words)
        return next(filter(None, slugs))


def _or_one_set(schema: dict[str, Any]) -> None:
    """In the JSON Schema: a set without a name, in place of sets by name."""
    (one,) = schema["anyOf"][0]["patternProperties"].values()
    schema["anyOf"].insert(0, dict(one))


def _source_or_mixture(schema: dict[str, Any]) -> None:
    """In the JSON Schema: a mixture states no source."""
    schema["required"].remove("source")
    schema["anyOf"] = [{"required": ["source"]}, {"required": ["mixture"]}]


class Data(Section):
    """Where the samples come from and how they become rows.

    `label_field`: a class (classification), classes or a list of yes and no (multi_label), a number or a list
    of numbers (regression), or whether the completion is desirable (preference). `text_pair_field`: a second
    text of the row, for tasks that have labels.

    `config`: of a data set of the hub that has several, such as wikitext's wikitext-2-raw-v1.

    `source: dataset`: `factory` returns a data set with `__len__` and `__getitem__`, and maybe `collate`.

    `image_field`: a column with images: paths, or the bytes of files; `image`: what becomes of them. A folder
    of folders of images is one, too: each folder is a class. `workers`: processes that each rank reads with.

    Of task sft, `image_field` is a column with the image or the list of images of a chat, which stand where
    the text has <image> or a part of type image; `image` then has the model's `processor` and its `options`.

    `audio_field` and `audio`: the same of recordings; in task seq2seq their text is `completion_field`.

    Of task preference: the columns with the completions, or chats, `chosen_field` and `rejected_field`; the
    prompt is in `prompt_field`, or what both begin with.

    Of task token_classification: `text_field` is a list of words and `label_field` a class for each; classes
    may be called by `label_names`. Of task masked_lm: `mask_probability` is the share of tokens to guess. Of
    task seq2seq: `prompt_field` is read, and `completion_field` written, in `target_length` tokens at most.

    Of task sft: `messages_field` is a column with a chat; without it the first row tells its style.
    `train_on` says which messages count in the loss. `chat_template` is a file, or chatml; by default the
    tokenizer's own. It also sees `chat_template_options`.

    `packing`: causal_lm cuts rows from one `stream` unless it packs whole `documents`; sft pads, which is
    `none`, unless it packs `documents`, each with positions and attention of its own; masked_lm cuts a
    `stream` unless each text is a row, which is `none`.
    `evaluation`: sets by name, or one without a name, instead of a share of these data (`validation`).
    `mixture`: several sources instead of one; an epoch then has as many samples as they have rows together,
    or `samples`, and exactly its share of each.
    """

    model_config = ConfigDict(json_schema_extra=_source_or_mixture)

    source: Literal["builtin", "files", "hub", "factory", "dataset", "mixture"]
    name: Name | None = None
    path: str | list[str] | None = None
    factory: FactoryName | None = None
    options: dict[str, Any] = {}
    split: str = "train"
    config: Annotated[Name | None, AddedLater()] = None
    task: Literal[
        "causal_lm",
        "sft",
        "preference",
        "classification",
        "regression",
        "multi_label",
        "token_classification",
        "masked_lm",
        "seq2seq",
        "custom",
    ]
    task_factory: Annotated[FactoryName | None, AddedLater()] = None
    task_options: Annotated[dict[str, Any], AddedLater()] = {}
    text_field: str = "text"
    text_pair_field: Annotated[Name | None, AddedLater()] = None
    image_field: Annotated[Name | None, AddedLater()] = None
    image: Annotated[Image | None, AddedLater()] = None
    audio_field: Annotated[Name | None, AddedLater()] = None
    audio: Annotated[Audio | None, AddedLater()] = None
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    chosen_field: Annotated[Name, AddedLater()] = "chosen"
    rejected_field: Annotated[Name, AddedLater()] = "rejected"
    label_field: str = "label"
    label_names: Annotated[list[Name] | None, AddedLater()] = None
    messages_field: Annotated[Name | None, AddedLater()] = None
    train_on: Annotated[Literal["assistant", "last_assistant", "all"], AddedLater()] = "assistant"
    chat_template: Annotated[Name | None, AddedLater()] = None
    chat_template_options: Annotated[dict[str, Any], AddedLater()] = {}
    tokenizer: str = "bytes"
    bos: Annotated[Literal["auto"] | bool, AddedLater()] = "auto"
    special_tokens_in_text: Annotated[bool, AddedLater()] = False
    on_bad_row: Annotated[Literal["stop", "skip"], AddedLater()] = "stop"
    sequence_length: Samples | None = None
    target_length: Annotated[Samples | None, AddedLater()] = None
    mask_probability: Annotated[float, Field(gt=0, lt=1), AddedLater()] = 0.15
    packing: Annotated[Literal["stream", "documents", "none"] | None, AddedLater()] = None
    workers: Annotated[int | None, Field(ge=0, le=256), AddedLater()] = None
    samples: Count | None = None
    validation: Fraction = 0.0
    validation_split: Annotated[
        Literal["drawn", "periodic"] | None, AddedLater(before="periodic")
    ] = None
    validation_seed: Annotated[int, Field(ge=0, lt=2**63), AddedLater()] = 0
    evaluation: Annotated[
        dict[Slug, EvaluationSet] | None,
        AddedLater(),
        Field(json_schema_extra=_or_one_set),
    ] = None
    mixture: Annotated[list[MixtureSource] | None, AddedLater()] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """A set without a name is called ALONE; a recorded recipe of before the draw keeps its own split.

        A mixture needs no `source`.
        """
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if filled.get("mixture"):
            filled.setdefault("source", "mixture")
        sets = filled.get("evaluation")
        if isinstance(sets, dict) and any(not isinstance(own, dict) for own in sets.values()):
            base = sets.get(ALONE, {})  # an override of a set that was filled in before
            stated = {key: value for key, value in sets.items() if key != ALONE}
            filled["evaluation"] = {ALONE: {**base, **stated} if isinstance(base, dict) else sets}
        makes_samples = (
            filled.get("image") or filled.get("audio") or filled.get("source") == "dataset"
        )
        if filled.get("workers") is None and makes_samples:
            filled["workers"] = MOST_WORKERS
        if filled.get("validation") and filled.get("validation_split") is None:
            # A resolved recipe states every key that there was, those with null too; a person does not.
            is_older = "validation_split" not in filled and set(filled) >= _RECORDED
            filled["validation_split"] = "periodic" if is_older else "drawn"
        return filled

    @model_validator(mode="after")
    def _source_has_its_key(self) -> Self:
        require_only(self, "source", self.source, {**_SOURCES, "mixture": "mixture"})
        self._check_mixture()
        if self.evaluation and self.validation:
            raise ValueError(
                f"evaluation names data of their own, and validation {self.validation:g} takes a share of "
                "these. Nearest: validation 0, or no evaluation"
            )
        if self.evaluation is not None and not self.evaluation:
            raise ValueError("evaluation names no data. Nearest: leave it out")
        self._check_datasets()
        if self.config is not None and self.source not in ("hub", "mixture"):
            raise ValueError(
                f"config: of a set of the hub, not of {self.source}. Nearest: config null"
            )
        if (self.task == "custom") != (self.task_factory is not None or self.is_map_style):
            takes = "needs" if self.task == "custom" else "takes no"
            raise ValueError(f"task {self.task} {takes} task_factory, a module:function")
        return self

    @model_validator(mode="after")
    def _media_have_their_sections(self) -> Self:
        if self.is_chat_with_images:
            self._check_chat_images()
        elif (self.image is None) != (self.image_field is None):
            lacks = "image" if self.image is None else "image_field"
            fix = "image={size: 224}" if lacks == "image" else "image_field=image"
            raise ValueError(f"image_field and image go together. Nearest: data.{fix}")
        if (self.audio is None) != (self.audio_field is None):
            fix = "audio={seconds: 30}" if self.audio is None else "audio_field=audio"
            raise ValueError(f"audio_field and audio go together. Nearest: data.{fix}")
        if self.audio and self.image:
            raise ValueError("image and audio: a row is one or the other. Nearest: data.image=null")
        if self.image and self.image.transform and not self.workers:
            raise ValueError(
                "image.transform: the project's function may draw from torch's generator, as training does, "
                "so it needs a process of its own. Nearest: data.workers=4"
            )
        if self.image and self.image.options and not (self.image.transform or self.task == "sft"):
            raise ValueError("image.options are those of transform, a module:function")
        if (
            self.image
            and self.task != "sft"
            and (self.text_pair_field or "tokenizer" in self.model_fields_set)
        ):
            given = "text_pair_field" if self.text_pair_field else "tokenizer"
            if getattr(self, given) != type(self).model_fields[given].default:
                raise ValueError(f"{given}: rows are images, which have no text")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_task(self) -> Self:
        if self.label_names is not None and len(set(self.label_names)) < len(self.label_names):
            twice = next(n for n in self.label_names if self.label_names.count(n) > 1)
            raise ValueError(f"label_names: {twice} stands twice")
        if self.text_pair_field is not None and self.facts.head != "classification":
            raise ValueError(
                f"text_pair_field: for a class or number of two texts, not task {self.task}. Nearest: "
                "text_pair_field null"
            )
        if self.bos != "auto" and self.task not in ("causal_lm", "sft", "preference"):
            raise ValueError(f"bos: texts of task {self.task} begin as the tokenizer has them")
        if self.special_tokens_in_text and self.tokenizer == "bytes":
            raise ValueError(
                "special_tokens_in_text: bytes has no special token that a text could hold"
            )
        for key, tasks in _OF_TASKS.items():
            if (
                self.task not in tasks
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(f"{key}: for task {' and '.join(tasks)}, not {self.task}")
        legal = {
            "causal_lm": ("stream", "documents"),
            "sft": ("none", "documents"),
            "masked_lm": ("stream", "none"),
        }.get(self.task, ("none",))
        if self.packing not in (None, *legal):
            raise ValueError(f"packing {self.packing}: task {self.task} has {' or '.join(legal)}")
        if self.audio and self.task == "seq2seq" and self.target_length is None:
            raise ValueError(
                "a text of a recording needs target_length, in tokens. Nearest: data.target_length=448"
            )
        needs_length = self.facts.is_per_token and self.task != "custom" and not self.audio
        if needs_length and self.sequence_length is None:
            raise ValueError(f"task {self.task} needs sequence_length, in tokens")
        return self

    def _check_chat_images(self) -> None:
        """ValueError where images of chats are not left to the processor of a model that also reads text."""
        assert self.image
        if self.image.processor is None:
            raise ValueError(
                "image: chats with images need the processor of their model. Nearest: "
                "data.image={processor: ...}, the model's folder or its name on the hub"
            )
        own = sorted(self.image.model_fields_set - {"processor", "options"})
        own = [k for k in own if getattr(self.image, k) != type(self.image).model_fields[k].default]
        if own:
            raise ValueError(
                f"image.{own[0]}: the processor of a model that also reads text makes its pixels. Nearest: "
                "data.image.options, which it is called with, such as {size: {longest_edge: 501760}}"
            )
        if self.chat_template == "chatml":
            raise ValueError(
                "chat_template: chatml has no place for an image. Nearest: data.chat_template=null, the "
                "processor's own"
            )
        if self.packing == "documents":
            raise ValueError(
                "packing documents: chats with images are not packed. Nearest: data.packing=none"
            )

    @property
    def is_chat_with_images(self) -> bool:
        """Whether rows are chats in which images stand, for a model that reads both."""
        return self.task == "sft" and self.image is not None

    @property
    def is_map_style(self) -> bool:
        """Whether samples are those of a data set of the project, which is read while it is trained."""
        return self.source == "dataset"

    def _check_datasets(self) -> None:
        sets = {**self.sources(), **self.evaluation_sets()} if self.source != "mixture" else {}
        kinds = {own.is_map_style for own in (self, *sets.values())}
        if any(own.source == "dataset" for own in self.mixture or ()):
            raise ValueError(
                "mixture: a data set of the project cannot be mixed. Nearest: source dataset alone"
            )
        if len(kinds) > 1:
            raise ValueError(
                "evaluation: samples of a data set of the project do not go with rows of other sources. "
                "Nearest: evaluation={source: dataset, factory: ...}"
            )
        if not self.is_map_style:
            return
        if self.task != "custom" or self.task_factory is not None:
            raise ValueError(
                "source dataset is for task custom, without task_factory. Nearest: data.task=custom"
            )
        if self.workers == 0:
            raise ValueError(
                "workers: samples may draw from torch's generator, as training does, so they need a process "
                "of their own. Nearest: data.workers=4"
            )

    @property
    def facts(self) -> TaskFacts:
        """Properties of this task."""
        return TASKS[self.task]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What evaluations of this task report beside the loss; F1 of entities where names tell them."""
        marks = {
            mark for mark, dash, _ in (n.partition("-") for n in self.label_names or ()) if dash
        }
        tells_entities = "B" in marks and marks <= set("BIOESLU")
        return (*self.facts.metrics, *(["f1"] if tells_entities else []))

    @property
    def media_field(self) -> str | None:
        """The column with files of images or recordings."""
        return self.image_field or self.audio_field

    @property
    def packs_documents(self) -> bool:
        """Whether a row holds several documents, each with positions and attention of its own."""
        return self.packing == "documents"

    def evaluation_sets(self) -> dict[str, "Data"]:
        """The data section of every evaluation set by its name: these data, but for what the set states."""
        return {name: own.within(self) for name, own in (self.evaluation or {}).items()}

    def sources(self) -> dict[str, "Data"]:
        """The data section of every source of a mixture by its label; of these data alone under ""."""
        if self.mixture is None:
            return {"": self}
        taken = {own.label for own in self.mixture if own.label}
        found: dict[str, Data] = {}
        for own in self.mixture:
            label, number = own.label or own.default_label, 1
            while label in found or (not own.label and label in taken):
                number += 1
                label = f"{own.default_label}-{number}"
            found[label] = own.within(self)
        return found

    def _check_mixture(self) -> None:
        if self.mixture is None:
            return
        if len(self.mixture) < 2:
            raise ValueError(
                f"mixture has {len(self.mixture)} of two or more sources. Nearest: source and its keys"
            )
        stated = [own.label for own in self.mixture if own.label]
        twice = next((label for label in stated if stated.count(label) > 1), None)
        if twice:
            raise ValueError(f"mixture: two sources have the label {twice}")
        if self.validation_split == "periodic":
            raise ValueError(
                "validation_split: periodic is that of runs of before there were mixtures. Nearest: drawn"
            )
