"""Imported jobs, tiny, trained by the other tool itself and by us, on the same rows in the same order.

The other tool is transformers' Trainer, or TRL's SFTTrainer and DPOTrainer, in one process with the whole
micro-batch; ours are two ranks. Where the curves differ, the test computes by what.
"""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from drumline.metrics_file import read_metrics
from drumline.plan.order import slot_indices
from drumline.session.importing.importer import import_files
from pretrained_folders import saved

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

Loss = Callable[..., torch.Tensor]
Micro = list[tuple[float, int]]
"""Of each micro-batch its loss, and how many labels it has."""
ROWS, STEPS, SEED = 48, 6, 42
WORDS = ["the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as", "his"]  # fmt: skip
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64, "num_labels": 2}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0,
      "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
FLAGS = (
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1 --learning_rate 1e-3 "
    "--lr_scheduler_type constant_with_warmup --warmup_steps 2 --weight_decay 0.0 --output_dir out"
)
ROWS_OF_TRL = """
model_name_or_path: ./model
train_file: rows.jsonl
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
num_train_epochs: 1
learning_rate: 1.0e-3
lr_scheduler_type: linear
warmup_steps: 2
max_length: 64
optim: adamw_torch
"""


def text(rng: random.Random, least: int = 2, most: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def tokenizer(folder: Path, is_pair: bool = False) -> Any:
    """Words cut into pieces of bytes; `is_pair`: with tokens around a text, and between two."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    inner.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    if is_pair:
        inner.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", **names
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def language_model(folder: Path, architecture: str = "llama") -> Any:
    """A tiny one with random weights and its tokenizer, which is returned."""
    read = tokenizer(folder)
    config = {"llama": LLAMA, "gpt2": GPT2}[architecture]
    saved(folder, "AutoModelForCausalLM", architecture, {**config, "vocab_size": len(read), **ENDS})
    return read


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class Captured:
    """Of a Trainer: the rows as they come, the loss of each step, and each rate a step sooner.

    transformers takes at step t the rate of step t - 1: 0 at the first one of a warm-up.
    """

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **named)  # type: ignore[misc]
        labels = arguments[1].get("labels")
        count = 1 if labels is None else int((labels != -100).sum())
        self.seen = [*getattr(self, "seen", []), (float(loss), count)]
        return loss

    def create_scheduler(self, *arguments: Any, **named: Any) -> Any:
        made = super().create_scheduler(*arguments, **named)  # type: ignore[misc]
        made.step()
        return made


class OurTrainer(Captured, Trainer):
    """transformers' own."""


class OurSFT(Captured, SFTTrainer):
    """TRL's, for prompts with completions."""


class OurDPO(Captured, DPOTrainer):
    """TRL's, for preferences."""


def arguments(kind: type[TrainingArguments], folder: Path, **more: Any) -> Any:
    """What the file says, in one process: two ranks' micro-batches together."""
    return kind(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        learning_rate=1e-3, weight_decay=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        seed=SEED, gradient_checkpointing=False, **more)  # fmt: skip


WARMED = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
LINEAR = {"lr_scheduler_type": "linear", "warmup_steps": 2}


def ordered(rows: list[Any]) -> list[Any]:
    """In the order of our first epoch."""
    return [rows[place] for place in slot_indices(SEED, len(rows), 0, len(rows))]


# ---- the jobs: files, and the other tool's training of what they say


def causal(folder: Path, loss: Loss | None, architecture: str = "llama") -> Micro:
    rng = random.Random(1)
    read = language_model(folder / "model", architecture)
    documents, stream, length = [], [], 16
    while len(stream) < ROWS * length + 1:
        documents.append({"text": text(rng, 20, 60)})
        stream += [*read(documents[-1]["text"])["input_ids"], read.eos_token_id]
    write_rows(folder, documents)
    (folder / "job.sh").write_text(
        f"torchrun --nproc_per_node 2 run_clm.py --model_name_or_path ./model --train_file rows.jsonl --block_size {length} --max_train_samples {ROWS} {FLAGS}\n"
    )
    # run_clm cuts rows of `length` and does not train the first token of each; here that token is one of the row before, too.
    rows = ordered([stream[at : at + length + 1] for at in range(0, ROWS * length, length)])
    trainer = OurTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments(TrainingArguments, folder, **WARMED),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
    )  # fmt: skip
    return trained(trainer)


def pairs(folder: Path, loss: Loss | None) -> Micro:
    rng = random.Random(2)
    read = tokenizer(folder / "model", is_pair=True)
    saved(
        folder / "model",
        "AutoModelForSequenceClassification",
        "bert",
        {**BERT, "vocab_size": len(read)},
    )
    rows = [{"sentence1": text(rng), "sentence2": text(rng), "label": n % 2} for n in range(ROWS)]
    write_rows(folder, rows)
    (folder / "job.sh").write_text(
        f"torchrun --nproc_per_node 2 run_glue.py --model_name_or_path ./model --train_file rows.csv --max_seq_length 64 {FLAGS}\n"
    )
    encoded = [
        dict(read(row["sentence1"], row["sentence2"]), labels=row["label"]) for row in ordered(rows)
    ]
    trainer = OurTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model"),
        args=arguments(TrainingArguments, folder, **WARMED),
        train_dataset=Dataset.from_list(encoded),
        data_collator=DataCollatorWithPadding(read),
        compute_loss_func=loss,
    )
    return trained(trainer)


