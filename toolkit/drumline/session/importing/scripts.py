"""transformers' example scripts, such as run_glue.py: their names say what the rows are."""

import re
from collections.abc import Callable
from typing import Any

from drumline.errors import RecipeError
from drumline.recipe import yaml12
from drumline.session.importing.draft import UNSUPPORTED, Draft

_GLUE = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The tasks of GLUE, and the columns that their texts are in."""


def take(draft: Draft, given: dict[str, Any], program: str) -> bool:
    """Carry over what only this script has, taking it out of `given`; False for another program's name."""
    stem = re.sub(r"(_no_trainer|_trainer|_flax)$", "", program)
    if stem in _REFUSED:
        raise RecipeError(
            f"{program}: {_REFUSED[stem]}, so this training is not imported. Nearest: a recipe with "
            "data.task=custom and objective.name=custom, as docs/own-code.md shows"
        )
    kind = _KINDS.get(stem)
    if kind is None:
        return False
    draft.taken += 1
    kind(draft, given)
    if stem in _OWN_LOSSES and int(given.get("gradient_accumulation_steps") or 1) > 1:
        draft.differ(
            "transformers 5 adds up the means of micro-batches of a model that computes its loss by itself "
            "(BERT, T5), so with accumulation its loss and gradients are that many times as large, and "
            "clipped sooner"
        )
    if samples := given.pop("max_train_samples", None):
        draft.set("data.samples", int(samples))
        draft.taken += 1
    for key in ("max_eval_samples", "max_predict_samples"):
        if samples := given.pop(key, None):
            draft.leave(key, samples, UNSUPPORTED, "all rows of the evaluation are read")
    return True


def _evaluated(
    draft: Draft,
    given: dict[str, Any],
    share: float = 0.0,
    name: str | None = None,
    split: str = "validation",
) -> None:
    """The script's evaluation: a split of the hub's set `name`, else this share of the training rows."""
    name = name or given.get("dataset_name")
    if not (given.get("do_eval") or given.get("eval_strategy") or given.get("evaluation_strategy")):
        return
    if name:
        draft.set("data.evaluation", {"source": "hub", "name": name, "split": split})
    elif share and not given.get("validation_file") and not given.get("validation_dir"):
        draft.set("data.validation", share)


def _causal(draft: Draft, given: dict[str, Any]) -> None:
    draft.set("data.task", "causal_lm")
    _from_scratch(draft, given)
    _percentage(draft, given)
    length = given.pop("block_size", None)
    draft.set(
        "data.sequence_length", int(length or 1024), "" if length else "run_clm's default, at most"
    )
    draft.differ(
        "run_clm joins the texts of rows without a token between them, and never trains the first token of a "
        "row; here each text ends with the end token, and every token is trained"
    )


def _masked(draft: Draft, given: dict[str, Any]) -> None:
    draft.set("data.task", "masked_lm")
    _from_scratch(draft, given)
    _percentage(draft, given)
    by_line = given.pop("line_by_line", False)
    draft.set("data.packing", "none" if by_line else "stream")
    draft.set("data.mask_probability", float(given.pop("mlm_probability", 0.15)))
    length = given.pop("max_seq_length", None)
    draft.set(
        "data.sequence_length",
        int(length or 512),
        "" if length else "the model's longest, at most 1024",
    )
    draft.differ(
        "run_mlm draws for each token whether it is masked; here each row has the same share of masked ones"
    )


def _from_scratch(draft: Draft, given: dict[str, Any]) -> None:
    """A model with random weights: its type, and fields that are not the type's own."""
    kind, stated = given.pop("model_type", None), given.pop("config_overrides", None)
    if given.get("model_name_or_path") or kind is None:
        return
    if config := given.pop("config_name", None):
        draft.leave(
            "config_name",
            config,
            UNSUPPORTED,
            "its fields belong into model.config, with model.architecture",
        )
    draft.set("model.source", "config")
    draft.set("model.architecture", str(kind))
    fields = [pair.partition("=") for pair in str(stated).split(",")] if stated else []
    draft.set(
        "model.config",
        {name.strip(): yaml12.parse(f"x: {value}")["x"] for name, _, value in fields},
    )
    draft.taken += 2


