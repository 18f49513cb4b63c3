"""Token classification, masked and sequence-to-sequence models: one curve at every split, metrics, resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arena import STEPS, Arena
from whole_tensors import whole_tensors

from drumline.data.tasks.base import IGNORED
from drumline.plan.model import Plan, read_plan
from drumline.plan.order import draw_seeds
from drumline.session.planning import with_trace
from drumline.session.row_lengths import manifest_of_run
from drumline.trace.rehearse import rehearse
from drumline.train.batches import open_rows
from drumline.train.models import ModelBuilder
from drumline.train.objectives.entities import entities, entity_f1
from memory.family_grid import Cell, _trace
from memory.plans import small_plan

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [
    ("fsdp", SPLITS[2]),
    ("accelerate", SPLITS[1]),
    ("zero3", SPLITS[1]),
]
BERT = {"source": "config", "architecture": "bert", "config": {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}}  # fmt: skip
T5 = {"source": "config", "architecture": "t5", "config": {
    "vocab_size": 258, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0}}  # fmt: skip
BART = {"source": "config", "architecture": "bart", "config": {
    "vocab_size": 258, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0}}  # fmt: skip
NAMES = ["O", "B-PER", "I-PER", "B-LOC"]
KINDS: dict[str, dict[str, Any]] = {
    "names": {"model": BERT, "data": {"task": "token_classification", "text_field": "words", "label_field": "tags", "label_names": NAMES}},
    "masked stream": {"model": BERT, "data": {"task": "masked_lm", "sequence_length": 40}},
    "masked rows": {"model": BERT, "data": {"task": "masked_lm", "packing": "none"}},
    "t5": {"model": T5, "data": {"task": "seq2seq", "target_length": 16}},
    "bart": {"model": BART, "data": {"task": "seq2seq"}},
}  # fmt: skip


def rows_in(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = []
    for n in range(41):
        names = [NAMES[(n + k) % 4] for k in range(n % 6 + 1)]
        rows.append({
            "text": " ".join(f"word{k * n % 7}" for k in range(n % 6 + 2)),
            "words": [f"w{name.lower()}{n % 3}" for name in names],
            "tags": names if n % 2 else [NAMES.index(name) for name in names],
            "prompt": "copy " + "ab " * (n % 5 + 1),
            "completion": "ab" * (n % 5 + 1),
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_of(arena: Arena, kind: str, engine: str, split: tuple[int, int, int]) -> Plan:
    sections = KINDS[kind]
    data = {"path": str(rows_in(arena.folder)), "sequence_length": 48, "validation": 0.15, **sections["data"]}  # fmt: skip
    evaluation = {"every_steps": 8, "per_device": 2}
    return arena.plan(engine, split, model=sections["model"], data=data, evaluation=evaluation)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("tokens"))
    made.train_kinds(KINDS, RUNS, plan_of, SPLITS[1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_one_curve(arena: Arena, kind: str, run: tuple[str, tuple[int, int, int]]) -> None:
    """Under every engine, to rounding; eight steps learn."""
    engine, split = run
    found = arena.values(f"{kind}-{engine}-{split}")
    assert len(found) == STEPS
    assert found == pytest.approx(arena.values(f"{kind}-ddp-{SPLITS[0]}"), rel=2e-5, abs=1e-5)
    assert min(found[-3:]) < found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_verification_and_resume(arena: Arena, kind: str) -> None:
    """The step's gradient is that of single rows, the loss is transformers' own; a resume is bitwise."""
    assert arena.verdict(f"verify-{kind}") == (True, True)
    assert arena.own_loss(f"verify-{kind}")
    assert arena.values(f"stopped-{kind}") == arena.values(f"{kind}-ddp-{SPLITS[1]}")


def evaluated(arena: Arena, kind: str) -> tuple[Any, Any, dict[str, float]]:
    """The validation batch of a run on two ranks as tensors, its trained model, and its last evaluation."""
    name = f"{kind}-ddp-{SPLITS[2]}"
    plan = read_plan((arena.folder / name / "plan.json").read_text())
    rows = open_rows(plan, "validation")
    model: Any = ModelBuilder(plan.recipe, rows.manifest).whole().eval()
    stored = whole_tensors(arena.folder / name / f"checkpoints/step-{STEPS:08d}", "model.")
    trained = {key.removeprefix("model."): value for key, value in stored.items()}
    model.load_state_dict(trained, strict=False)
    indices = np.arange(len(rows))
    seeds = draw_seeds(plan.recipe.seed, indices, "evaluation")
    batch = {k: torch.from_numpy(np.array(v)) for k, v in rows.collate(indices, seeds).items()}
    lines = (arena.folder / name / "metrics.jsonl").read_text().splitlines()
    (line,) = (line for line in map(json.loads, lines) if line["kind"] == "evaluation")
    return batch, model, line


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_all_rows(arena: Arena, kind: str) -> None:
    """Transformers' own loss of all rows in one batch, and the accuracy of the tokens that count."""
    batch, model, found = evaluated(arena, kind)
    targets = batch.pop("targets")
    with torch.no_grad():
        output = model(**batch, labels=targets)
    assert found["eval/loss"] == pytest.approx(float(output.loss), rel=1e-4)
    counted = targets != IGNORED
    right = (output.logits.argmax(dim=-1) == targets)[counted].float().mean()
    assert found["eval/accuracy"] == pytest.approx(float(right), abs=1e-6)


