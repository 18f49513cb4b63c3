"""Preferences: one curve at every split and under every engine, the reference, resume, metrics and memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arena import STEPS, Arena
from whole_tensors import whole_tensors

from drumline.data.rows import Rows
from drumline.data.tasks.base import IGNORED
from drumline.plan.model import Plan, read_plan
from drumline.train.batches import open_rows
from drumline.train.models import ModelBuilder
from memory.family_grid import Cell, _trace
from memory.plans import small_plan

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [
    ("fsdp", SPLITS[2]),
    ("accelerate", SPLITS[1]),
    ("zero3", SPLITS[1]),
]
LORA = {"adapter": {"rank": 2, "alpha": 8.0}}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": {"name": "dpo", "sft_weight": 0.2}},
    "ipo": {"objective": {"name": "ipo"}},
    "orpo": {"objective": {"name": "orpo"}, "loss": {"chunked": True}},
    "simpo": {"objective": {"name": "simpo"}},
    "kto": {"objective": {"name": "kto", "undesirable_weight": 1.5}},
    "adapter": {"objective": {"name": "dpo", "reference": "adapter_off"}, "model": LORA},
    "kto adapter": {"objective": {"name": "kto", "reference": "adapter_off"}, "model": LORA},
}
BETA = {"ipo": 0.1, "orpo": 0.1, "simpo": 2.0}


def rows_in(folder: Path, is_paired: bool) -> Path:
    path = folder / f"rows-{is_paired}.jsonl"
    rows = [
        {
            "prompt": f"say {n % 7} times:",
            "chosen": " yes" * (n % 5 + 1),
            "rejected": " no" * (n % 3 + 1) + "!",
        }
        for n in range(41)
    ]
    if not is_paired:
        rows = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for n, row in enumerate(rows)
            for kind in [("chosen", "rejected")[n % 3 > 1]]
        ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_of(arena: Arena, kind: str, engine: str, split: tuple[int, int, int]) -> Plan:
    sections = KINDS[kind]
    path = rows_in(arena.folder, sections["objective"]["name"] != "kto")
    data = {"path": str(path), "task": "preference", "sequence_length": 40, "validation": 0.15}
    evaluation = {"every_steps": 8, "per_device": 2}
    return arena.plan(engine, split, **{"data": data, "evaluation": evaluation, **sections})


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("preferences"))
    made.train_kinds(KINDS, RUNS, plan_of, SPLITS[1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_one_curve(arena: Arena, kind: str, run: tuple[str, tuple[int, int, int]]) -> None:
    """Under every engine, to rounding, the metrics too; eight steps learn."""
    engine, split = run
    name, reference = f"{kind}-{engine}-{split}", f"{kind}-ddp-{SPLITS[0]}"
    assert len(arena.values(name)) == STEPS
    for key in ("loss", "reward_accuracy", "reward_chosen", "logp_rejected"):
        found, wanted = arena.values(name, key), arena.values(reference, key)
        if key == "reward_accuracy":  # before the first update, rewards are zero but for rounding
            found, wanted = found[1:], wanted[1:]
        assert found == pytest.approx(wanted, rel=3e-5, abs=3e-5), key
    losses = arena.values(name)
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_verification_and_resume(arena: Arena, kind: str) -> None:
    """The step's gradient is that of single rows; a resume is bitwise."""
    assert arena.verdict(f"verify-{kind}") == (True, True)
    assert arena.values(f"stopped-{kind}") == arena.values(f"{kind}-ddp-{SPLITS[1]}")


