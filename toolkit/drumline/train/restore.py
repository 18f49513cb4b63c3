"""What an attempt goes on from: the newest sound checkpoint, another run's, or the first weights."""

from pathlib import Path

import torch.distributed as dist

from drumline.checkpoint.retention import remove_abandoned
from drumline.checkpoint.state import TrainState
from drumline.data.rows import Rows
from drumline.errors import CheckpointError
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.train import loader
from drumline.train.engines import Engine
from drumline.train.models.build import base_fingerprint
from drumline.train.reference import attach_reference, needs_reference
from drumline.train.scaler import LossScaler
from drumline.train.start import begin_from
from drumline.train.watch import Watch


def restored(
    engine: Engine, plan: Plan, run_folder: Path, watch: Watch, parts: dict[str, Rows]
) -> tuple[TrainState, str | None]:
    """The state to go on from; and the reference's log-probabilities for these parts, if they are needed.

    They are of the weights before training, so they come before a checkpoint is loaded, or after that which
    the run begins from. Raises `Asked` when any rank was asked to stop.
    """
    has_reference = needs_reference(plan)
    if has_reference and plan.start is None:
        attach_reference(plan, engine, parts, watch)
    watch.enter(Phase.LOADING)
    state, suspect = _restore(engine, plan, run_folder, watch)
    if has_reference and plan.start is not None:
        is_begun = state.step > plan.start.place.step
        attach_reference(plan, engine, parts, watch, is_begun=is_begun)
    return state, suspect


def _restore(
    engine: Engine, plan: Plan, run_folder: Path, watch: Watch
) -> tuple[TrainState, str | None]:
    """Load the newest sound checkpoint; returns its state, or a fresh one where there is none.

    Also returns the checkpoint's name if an older one exists to fall back to, else None.
    """
    folder = run_folder / "checkpoints"
    if dist.get_rank() == 0:
        remove_abandoned(folder)
    chosen = loader.choose(folder, run_folder / "metrics.jsonl")
    base = [base_fingerprint(plan.recipe) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(base, src=0)
    if chosen.path is None:
        fresh = TrainState(
            training_sha256=plan.training_sha256,
            fingerprint=plan.data.fingerprint,
            rows=plan.data.rows,
            base=base[0],
            evaluation_due=bool(plan.recipe.row_evaluation and plan.recipe.row_evaluation.at_start),
        )
        if plan.start:
            fresh = begin_from(engine, plan, fresh)
            watch.step = watch.done = fresh.step
        return fresh, None
    path, state = chosen.path, chosen.state
    watch.step = watch.done = state.step
    for what, saved, here in (
        ("training_sha256", state.training_sha256, plan.training_sha256),
        ("data fingerprint", state.fingerprint, plan.data.fingerprint),
        (f"weights of {plan.recipe.model.name or plan.recipe.model.path}", state.base, base[0]),
    ):
        if saved != here:
            raise CheckpointError(
                f"{path} belongs to another training: {what} {saved}, here {here}"
            )
    loader.load(path, engine.shards())
    engine.loaded()
    watch.begun({"from_step": state.step, "checkpoint": path.name, "set_aside": chosen.set_aside})
    print(f"going on from step {state.step}, loaded from {path}", flush=True)
    if state.loss_scale:
        engine.scaler = LossScaler(**state.loss_scale)
    return state, path.name if chosen.has_older else None