def _percentage(draft: Draft, given: dict[str, Any]) -> None:
    percent = float(given.pop("validation_split_percentage", 5))
    _evaluated(draft, given, percent / 100)


def _glue(draft: Draft, given: dict[str, Any]) -> None:
    name = given.pop("task_name", None)
    is_regression = str(name).lower() == "stsb" or given.pop("do_regression", False)
    draft.set("data.task", "regression" if is_regression else "classification")
    given.setdefault("max_seq_length", 128)
    _drop_padding(draft, given)
    draft.set("data.label_field", str(given.pop("label_column_name", "label")))
    if name is None:
        _evaluated(draft, given)
        joined = given.pop("text_column_names", None)
        columns = joined.split(",") if isinstance(joined, str) else ["sentence1", "sentence2"]
        if joined is None:
            draft.comments["data.text_field"] = (
                "chosen: run_glue takes sentence1 and sentence2, else the first"
            )
    else:
        columns = list(_GLUE.get(str(name).lower(), ("sentence",)))
        draft.set("data.source", "hub")
        draft.set("data.name", "nyu-mll/glue")
        draft.set("data.config", str(name).lower())
        split = "validation_matched" if str(name).lower() == "mnli" else "validation"
        _evaluated(draft, given, name="nyu-mll/glue", split=split)
        for key in ("dataset_name", "dataset_config_name"):
            given.pop(key, None)
    draft.set("data.text_field", columns[0], draft.comments.get("data.text_field", ""))
    if len(columns) > 1:
        draft.set("data.text_pair_field", columns[1])


def _tokens(draft: Draft, given: dict[str, Any]) -> None:
    draft.set("data.task", "token_classification")
    task = str(given.pop("task_name", "ner"))
    draft.set("data.text_field", str(given.pop("text_column_name", "tokens")))
    draft.set("data.label_field", str(given.pop("label_column_name", f"{task}_tags")))
    draft.set("data.sequence_length", int(given.pop("max_seq_length", 512)))
    if given.pop("label_all_tokens", False):
        draft.leave(
            "label_all_tokens", True, UNSUPPORTED, "the first token of each word has its class"
        )
    given.pop("return_entity_level_metrics", None)
    _drop_padding(draft, given)
    _evaluated(draft, given)


def _written(draft: Draft, given: dict[str, Any]) -> None:
    """Summaries and translations."""
    draft.set("data.task", "seq2seq")
    source, target = given.pop("source_lang", None), given.pop("target_lang", None)
    read, write = ("text", "summary")
    if source and target:
        names = [str(name).partition("_")[0] for name in (source, target)]
        read, write = (f"translation.{name}" for name in names)
    draft.set("data.prompt_field", str(given.pop("text_column", read)))
    draft.set("data.completion_field", str(given.pop("summary_column", write)))
    draft.set("data.sequence_length", int(given.pop("max_source_length", 1024)))
    draft.set("data.target_length", int(given.pop("max_target_length", 128)))
    if prefix := given.pop("source_prefix", None):
        draft.leave(
            "source_prefix", prefix, UNSUPPORTED,
            "rows are read as they are. Instead: write it into the rows; T5 has learnt to expect one",
        )  # fmt: skip
        draft.differ("no source_prefix stands before the texts unless the rows have it")
    for key in ("num_beams", "val_max_target_length", "ignore_pad_token_for_loss"):
        given.pop(key, None)
    _drop_padding(draft, given)
    _evaluated(draft, given)


def _pictures(draft: Draft, given: dict[str, Any]) -> None:
    draft.set("data.task", "classification")
    draft.set("data.image_field", str(given.pop("image_column_name", "image")))
    draft.set("data.label_field", str(given.pop("label_column_name", "label")))
    image: dict[str, Any] = {"crop": "random", "flip": 0.5}
    model = given.get("model_name_or_path") or "google/vit-base-patch16-224-in21k"
    image["processor"] = str(given.pop("image_processor_name", model))
    draft.set("data.image", image, "as the script crops and mirrors")
    if folder := given.pop("train_dir", None):
        draft.set("data.source", "files")
        draft.set("data.path", str(folder))
    if folder := given.pop("validation_dir", None):
        draft.set("data.evaluation", {"source": "files", "path": str(folder)})
    given.pop("ignore_mismatched_sizes", None)
    _evaluated(draft, given, float(given.pop("train_val_split", None) or 0.15))


