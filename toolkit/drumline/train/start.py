"""Begins a run from a checkpoint of another one (`start_from`): its weights alone, or its whole state."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from drumline.checkpoint.manifest import digest_of, read_manifest, step_of, verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.checkpoint.state import TrainState
from drumline.checkpoint.weights import WEIGHTS
from drumline.errors import CheckpointError
from drumline.plan.model import Plan, StartFacts
from drumline.train import loader
from drumline.train.ema import PREFIX
from drumline.train.engines import Engine
from drumline.train.models.edits import head_of
from drumline.train.scaler import LossScaler
from drumline.train.tensor_shard import TensorShard

_STATE = ("optimizer.", PREFIX)
"""What tensors of a checkpoint are called that are no part of the model."""
_BUFFER = "buffer."

Shards = dict[str, TensorShard]


@dataclass(frozen=True)
class _Taken:
    """Which of a run's tensors are loaded, and what is told of the others, by name."""

    shards: Shards
    notes: list[str]


def begin_from(engine: Engine, plan: Plan, fresh: TrainState) -> TrainState:
    """Load the plan's checkpoint of another run into the engine; returns the state to train on from.

    A collective. CheckpointError where it is not the one of the plan, is damaged, or holds another model:
    every tensor that is left out is a classifier's head or optimizer state, and is told by name.
    """
    start = plan.start
    assert start
    path = Path(start.checkpoint)
    state = _verified(path, start)
    if state.base != fresh.base:
        raise CheckpointError(
            f"{path}: its adapter was trained on other weights than those of "
            f"{plan.recipe.model.name or plan.recipe.model.path}"
        )
    here = engine.shards()
    taken = _chosen(engine, plan, here, loader.shapes_in(path), path)
    loader.load(path, taken.shards, is_part=True)
    engine.loaded()
    if engine.ema and not any(name.startswith(PREFIX) for name in taken.shards):
        engine.ema.begin()
    if dist.get_rank() == 0:
        what = "the weights" if start.what == "weights" else "the state"
        print(f"begins with {what} of step {start.step:,}, loaded from {path}", flush=True)
        for note in taken.notes:
            print(note, flush=True)
    return fresh if start.what == "weights" else _counted_on(engine, start, state, fresh)


def _counted_on(
    engine: Engine, start: StartFacts, state: TrainState, fresh: TrainState
) -> TrainState:
    """The state after the other run's step, without its evaluations, which this run makes itself."""
    place = start.place
    fresh.step, fresh.samples = place.step, place.consumed
    fresh.slot, fresh.own_samples = place.slot, place.of_these
    fresh.tokens, fresh.loss = state.tokens, state.loss
    if start.continues_data:
        fresh.recent_losses, fresh.noise = state.recent_losses, state.noise
    if state.loss_scale and engine.scaler:
        engine.scaler = LossScaler(**state.loss_scale)
    return fresh


def _verified(path: Path, start: StartFacts) -> TrainState:
    """Verify every bit of the checkpoint, each rank its share; its state, the same error on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state, error = TrainState(), ""
    try:
        index = read_manifest(path)
        if digest_of(index) != start.sha256:
            raise CheckpointError(f"{path}: it is not the checkpoint that the run was planned with")
        state = verify(path, range(rank, index["ranks"], world))
    except CheckpointError as problem:
        error = str(problem)
    errors: list[str] = [""] * world
    dist.all_gather_object(errors, error)
    if found := next(filter(None, errors), ""):
        others = [step_of(one) for one in find_checkpoints(path.parent) if one != path]
        nearest = (
            f"start_from.step={others[-1]}" if others else "put it back, or another start_from.run"
        )
        gone = f"{path} is gone" if not path.is_dir() else found
        raise CheckpointError(f"start_from: {gone}. Nearest: {nearest}")
    return state


def _chosen(
    engine: Engine, plan: Plan, here: Shards, there: dict[str, tuple[int, ...]], path: Path
) -> _Taken:
    """The tensors to load; CheckpointError where the models differ outside a classifier's head."""
    assert plan.start
    head = {f"{WEIGHTS}{name}" for name in head_of(engine.module.model, plan.recipe)}
    is_new_head = plan.start.what == "weights" and bool(head)
    taken, notes, wrong = {}, [], []
    for name, shard in here.items():
        if name.startswith(_STATE):
            continue
        if there.get(name) == shard.shape:
            taken[name] = shard
            continue
        stands = (
            f"{list(there[name])} there and {list(shard.shape)} here"
            if name in there
            else "not there"
        )
        if is_new_head and name in head:
            notes.append(f"new weights, drawn from seed {plan.recipe.seed}: {name} ({stands})")
        else:
            wrong.append(f"{name} is {stands}")
    unused = [name for name in there if name.startswith((WEIGHTS, _BUFFER)) and name not in here]
    if is_new_head:
        notes += [f"not taken over, since this model has none: {name}" for name in unused]
    else:
        wrong += [f"{name} is not here" for name in unused]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"start_from: {path} holds another model: {'; '.join(wrong[:3])}{more}"
        )
    if plan.start.what == "state":
        states = {name: shard for name, shard in here.items() if name.startswith(_STATE)}
        held = {name: shard for name, shard in states.items() if there.get(name) == shard.shape}
        taken |= held
        notes += [
            f"state that begins here, not there: {name}" for name in states.keys() - held.keys()
        ]
        gone = {name for name in there if name.startswith(_STATE)} - states.keys()
        notes += [f"state not taken over, not kept here: {name}" for name in gone]
    return _Taken(taken, sorted(notes))
