"""Does a classifier reach the accuracy that transformers' Trainer reaches on the same rows?

    python benchmarks/like_trainer.py [--seeds 2]

The shipped recipe tiny-classifier on two ranks, and a Trainer in one process with its model, rows, effective batch, rate
and steps, as run_glue's script has them. Both draw their own weights, order and dropout, so the seeds of each differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.train.batches import open_rows

RECIPE = "tiny-classifier"
INPUTS = {"input_ids": "input_ids", "attention_mask": "attention_mask", "targets": "labels"}


class Padded(torch.utils.data.Dataset[Any]):
    """Prepared rows, all padded to one length."""

    def __init__(self, rows: Any) -> None:
        self._arrays = rows.collate(np.arange(len(rows)))

    def __len__(self) -> int:
        return len(self._arrays["targets"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {theirs: self._arrays[ours][number] for ours, theirs in INPUTS.items()}


def ours(seed: int, folder: Path) -> float:
    """The accuracy on the validation rows of a run of the recipe."""
    command = [sys.executable, "-m", "drumline.cli", "run", RECIPE, f"seed={seed}", "--run-dir"]
    done = subprocess.run([*command, str(folder / f"run-{seed}"), "--json"], stdout=-1, check=True)
    return float(json.loads(done.stdout)["eval"]["eval/accuracy"])


def theirs(plan: Plan, seed: int, folder: Path) -> float:
    """The accuracy of a Trainer with the recipe's model, effective batch, rate and steps."""
    torch.manual_seed(seed)
    recipe = plan.recipe
    model = BertForSequenceClassification(BertConfig(**recipe.model.config, num_labels=2))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps.total,
        per_device_train_batch_size=plan.batch.effective,
        learning_rate=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        warmup_steps=round(plan.steps.total * (recipe.schedule.warmup_ratio or 0)),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        seed=seed,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Padded(open_rows(plan, "train")),
        eval_dataset=Padded(open_rows(plan, "validation")),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    """Print the accuracies of each seed, and their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    count = parser.parse_args().seeds
    recipe = load_recipe(RECIPE)
    prepare_data(recipe)
    plan, found, wanted = make_plan(recipe), [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, count + 1):
            found.append(ours(seed, Path(folder)))
            wanted.append(theirs(plan, seed, Path(folder)))
            print(f"seed {seed}: drumline {found[-1]:.3f}, Trainer {wanted[-1]:.3f}", flush=True)
    print(f"mean: drumline {np.mean(found):.3f}, Trainer {np.mean(wanted):.3f}")


if __name__ == "__main__":
    main()