def _sounds(draft: Draft, given: dict[str, Any]) -> None:
    draft.set("data.task", "classification")
    draft.set("data.label_field", str(given.pop("label_column_name", "label")))
    _take_audio(draft, given, float(given.pop("max_length_seconds", 20)))
    draft.differ(
        "run_audio_classification cuts a random part of each recording; here its beginning is heard"
    )
    _evaluated(draft, given)


def _speech(draft: Draft, given: dict[str, Any]) -> None:
    """Whisper and its kin, which write what they hear."""
    draft.set("data.task", "seq2seq")
    draft.set("data.completion_field", str(given.pop("text_column_name", "text")))
    draft.set(
        "data.target_length",
        int(given.pop("max_target_length", 448)),
        "at most what Whisper writes",
    )
    name = str(given.get("model_name_or_path") or "")
    given.pop("max_duration_in_seconds", None)
    given.pop("min_duration_in_seconds", None)
    _take_audio(draft, given, 30 if "whisper" in name.lower() else 20)
    for key in ("language", "task", "forced_decoder_ids", "suppress_tokens"):
        if value := given.pop(key, None):
            draft.leave(
                key, value, UNSUPPORTED,
                "the tokenizer of the model's folder writes the tokens before a text. Instead: a "
                "tokenizer that was saved with it",
            )  # fmt: skip
    if given.pop("freeze_encoder", False):
        draft.set("model.frozen", ["model.encoder.*"])
    if given.pop("freeze_feature_encoder", name and "whisper" not in name.lower()):
        draft.differ("freeze_feature_encoder: state the parts that are not trained in model.frozen")
    given.pop("do_lower_case", None)


def _take_audio(draft: Draft, given: dict[str, Any], seconds: float) -> None:
    draft.set("data.audio_field", str(given.pop("audio_column_name", "audio")))
    processor = given.pop("feature_extractor_name", None) or given.get("model_name_or_path")
    draft.set("data.audio", {"seconds": round(seconds), "processor": str(processor)})
    if train := given.pop("train_split_name", None):
        draft.set("data.split", str(train))
    _evaluated(draft, given, split=str(given.pop("eval_split_name", "validation")))


def _drop_padding(draft: Draft, given: dict[str, Any]) -> None:
    if given.pop("pad_to_max_length", None) is not None:
        draft.taken += 1


_KINDS: dict[str, Callable[[Draft, dict[str, Any]], None]] = {
    "run_clm": _causal,
    "run_language_modeling": _causal,
    "run_mlm": _masked,
    "run_glue": _glue,
    "run_classification": _glue,
    "run_text_classification": _glue,
    "run_ner": _tokens,
    "run_summarization": _written,
    "run_translation": _written,
    "run_image_classification": _pictures,
    "run_audio_classification": _sounds,
    "run_speech_recognition_seq2seq": _speech,
}
_OWN_LOSSES = ("run_glue", "run_classification", "run_text_classification", "run_ner", "run_summarization",
               "run_translation")  # fmt: skip
_REFUSED = {
    "run_speech_recognition_ctc": "there is no CTC loss",
    "run_speech_recognition_ctc_adapter": "there is no CTC loss",
    "run_qa": "windows over a text are not one sample a row",
    "run_qa_beam_search": "windows over a text are not one sample a row",
    "run_seq2seq_qa": "windows over a text are not one sample a row",
    "run_swag": "there is no multiple choice",
    "run_plm": "permuted language models are not offered",
    "run_fim": "rows are read as they are; write them with their middles moved",
    "run_mae": "the model makes its own loss",
    "run_mim": "the model makes its own loss",
    "run_clip": "its loss compares the rows of a batch",
    "run_object_detection": "there is no detection",
    "run_instance_segmentation": "there is no segmentation",
    "run_semantic_segmentation": "there is no segmentation",
    "run_wav2vec2_pretraining": "the model makes its own loss",
}
"""Scripts whose training no key of a recipe can state."""