def log_probs(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> list[tuple[float, int]]:
    """Of each row alone, without padding: the sum over its targets, and their number."""
    found = []
    for row, wanted in zip(ids, targets, strict=True):
        end = int((wanted != IGNORED).nonzero().max()) + 1
        with torch.no_grad():
            logits = model(row[None, :end]).logits[0].double().log_softmax(dim=-1)
        counted = [(place, int(wanted[place])) for place in range(end) if wanted[place] != IGNORED]
        found.append((float(sum(logits[place, token] for place, token in counted)), len(counted)))
    return found


def evaluated(arena: Arena, name: str) -> tuple[Rows, Any, Any, dict[str, float]]:
    """A run's validation rows, its model before and after training, and its last evaluation."""
    plan = read_plan((arena.folder / name / "plan.json").read_text())
    rows = open_rows(plan, "validation")
    before: Any = ModelBuilder(plan.recipe, rows.manifest).whole().eval()
    after: Any = ModelBuilder(plan.recipe, rows.manifest).whole().eval()
    stored = whole_tensors(arena.folder / name / f"checkpoints/step-{STEPS:08d}", "model.")
    trained = {key.removeprefix("model."): value for key, value in stored.items()}
    after.load_state_dict(trained, strict=False)
    lines = (arena.folder / name / "metrics.jsonl").read_text().splitlines()
    (line,) = (line for line in map(json.loads, lines) if line["kind"] == "evaluation")
    return rows, before, after, line


@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "simpo", "adapter"])
def test_metrics_of_pairs_are_those_of_single_rows(arena: Arena, kind: str) -> None:
    """Each completion alone through the model before and after training, and the formulas in fp64."""
    rows, before, after, found = evaluated(arena, f"{kind}-ddp-{SPLITS[2]}")
    batch = {k: torch.from_numpy(v) for k, v in rows.collate(np.arange(len(rows))).items()}
    is_mean, beta = kind in ("ipo", "orpo", "simpo"), BETA.get(kind, 0.1)
    sums = [log_probs(model, batch["input_ids"], batch["targets"]) for model in (after, before)]
    policy, reference = (np.array([s / n if is_mean else s for s, n in one]) for one in sums)
    if kind in ("orpo", "simpo"):
        reference = np.zeros_like(policy)
    chosen, rejected = np.split(policy - reference, 2)
    margin = chosen - rejected
    p, q = np.exp(np.split(policy, 2))
    lengths = np.array([n for _, n in sums[0]])[: len(chosen)]
    losses = {
        "dpo": np.log1p(np.exp(-beta * margin)) - 0.2 * np.split(policy, 2)[0] / lengths,
        "adapter": np.log1p(np.exp(-beta * margin)),
        "ipo": (margin - 1 / (2 * beta)) ** 2,
        "orpo": -np.log(p) + beta * np.log1p(1 / ((p / (1 - p)) / (q / (1 - q)))),
        "simpo": np.log1p(np.exp(-(beta * margin - 1.0))),
    }
    wanted = {
        "loss": losses[kind],
        "reward_accuracy": margin > 0,
        "reward_margin": beta * margin,
        "reward_chosen": beta * chosen,
        "logp_rejected": np.split(policy, 2)[1],
    }
    for key, value in wanted.items():
        assert found[f"eval/{key}"] == pytest.approx(float(np.mean(value)), rel=2e-4), key


@pytest.mark.parametrize("kind", ["kto", "kto adapter"])
def test_metrics_of_labelled_rows_are_those_of_single_rows(arena: Arena, kind: str) -> None:
    """With the divergence of all rows, each prompt with the completion of the row after it."""
    rows, before, after, found = evaluated(arena, f"{kind}-ddp-{SPLITS[2]}")
    batch = {k: torch.from_numpy(v) for k, v in rows.collate(np.arange(len(rows))).items()}
    own, other = (
        np.array([[s for s, _ in log_probs(model, batch[f"{prefix}input_ids"], batch[f"{prefix}targets"])]
                  for model in (after, before)])
        for prefix in ("", "baseline_")
    )  # fmt: skip
    divergence = max(0.0, float((other[0] - other[1]).mean()))
    ratio, is_good = own[0] - own[1], batch["desirable"].numpy() > 0
    sign = np.where(is_good, 1.0, -1.0)
    weight = np.where(is_good, 1.0, 1.5 if kind == "kto" else 1.0)
    losses = weight * (1 - 1 / (1 + np.exp(-sign * 0.1 * (ratio - divergence))))
    assert found["eval/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["eval/reward_chosen"] == pytest.approx(0.1 * float(ratio[is_good].mean()), rel=1e-3, abs=1e-5)  # fmt: skip
    texts = [(row["prompt"], row["completion"]) for row in map(json.loads, rows_in(arena.folder, False).open())]  # fmt: skip
    ends = [bytes(int(t) for t in line if t not in (IGNORED, 256)).decode() for line in batch["targets"].tolist()]  # fmt: skip
    shown = [bytes(int(t) for t in line if t not in (IGNORED, 256)).decode() for line in batch["baseline_targets"].tolist()]  # fmt: skip
    assert shown == [*ends[1:], ends[0]]
    assert set(ends) <= {completion for _, completion in texts}


@pytest.mark.parametrize(
    ("objective", "sections"),
    [("dpo", {}), ("kto", {}), ("orpo", {"loss": {"chunked": True}}), ("dpo", {"evaluation": {"every_steps": 1}})],
    ids=str,
)  # fmt: skip
def test_the_closed_form_is_the_trace(objective: str, sections: dict[str, Any]) -> None:
    """Within 1 %: two sequences of a pair in one forward, or one of a labelled row."""
    changes = {"data": {"task": "preference", "validation": 0.1}, "objective": {"name": objective}, **sections}  # fmt: skip
    plan = small_plan("llama", **changes)
    assert abs(Cell("llama", changes, plan, _trace(plan, "llama")).error) <= 0.01
