"""Proves on the real model and data that a split's gradient is that of the undivided batch.

The split runs as in training: the recipe's launcher, engine, micro-batches and loss weights. The
reference takes the step's rows one at a time through a model without any wrapper and sums their
gradients in fp64. Dropout is silenced in both, since its masks belong to micro-batches.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.data.rows import Rows
from toolkit.files import write_json
from toolkit.plan import schedule
from toolkit.plan.model import Plan
from toolkit.train.batches import Step, StepReader, micro_batch_tensors
from toolkit.train.engines import Engine, build_engine
from toolkit.train.engines.base import AUTOCAST
from toolkit.train.loop import Outcome, forward_backward
from toolkit.train.loss import LossModule
from toolkit.train.models import Skeleton
from toolkit.train.optimizers import build_optimizer
from toolkit.train.watch import Watch

REPORT = "verify.json"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2, "bf16-pure": 5e-2}
"""Relative error of the whole gradient, by precision: rounding of the type, with room."""

UPDATES = 3
BITWISE_STEPS = 3
_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "activation_dropout", "dropout_p")
_NEGLIGIBLE = 1e-4


def verify(plan: Plan, folder: Path, device: torch.device, watch: Watch) -> Outcome:
    """Compare the gradients of two steps and the rates of three; rank 0 writes verify.json."""
    assert plan.data.cache
    rows = Rows(Path(plan.data.cache), "train")
    engine = build_engine(plan, rows.card, device)
    silence_dropout(engine.module)
    reader = StepReader(plan, rows, dist.get_rank())
    engine.warm_up(reader.widest().tensors)
    clock = plan.clock()
    report: dict[str, Any] = {
        "tolerance": TOLERANCE[plan.recipe.precision],
        "steps": [],
        "rates": [],
    }
    for number in sorted({1, min(clock.last_step_of_epoch(1), plan.steps.total)}):
        watch.begin(number)
        step = reader.read(number)
        forward_backward(engine, step, watch)
        engine.clip(None)
        ours = {name: gradient.double() for name, gradient in engine.gradients()}
        engine.skip()
        watch.at("reference")
        reference = undivided_gradient(plan, rows, step, device)
        report["steps"].append(
            {"step": number, "samples": step.samples, **_compare(ours, reference)}
        )
    for number in range(1, min(UPDATES, plan.steps.total) + 1):
        wanted = schedule.rate(plan.schedule, number, clock)
        forward_backward(engine, reader.read(number), watch)
        engine.clip(plan.recipe.optimizer.max_grad_norm)
        engine.step(wanted)
        report["rates"].append({"step": number, "wanted": wanted, "taken": _rates(engine)})
    if dist.get_rank() == 0:
        write_json(folder / REPORT, report)
    return Outcome("finished", 0, None, None)


def verify_bitwise(plan: Plan, folder: Path, device: torch.device, watch: Watch) -> Outcome:
    """Train three steps on one gradient per sample, summed in slot order; rank 0 writes the SHA-256.

    Equal for every split on the same kind of machine. Costs a forward and a backward of one row
    per sample, and moves the whole gradient once per sample.
    """
    assert plan.data.cache
    torch.set_num_threads(1)  # the order of a sum must not depend on the split
    rows = Rows(Path(plan.data.cache), "train")
    module = _plain_module(plan, rows, device)
    silence_dropout(module)
    optimizer = build_optimizer(module, plan.recipe.optimizer)
    reader, clock = StepReader(plan, rows, dist.get_rank()), plan.clock()
    steps = min(BITWISE_STEPS, plan.steps.total)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for number in range(1, steps + 1):
        watch.begin(number)
        step = reader.read(number)
        _sum_in_slot_order(plan, rows, module, parameters, step, device, watch)
        if plan.recipe.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, plan.recipe.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(plan.schedule, number, clock)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + flat.numpy().tobytes())
    if dist.get_rank() == 0:
        write_json(folder / REPORT, {"steps": steps, "sha256": digest.hexdigest()})
    return Outcome("finished", 0, None, None)


def undivided_gradient(
    plan: Plan, rows: Rows, step: Step, device: torch.device
) -> dict[str, Tensor]:
    """(1/W) Σ over the step's rows of one row's gradient, summed in fp64; the ranks share the rows."""
    module = _plain_module(plan, rows, device)
    silence_dropout(module)
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in names.items()}
    for gradients in _row_gradients(plan, rows, module, names, step, device):
        for name, gradient in gradients.items():
            sums[name] += gradient.double()
    for total in sums.values():
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        total /= step.weight
    return {name.removeprefix("model."): total for name, total in sums.items()}


def silence_dropout(module: nn.Module) -> None:
    """Every dropout probability to zero; everything else stays as in training."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def _plain_module(plan: Plan, rows: Rows, device: torch.device) -> nn.Module:
    """The same weights as the engine's, without a wrapper."""
    model = Skeleton(plan.recipe, rows.card).whole().to(device)
    return LossModule(model, plan.recipe.data.task, plan.recipe.loss.chunked)


def _row_gradients(
    plan: Plan,
    rows: Rows,
    module: nn.Module,
    names: dict[str, nn.Parameter],
    step: Step,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the rows, one at a time; unscaled."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for place in range(rank, step.samples, world):
        _row_backward(plan, rows, module, step, place, device)
        yield {name: p.grad for name, p in names.items() if p.grad is not None}
        module.zero_grad(set_to_none=True)


def _row_backward(
    plan: Plan, rows: Rows, module: nn.Module, step: Step, place: int, device: torch.device
) -> None:
    """Gradient of the weighted loss of the step's sample in this slot."""
    by_sample = plan.recipe.batch.weighting == "sample"
    one = micro_batch_tensors(rows, step.indices[place : place + 1], by_sample, dummy=False)
    tensors = {name: tensor.to(device) for name, tensor in one.items()}
    dtype = AUTOCAST.get(plan.recipe.precision)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        total = module(tensors)[0]
    total.backward()


def _sum_in_slot_order(
    plan: Plan,
    rows: Rows,
    module: nn.Module,
    parameters: list[nn.Parameter],
    step: Step,
    device: torch.device,
    watch: Watch,
) -> None:
    """Sample by sample: its rank computes the gradient, all ranks add it, in the same order."""
    rank = dist.get_rank()
    sums = [torch.zeros_like(p) for p in parameters]
    row = plan.batch.per_device * plan.batch.gpus
    for place in range(step.samples):
        watch.at("sample")
        owner = place % row // plan.batch.per_device
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
    """Relative error of the whole gradient, and of the parameter that is worst.

    A parameter whose own gradient is negligible is left out of the second: noise over nothing.
    """
    assert set(ours) == set(reference), set(ours) ^ set(reference)
    total = torch.stack([g.norm() for g in reference.values()]).norm()
    errors = {name: (ours[name] - reference[name]).norm() for name in reference}
    whole = torch.stack(list(errors.values())).norm() / total
    relative = {
        name: float(error / reference[name].norm())
        for name, error in errors.items()
        if reference[name].norm() > _NEGLIGIBLE * total
    }
    worst = max(relative, key=lambda name: relative[name])
    return {
        "relative_error": float(whole),
        "worst_parameter": worst,
        "worst_relative_error": relative[worst],
    }


def _rates(engine: Engine) -> list[float]:
    """The learning rate that each rank's optimizer has taken last."""
    mine = float(engine.optimizer.param_groups[0]["lr"])
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
