"""How the batch is split never changes the training: one recipe at three splits, against means of means.

    python benchmarks/promise.py [--steps 60]

Writes docs/figures/curves.svg and docs/figures/differences.svg, and prints a table. It takes about a minute on two cores.

The recipe (answers of very unequal lengths, a tiny Llama, fp32) is run by drumline as 16 x 1 x 1, 4 x 2 x 2 and 2 x 2 x 4,
in processes of their own. The other loop is written by hand, as it is in most scripts: the same weights, rows, order,
rates and optimizer, but the loss of a step is the mean of the means of its micro-batches. What is shown is the relative
difference of each step's loss to that of the undivided batch.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import drumline
from drumline.plan.model import Plan
from drumline.plan.schedule import rate
from drumline.train.batches import StepReader, open_rows

FIGURES = Path(__file__).resolve().parents[1] / "docs/figures"
SPLITS = [(16, 1, 1), (4, 2, 2), (2, 2, 4)]
COLOURS = ["#4269d0", "#3ca951", "#a463f2", "#efb118", "#ff725c"]
"""Of the three splits, and of two sizes of micro-batches by hand."""
IGNORED = -100


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    """Prompts with answers of 1 to 60 words, and a Llama of 0.1M weights saved beside them."""
    torch.manual_seed(3)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                         vocab_size=264, max_position_embeddings=512)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"count to {1 + n * n % 59}: ", "completion": " ".join(words[i % 10] for i in range(1 + n * n % 59))}
        for n in range(200)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "recipe": "promise", "schema": 1, "seed": 5,
        "model": {"source": "folder", "path": str(folder / "llama")},
        "data": {"source": "files", "path": str(folder / "rows.jsonl"), "task": "sft", "sequence_length": 384},
        "batch": {"effective": 16, "per_device": 16, "gpus": 1, "accumulation": 1},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "duration": {"steps": steps}, "logging": {"every_steps": 1}, "checkpoint": {"every_steps": 1000},
    }  # fmt: skip


def means_of_means(plan: Plan, micro_batch: int) -> list[float]:
    """The losses of a loop by hand, one mean for each micro-batch of so many rows."""
    model = AutoModelForCausalLM.from_pretrained(plan.recipe.model.path).train()
    decayed = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    reader = StepReader(plan, open_rows(plan, "train"), rank=0)
    losses = []
    for number in range(1, plan.steps.total + 1):
        (whole,) = reader.read(number).micro_batches
        rows, targets = whole.tensors["input_ids"], whole.tensors["targets"]
        mask = whole.tensors.get("attention_mask", torch.ones_like(rows))
        parts = range(0, len(rows), micro_batch)
        total = 0.0
        for start in parts:
            of = slice(start, start + micro_batch)
            logits = model(input_ids=rows[of], attention_mask=mask[of]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[of].flatten(), ignore_index=IGNORED
            )
            (loss / len(parts)).backward()
            total += float(loss.detach()) / len(parts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decayed.param_groups[0]["lr"] = rate(plan.schedule, number, None)
        decayed.step()
        decayed.zero_grad()
        losses.append(total)
    return losses


def chart(title: str, unit: str, lines: dict[str, list[float]], is_log: bool) -> str:
    """An SVG of curves over steps; text and axes take the colour of the page around them."""
    import math

    width, height, left, top, right, bottom = 720, 380, 70, 40, 190, 45
    high, low = max(map(max, lines.values())), min(min(one) for one in lines.values())
    if is_log:
        high, low = 10.0 ** math.ceil(math.log10(high)), 1e-9

    def place(step: int, value: float, count: int) -> str:
        x = left + (width - left - right) * step / max(1, count - 1)
        share = (
            math.log(max(value, low) / low) / math.log(high / low)
            if is_log
            else (value - low) / (high - low)
        )
        return f"{x:.1f},{height - bottom - (height - top - bottom) * share:.1f}"

    ticks = (
        [10.0**n for n in range(-9, 1, 2) if low <= 10.0**n <= high]
        if is_log
        else [low + (high - low) * n / 4 for n in range(5)]
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        "<style>svg{color:#222;background:#fff}@media (prefers-color-scheme:dark){svg{color:#ddd;background:#1e1e1e}}text{fill:currentColor}</style>",
        f'<title>{title}</title><text x="{left}" y="22" font-size="15">{title}</text>',
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 10}" text-anchor="middle">optimizer step</text>',
        f'<text transform="translate(16 {height / 2:.0f}) rotate(-90)" text-anchor="middle">{unit}</text>',
    ]
    for tick in ticks:
        y = place(0, tick, 2).split(",")[1]
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".2"/>'
        )
        parts.append(
            f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{f"{tick:.0e}" if is_log else f"{tick:.2f}"}</text>'
        )
    for number, (name, values) in enumerate(lines.items()):
        colour = COLOURS[number + 5 - len(lines)]
        points = " ".join(place(step, value, len(values)) for step, value in enumerate(values))
        dash = ' stroke-dasharray="6 4"' if name.startswith("means") else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        y = top + 14 + 22 * number
        parts.append(
            f'<line x1="{width - right + 12}" x2="{width - right + 36}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts.append(f'<text x="{width - right + 42}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Train, draw, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    lines: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = recipe(folder, steps)
        for b, gpus, k in SPLITS:
            split = {"batch.per_device": b, "batch.gpus": gpus, "batch.accumulation": k}
            run = drumline.run(plain, split, run_dir=folder / f"{b}x{gpus}x{k}", quiet=True)
            lines[f"{b} × {gpus} × {k}"] = run.metrics["loss"].tolist()
            whole = run.plan if gpus * k == 1 else whole  # noqa: F821
        for size in (4, 2):
            lines[f"means of {size} rows"] = means_of_means(whole, size)
    first = next(iter(lines.values()))
    differences = {
        name: [max(abs(a - b) / b, 1e-9) for a, b in zip(one, first, strict=True)]
        for name, one in list(lines.items())[1:]
    }
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "curves.svg").write_text(
        chart("Loss at five splits of 16 rows", "loss", lines, is_log=False)
    )
    (FIGURES / "differences.svg").write_text(
        chart("What the split did to the loss", "relative difference", differences, is_log=True)
    )
    print("| split | last loss | largest difference |\n|---|---|---|")
    for name, one in lines.items():
        print(f"| {name} | {one[-1]:.6f} | {max(differences.get(name, [0.0])):.1e} |")


if __name__ == "__main__":
    main()
