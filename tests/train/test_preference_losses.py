"""Losses of preferences on a tiny Llama: formulas on single rows in fp64, TRL's own code, ignored rows.

TRL's losses are methods of its trainers; they run here on a stand-in for the trainer, which has its options and
a model that returns the log-probabilities of ours.
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from conftest import tiny_recipe
from drumline.data.tasks.base import IGNORED
from drumline.recipe.load import validate
from drumline.train.objectives import Objective, build_objective

PAIRS, LENGTH = 5, 12
SPECS: dict[str, dict[str, Any]] = {
    "sigmoid": {"name": "dpo"},
    "sigmoid_norm": {"name": "dpo", "loss_type": "sigmoid_norm", "beta": 1.5},
    "hinge": {"name": "dpo", "loss_type": "hinge"},
    "robust": {"name": "dpo", "loss_type": "robust", "label_smoothing": 0.2},
    "exo_pair": {"name": "dpo", "loss_type": "exo_pair", "label_smoothing": 0.01},
    "nca_pair": {"name": "dpo", "loss_type": "nca_pair"},
    "bco_pair": {"name": "dpo", "loss_type": "bco_pair"},
    "sppo_hard": {"name": "dpo", "loss_type": "sppo_hard"},
    "apo_zero": {"name": "dpo", "loss_type": "apo_zero"},
    "apo_down": {"name": "dpo", "loss_type": "apo_down"},
    "ipo": {"name": "ipo", "beta": 0.3},
}


def objective_of(spec: dict[str, Any], chunked: bool = False) -> Objective:
    recipe = tiny_recipe(
        model={"source": "config", "factory": None, "architecture": "llama", "config": {}},
        data={"source": "files", "name": None, "path": "/x", "task": "preference", "sequence_length": LENGTH,
              "samples": None, "validation": 0.0},
        objective=spec,
        loss={"chunked": chunked},
    )  # fmt: skip
    return build_objective(validate({**recipe, "early_stopping": None, "evaluation": None}, "r"))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def batch_of(rows: int) -> dict[str, Any]:
    """`rows` sequences with prompts and completions of unequal length."""
    torch.manual_seed(2)
    ids = torch.randint(1, 37, (rows, LENGTH))
    targets = torch.full((rows, LENGTH), IGNORED)
    for row in range(rows):
        start, end = 2 + row % 3, 6 + row % 7
        targets[row, start:end] = torch.randint(1, 37, (end - start,))
    return {"input_ids": ids, "targets": targets, "weights": torch.rand(PAIRS) + 0.5}


def paired() -> dict[str, Any]:
    return {**batch_of(2 * PAIRS), "reference": -10 * torch.rand(PAIRS, 2) - 10}


def labelled() -> dict[str, Any]:
    other = batch_of(2 * PAIRS)
    return {**batch_of(PAIRS), "desirable": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),
            "baseline_input_ids": other["input_ids"][PAIRS:], "baseline_targets": other["targets"][PAIRS:],
            "reference": -10 * torch.rand(PAIRS, 2) - 10}  # fmt: skip


def token_log_probs(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of every target, in fp64, each row alone: [rows, L], 0 where ignored."""
    found = torch.zeros(ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for row, own in enumerate(ids):
            logits = model(own[None]).logits[0].double().log_softmax(dim=-1)
            for place, target in enumerate(targets[row].tolist()):
                if target != IGNORED:
                    found[row, place] = logits[place, target]
    return found


def sums_of(objective: Objective, model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """The loss, and the gradient of all weights as one tensor."""
    model.zero_grad()
    loss = objective.sums(model, batch).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss), gradient.clone()


def trainer(spec: dict[str, Any], **options: Any) -> Any:
    """A stand-in for a TRL trainer with these options."""

    def same(value: Any) -> Any:
        return value

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, autocast=None
    )
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "aux_loss_enabled": False, "ld_alpha": None,
                "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "use_weighting": False,
                "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1,
                "accelerator": accelerator, "model": SimpleNamespace(training=True)}  # fmt: skip
    stated = {key: value for key, value in spec.items() if key not in ("name", "loss_type")}
    return SimpleNamespace(**{**defaults, **stated, **options})


