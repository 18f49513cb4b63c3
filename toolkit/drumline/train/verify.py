"""Checks on the real model and data that a split computes the gradient of the undivided batch.

The split runs as in training: the recipe's launcher, engine, micro-batches and loss weights. The
reference takes the step's rows one at a time through a model without any wrapper and sums their
gradients in fp64. Both run without dropout, whose masks depend on the micro-batch.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drumline.data.rows import Rows
from drumline.files import write_json
from drumline.phases import Phase
from drumline.plan import schedule
from drumline.plan.model import Plan
from drumline.train.batches import Step, StepReader, micro_batch_tensors, open_rows
from drumline.train.engines import Engine, build_engine
from drumline.train.engines.base import autocast_dtype
from drumline.train.loop import Outcome, forward_backward
from drumline.train.models import ModelBuilder
from drumline.train.objectives import ObjectiveModule, build_objective
from drumline.train.objectives.base import baseline_of
from drumline.train.objectives.over_ranks import one_row_at_a_time
from drumline.train.optimizers import RATE_RATIO, build_optimizer, set_rate
from drumline.train.own_loss import compare_with_own_loss
from drumline.train.reference import attach_reference, needs_reference
from drumline.train.watch import Watch

REPORT = "verify.json"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2, "bf16-pure": 5e-2}
"""Allowed relative error of the whole gradient, by precision: the dtype's rounding with a margin."""

UPDATES = 3
BITWISE_STEPS = 3
_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "activation_dropout", "dropout_p")
_NEGLIGIBLE = 1e-4


def verify(plan: Plan, folder: Path, device: torch.device, watch: Watch) -> Outcome:
    """Compare gradients of two steps, rates of three, and the loss of a row with the model's own code.

    Rank 0 writes verify.json.
    """
    rows = open_rows(plan, "train")
    engine = build_engine(plan, rows.manifest, device)
    silence_dropout(engine.module)
    engine.noise = None
    if needs_reference(plan):
        attach_reference(plan, engine, {"train": rows}, watch)
    reader = StepReader(plan, rows, dist.get_rank())
    engine.warm_up(reader.widest().tensors)
    clock = plan.clock()
    report: dict[str, Any] = {
        "tolerance": TOLERANCE[plan.recipe.precision],
        "steps": [],
        "rates": [],
        "why_not_additive": engine.module.objective.why_not_additive,
    }
    first = clock.first_step
    end_of_epoch = clock.last_step_of_epoch(clock.epoch(first))
    for number in sorted({first, min(end_of_epoch, plan.steps.total)}):
        watch.begin(number)
        step = reader.read(number)
        forward_backward(engine, step, watch)
        engine.clip(None)
        ours = {name: gradient.double() for name, gradient in engine.gradients()}
        engine.skip()
        watch.enter(Phase.REFERENCE)
        module = _plain_module(plan, rows, device)
        silence_dropout(module)
        if "own_loss" not in report:
            report["own_loss"] = compare_with_own_loss(plan, rows, module, step, device)
        with one_row_at_a_time():
            reference = undivided_gradient(plan, rows, module, step, device)
        del module
        report["steps"].append(
            {"step": number, "samples": step.samples, **_compare(ours, reference)}
        )
    for number in range(first, min(first + UPDATES - 1, plan.steps.total) + 1):
        wanted = schedule.rate(plan.schedule, number, clock)
        forward_backward(engine, reader.read(number), watch)
        engine.clip(plan.recipe.optimizer.max_grad_norm)
        engine.step(wanted)
        report["rates"].append({"step": number, "wanted": wanted, "taken": _rates(engine)})
    if dist.get_rank() == 0:
        write_json(folder / REPORT, report)
    return Outcome(outcome="finished", step=0, loss=None, evaluation=None)


def verify_bitwise(plan: Plan, folder: Path, device: torch.device, watch: Watch) -> Outcome:
    """Train three steps with per-sample gradients summed in slot order; rank 0 writes the weights' SHA-256.

    The digest is equal for every split on the same kind of machine. Costs one forward and backward per
    sample, and one broadcast of the whole gradient per sample.
    """
    torch.set_num_threads(1)  # the order of a sum must not depend on the split
    rows = open_rows(plan, "train")
    if needs_reference(plan):
        attach_reference(plan, build_engine(plan, rows.manifest, device), {"train": rows}, watch)
    module = _plain_module(plan, rows, device)
    silence_dropout(module)
    optimizer = build_optimizer(module, plan.recipe)
    reader, clock = StepReader(plan, rows, dist.get_rank()), plan.clock()
    first = clock.first_step
    last = min(first + BITWISE_STEPS - 1, plan.steps.total)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for number in range(first, last + 1):
        watch.begin(number)
        step = reader.read(number)
        with one_row_at_a_time():
            _sum_in_slot_order(plan, rows, module, parameters, step, device, watch)
        if plan.recipe.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, plan.recipe.optimizer.max_grad_norm)
        set_rate(optimizer, schedule.rate(plan.schedule, number, clock))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + flat.numpy().tobytes())
    if dist.get_rank() == 0:
        write_json(folder / REPORT, {"steps": last - first + 1, "sha256": digest.hexdigest()})
    return Outcome(outcome="finished", step=0, loss=None, evaluation=None)