def summaries(folder: Path, loss: Loss | None) -> Micro:
    rng = random.Random(3)
    read = tokenizer(folder / "model")
    saved(folder / "model", "AutoModelForSeq2SeqLM", "t5", {**T5, "vocab_size": len(read)})
    rows = [{"text": text(rng), "summary": text(rng, 1, 6)} for _ in range(ROWS)]
    write_rows(folder, rows)
    (folder / "job.sh").write_text(
        f"torchrun --nproc_per_node 2 run_summarization.py --model_name_or_path ./model --train_file rows.jsonl --max_source_length 32 "
        f"--max_target_length 16 {FLAGS}\n"
    )
    encoded = [
        {"input_ids": read(row["text"])["input_ids"], "labels": read(row["summary"])["input_ids"]}
        for row in ordered(rows)
    ]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    trainer = OurTrainer(
        model=model,
        args=arguments(TrainingArguments, folder, **WARMED),
        train_dataset=Dataset.from_list(encoded),
        data_collator=DataCollatorForSeq2Seq(read, model),
        compute_loss_func=loss,
    )
    return trained(trainer)


def completions(folder: Path, loss: Loss | None) -> Micro:
    rng = random.Random(4)
    read = language_model(folder / "model")
    rows = [{"prompt": text(rng), "completion": " " + text(rng, 1, 12)} for _ in range(ROWS)]
    write_rows(folder, rows)
    (folder / "job.yaml").write_text(ROWS_OF_TRL + "packing: false\n")
    trainer = OurSFT(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments(SFTConfig, folder, max_length=64, **LINEAR),
        train_dataset=Dataset.from_list(ordered(rows)),
        processing_class=read,
    )
    return trained(trainer)


def preferences(folder: Path, loss: Loss | None) -> Micro:
    rng = random.Random(5)
    read = language_model(folder / "model")
    rows = [{"prompt": text(rng), "chosen": " " + text(rng, 1, 9), "rejected": " " + text(rng, 1, 9)} for _ in range(ROWS)]  # fmt: skip
    write_rows(folder, rows)
    (folder / "job.yaml").write_text(ROWS_OF_TRL + "beta: 0.2\nloss_type: sigmoid\n")
    trainer = OurDPO(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments(DPOConfig, folder, max_length=64, beta=0.2, **LINEAR),
        train_dataset=Dataset.from_list(ordered(rows)),
        processing_class=read,
    )
    return trained(trainer)


def trained(trainer: Any) -> Micro:
    trainer.train()
    return trainer.seen  # type: ignore[no-any-return]


def of_steps(seen: Micro) -> list[float]:
    """The loss of each step, which the Trainer adds up of its two micro-batches."""
    return [float(one) for one in np.array([loss for loss, _ in seen]).reshape(-1, 2).sum(axis=1)]


def mean_of_all(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The cross-entropy of a micro-batch, summed, by the number of labels of all micro-batches of the step."""
    logits = outputs.logits.flatten(0, -2)
    return (
        torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        / num_items_in_batch
    )


JOBS: dict[str, tuple[Callable[..., Micro], Loss | None]] = {
    "run_clm": (causal, None), "run_glue": (pairs, mean_of_all), "run_summarization": (summaries, mean_of_all),
    "sft": (completions, None), "dpo": (preferences, None),
}  # fmt: skip
"""By the name of the script or trainer; with the loss that stands in for a model's own, which is not right there."""


def ours(folder: Path, run: Callable[..., Any]) -> list[float]:
    """The same job imported, and run on two ranks."""
    found = import_files([next(folder.glob("job.*"))], gpus=2, gpu="cpu")
    assert found.problem == ""
    (folder / "job.recipe.yaml").write_text(found.text)
    extra = [
        "logging.every_steps=1",
        f"seed={SEED}",
        "checkpoint.every_epochs=null",
        "checkpoint.every_steps=1000",
    ]
    done = run("run", "job.recipe.yaml", "--run-dir", "r", *extra)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_metrics(folder / "r/metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("job", JOBS)
def test_an_imported_job_is_the_same_training(job: str, tmp_path: Path, forked: Any) -> None:
    """Each step's loss is the other tool's to 1e-5, at the rate of the same step."""
    train, loss = JOBS[job]
    theirs, mine = of_steps(train(tmp_path, loss)), ours(tmp_path, forked)
    assert len(mine) == len(theirs) == STEPS
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert len({round(one, 3) for one in mine}) > 1
    if loss is None:
        return
    # The model's own loss is a mean over its micro-batch, and transformers 5.23 adds these up.
    (first, of_first), (second, of_second) = train(tmp_path, None)[:2]
    whole = (first * of_first + second * of_second) / (of_first + of_second)
    assert mine[0] == pytest.approx(whole, rel=1e-5)
    assert first + second > 1.9 * mine[0]


def test_where_the_first_token_of_each_row_is_counted(tmp_path: Path, forked: Any) -> None:
    """transformers 5.23 divides the loss of GPT-2 by all tokens of its rows, of which it never trains the first."""
    theirs, mine = of_steps(causal(tmp_path, None, "gpt2")), ours(tmp_path, forked)
    assert theirs == pytest.approx([one * 16 / 17 for one in mine], rel=1e-5)