def outputs_of(log_probs: torch.Tensor) -> Any:
    """What TRL's fused head returns; only the log-probabilities matter for the loss."""
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())  # fmt: skip


def inputs_of(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A batch as TRL has it: a mask over the tokens of the completion, one place later than our targets."""
    mask = (batch[f"{prefix}targets"] != IGNORED).long()
    mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    ids = torch.zeros_like(mask)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


@pytest.mark.parametrize("kind", SPECS)
def test_dpo_and_ipo_are_those_of_trl(model: Any, kind: str) -> None:
    """Each loss type, of pairs with equal weights; TRL divides by the number of pairs."""
    spec, batch = SPECS[kind], {**paired(), "weights": torch.ones(PAIRS)}
    found = float(objective_of(spec).sums(model, batch).loss)
    log_probs = token_log_probs(model, batch["input_ids"], batch["targets"])
    reference = batch["reference"].double()
    if kind in (
        "ipo",
        "sigmoid_norm",
    ):  # there the reference is a mean over tokens, as ours stores it
        lengths = (batch["targets"] != IGNORED).sum(dim=1).reshape(2, PAIRS).T
        reference = reference * lengths
    inputs = {
        **inputs_of(batch),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    theirs = trainer(spec, loss_types=[kind], loss_weights=[1.0])
    wanted = DPOTrainer._compute_loss(theirs, lambda **_: outputs_of(log_probs), inputs, False)
    assert found / PAIRS == pytest.approx(float(wanted), rel=1e-5)


def test_odds_ratios_are_those_of_trl(model: Any) -> None:
    """TRL's part of the odds; the cross-entropy is of the completion, as in the paper, where TRL adds the prompt's."""
    batch = {**paired(), "weights": torch.ones(PAIRS)}
    found = float(objective_of({"name": "orpo", "beta": 0.4}).sums(model, batch).loss)
    sums = token_log_probs(model, batch["input_ids"], batch["targets"]).sum(dim=1)
    chosen, rejected = (sums / (batch["targets"] != IGNORED).sum(dim=1)).chunk(2)
    odds = ORPOTrainer.odds_ratio_loss(trainer({"beta": 0.4}), chosen, rejected)[0]
    assert found == pytest.approx(float((-chosen - odds).sum()), rel=1e-5)


def test_simpo_is_that_of_trl(model: Any) -> None:
    """With its margin."""
    batch = {**paired(), "weights": torch.ones(PAIRS)}
    spec = {"name": "simpo", "beta": 2.5, "gamma": 1.4}
    found = float(objective_of(spec).sums(model, batch).loss)
    sums = token_log_probs(model, batch["input_ids"], batch["targets"]).sum(dim=1)
    chosen, rejected = (sums / (batch["targets"] != IGNORED).sum(dim=1)).chunk(2)
    theirs = trainer({}, beta=2.5, simpo_gamma=1.4, loss_type="simpo", alpha=0.0)
    losses = CPOTrainer.cpo_loss(theirs, chosen, rejected)[0]
    assert found == pytest.approx(float(losses.sum()), rel=1e-5)


@pytest.mark.parametrize("shift", [-30.0, 0.0])
def test_kto_is_that_of_trl(model: Any, shift: float) -> None:
    """With the divergence of the batch, also where its estimate is negative and taken as zero."""
    batch = {**labelled(), "weights": torch.ones(PAIRS)}
    batch["reference"] = batch["reference"] + torch.tensor([0.0, shift])
    spec = {"name": "kto", "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    objective: Any = objective_of(spec)
    objective.set_baseline(objective.baseline_sums(model, batch))
    found = float(objective.sums(model, batch).loss)
    own = token_log_probs(model, batch["input_ids"], batch["targets"])
    other = token_log_probs(model, batch["baseline_input_ids"], batch["baseline_targets"])
    theirs = trainer(spec, loss_type="kto", calculate_KL=True,
                     _compute_kl_logps=lambda model, batch: other.sum(dim=1))  # fmt: skip
    reference = batch["reference"].double()
    inputs = {**inputs_of(batch), "label": batch["desirable"] > 0,
              "ref_logps": reference[:, 0], "ref_KL_logps": reference[:, 1]}  # fmt: skip
    wanted = KTOTrainer._compute_loss(theirs, lambda **_: outputs_of(own), inputs, False)
    assert found / PAIRS == pytest.approx(float(wanted), rel=1e-5)
    assert (shift == 0.0) == (theirs._metrics["train"]["kl"] == [0.0])


def test_smoothing_and_the_added_cross_entropy(model: Any) -> None:
    """cDPO's formula and a share of the chosen completion's mean cross-entropy, row by row in fp64."""
    batch = paired()
    spec = {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5}
    found = float(objective_of(spec).sums(model, batch).loss)
    sums = token_log_probs(model, batch["input_ids"], batch["targets"]).sum(dim=1).tolist()
    wanted = 0.0
    for n in range(PAIRS):
        reference = batch["reference"][n].tolist()
        margin = 0.3 * ((sums[n] - reference[0]) - (sums[PAIRS + n] - reference[1]))
        loss = 0.9 * math.log1p(math.exp(-margin)) + 0.1 * math.log1p(math.exp(margin))
        length = int((batch["targets"][n] != IGNORED).sum())
        wanted += float(batch["weights"][n]) * (loss - 0.5 * sums[n] / length)
    assert found == pytest.approx(wanted, rel=1e-5)


ALL = {**SPECS, "orpo": {"name": "orpo"}, "simpo": {"name": "simpo"}, "kto": {"name": "kto"},
       "added": {"name": "dpo", "sft_weight": 0.5}}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_rows_add_up_and_ignored_ones_add_nothing(model: Any, kind: str) -> None:
    """The gradient of a batch is the sum of its rows'; a row whose targets are ignored adds exactly zero."""
    objective: Any = objective_of(ALL[kind])
    batch = labelled() if kind == "kto" else paired()
    if kind == "kto":
        objective.set_baseline(objective.baseline_sums(model, batch))

    def rows(which: list[int]) -> dict[str, Any]:
        both = which if kind == "kto" else [*which, *(PAIRS + n for n in which)]
        return {name: value[both if name in ("input_ids", "targets") else which] for name, value in batch.items()}  # fmt: skip

    whole, gradient = sums_of(objective, model, batch)
    parts = [sums_of(objective, model, rows(which)) for which in ([0, 3], [1], [2, 4])]
    assert whole == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)
    assert torch.allclose(gradient, sum(g for _, g in parts), rtol=1e-4, atol=1e-6)
    ignored = rows([2, 4])
    ignored["targets"] = torch.full_like(ignored["targets"], IGNORED)
    loss, nothing = sums_of(objective, model, ignored)
    assert loss == 0.0
    assert not nothing.any()
    for _, count in objective.sums(model, ignored).metrics.values():
        assert float(count) == 0.0


@pytest.mark.parametrize("kind", ["sigmoid", "orpo", "kto"])
def test_chunks_change_nothing(model: Any, kind: str) -> None:
    """Log-probabilities of a chunk of logits at a time."""
    batch = labelled() if kind == "kto" else paired()
    found = []
    for chunked in (False, True):
        objective: Any = objective_of(ALL[kind], chunked)
        objective._chunks = 3 if chunked else 0
        if kind == "kto":
            objective.set_baseline(objective.baseline_sums(model, batch))
        found.append(sums_of(objective, model, batch))
    (loss, gradient), (other, others) = found
    assert loss == pytest.approx(other, rel=1e-6)
    assert torch.allclose(gradient, others, rtol=1e-4, atol=1e-6)