def undivided_gradient(
    plan: Plan, rows: Rows, module: nn.Module, step: Step, device: torch.device
) -> dict[str, Tensor]:
    """(1/W) Σ of the gradients of the step's rows, summed in fp64; the rows are divided among the ranks."""
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in names.items()}
    _measure_baseline(plan, rows, module, step, device)
    for gradients in _row_gradients(plan, rows, module, names, step, device):
        for name, gradient in gradients.items():
            sums[name] += gradient.double()
    for total in sums.values():
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        total /= step.weight
    return {name.removeprefix("model."): total for name, total in sums.items()}


def silence_dropout(module: nn.Module) -> None:
    """Set every dropout probability to zero; everything else stays as in training."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def _plain_module(plan: Plan, rows: Rows, device: torch.device) -> ObjectiveModule:
    """The model and objective with the engine's initial weights, not wrapped by DDP, FSDP or DeepSpeed."""
    model = ModelBuilder(plan.recipe, rows.manifest, device).whole().to(device)
    return ObjectiveModule(model, build_objective(plan.recipe))


def _row_gradients(
    plan: Plan,
    rows: Rows,
    module: nn.Module,
    names: dict[str, nn.Parameter],
    step: Step,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """The unscaled gradients of this rank's share of the step's rows, one row at a time."""
    for place in _own_places(step):
        _row_backward(plan, rows, module, step, place, device)
        yield {name: p.grad for name, p in names.items() if p.grad is not None}
        module.zero_grad(set_to_none=True)


def _own_places(step: Step) -> range:
    """The places of this rank's share of the step's rows."""
    return range(dist.get_rank(), step.samples, dist.get_world_size())


def _row_backward(
    plan: Plan, rows: Rows, module: nn.Module, step: Step, place: int, device: torch.device
) -> None:
    """Backward of the weighted loss of one sample; `place` is its position in the step."""
    _row_forward(plan, rows, module, step, place, device)[0].backward()


def _row_forward(
    plan: Plan,
    rows: Rows,
    module: nn.Module,
    step: Step,
    place: int,
    device: torch.device,
    method: str = "sums",
) -> Tensor:
    """What a method of the objective returns for one sample; `place` is its position in the step."""
    by_sample = plan.recipe.batch.weighting == "sample"
    which = slice(place, place + 1)
    one = micro_batch_tensors(rows, step.indices[which], by_sample, False, step.seeds[which])
    tensors = {name: tensor.to(device) for name, tensor in one.items()}
    dtype = autocast_dtype(plan)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found: Tensor = module(tensors, method)
    return found


def _measure_baseline(
    plan: Plan, rows: Rows, module: Any, step: Step, device: torch.device
) -> None:
    """Give the objective the number that all losses of the step share, if it has one, from single rows."""
    baseline = baseline_of(module.objective)
    if baseline is None:
        return
    module.eval()
    sums = torch.zeros((), dtype=torch.float64, device=device)
    for place in range(step.samples):
        found = _row_forward(plan, rows, module, step, place, device, "baseline_sums")
        sums = sums + found.double()
    module.train()
    baseline.set_baseline(sums)


def _sum_in_slot_order(
    plan: Plan,
    rows: Rows,
    module: nn.Module,
    parameters: list[nn.Parameter],
    step: Step,
    device: torch.device,
    watch: Watch,
) -> None:
    """Sum per-sample gradients in slot order: one rank computes each and broadcasts it, all ranks add it."""
    rank = dist.get_rank()
    sums = [torch.zeros_like(p) for p in parameters]
    _measure_baseline(plan, rows, module, step, device)
    mesh = plan.mesh
    row = plan.batch.per_device * mesh.data_ranks
    for place in range(step.samples):
        watch.enter(Phase.REFERENCE, f"sample {place + 1} of {step.samples}")
        owner = mesh.reader(place % row // plan.batch.per_device)
        if owner == rank:
            _row_backward(plan, rows, module, step, place, device)
        for total, parameter in zip(sums, parameters, strict=True):
            gradient = parameter.grad if owner == rank else None
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            dist.broadcast(gradient, src=owner)
            total += gradient
        module.zero_grad(set_to_none=True)
    for total, parameter in zip(sums, parameters, strict=True):
        parameter.grad = total / step.weight


def _compare(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Relative error of the whole gradient, and of the worst parameter.

    The latter leaves out parameters whose gradient norm is at most 1e-4 of the whole: their relative error is
    rounding noise.
    """
    assert set(ours) == set(reference), set(ours) ^ set(reference)
    total = torch.stack([g.norm() for g in reference.values()]).norm()
    errors = {name: (ours[name] - reference[name]).norm() for name in reference}
    apart = torch.stack(list(errors.values())).norm()
    relative = {
        name: float(error / reference[name].norm())
        for name, error in errors.items()
        if reference[name].norm() > _NEGLIGIBLE * total
    }
    worst = max(relative, key=lambda name: relative[name], default="")
    return {
        # of a reference that is zero: all is error
        "relative_error": float(apart / total) if total > 0 else float(apart > 0),
        "worst_parameter": worst or max(errors, key=lambda name: float(errors[name])),
        "worst_relative_error": relative.get(worst, float(apart > 0)),
    }


def _rates(engine: Engine) -> list[float]:
    """The learning rate of the last update, of every rank's optimizer."""
    group = engine.optimizer.param_groups[0]
    mine = float(group["lr"]) / group.get(RATE_RATIO, 1.0)
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