def test_entities_are_counted_over_all_rows(arena: Arena) -> None:
    """F1 of names by seqeval's rule, from the words' labels."""
    batch, model, found = evaluated(arena, "names")
    targets = batch.pop("targets")
    with torch.no_grad():
        said = model(**batch).logits.argmax(dim=-1)
    sums = [entity_f1(said[n : n + 1], targets[n : n + 1], NAMES) for n in range(len(said))]
    right, whole = (sum(int(one[side]) for one in sums) for side in (0, 1))
    assert found["eval/f1"] == pytest.approx(right / whole)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER B-PER", [("PER", 0, 2), ("PER", 2, 3)]),
        ("B-PER I-LOC I-LOC O", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("O O", []),
        ("B-LOC B-LOC", [("LOC", 0, 1), ("LOC", 1, 2)]),
        ("S-PER O S-LOC", [("PER", 0, 1), ("LOC", 2, 3)]),
        ("B-PER I-PER E-PER I-PER", [("PER", 0, 3), ("PER", 3, 4)]),
        ("U-PER B-LOC L-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
    ],
)
def test_entities(labels: str, wanted: list[Any]) -> None:
    """As conlleval and seqeval have them, ends of a row included."""
    assert entities(labels.split()) == wanted


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v2"])
@pytest.mark.parametrize(
    "data", [{"task": "token_classification"}, {"task": "masked_lm", "packing": "none"}], ids=str
)
@pytest.mark.parametrize(
    "sections", [{"strategy": {"name": "fsdp"}, "gpus": 8}, {"precision": "fp32", "k": 2}], ids=str
)
def test_the_closed_form_is_the_trace(
    architecture: str, data: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Within 0.6 %: every token has a class, or is guessed through a tied head that FSDP2 keeps with the root."""
    changes = {"data": data, **sections}
    plan = small_plan(architecture, **changes)
    assert abs(Cell(architecture, changes, plan, _trace(plan, architecture)).error) <= 0.006


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoders_with_decoders_are_traced(arena: Arena, kind: str) -> None:
    """They have no closed form; the trace has two lengths."""
    plan = plan_of(arena, kind, "fsdp", SPLITS[2])
    assert plan.memory.method == "unknown"
    assert "no closed form" in plan.memory.why
    assert with_trace(plan, rehearse(plan, manifest_of_run(plan)).traced()).memory.fits
