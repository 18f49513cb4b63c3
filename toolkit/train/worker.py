"""One rank: read the attempt's plan, join the others, train, write the outcome.

Started by a launcher as `python -m toolkit.train.worker --plan FILE --run-dir DIR --attempt N`.
A launcher's exit code does not tell the truth; the outcome file does.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from toolkit.errors import DrumlineError, LaunchError
from toolkit.plan.model import Plan, read_plan

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Run one rank; exit code 0 also when stopped, because the outcome file says which."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, default=0)
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    logs: Path = arguments.run_dir / "logs" / f"attempt-{arguments.attempt}"
    if not logs.is_dir():
        print(f"{logs} is not visible on this node; the run folder must be shared", file=sys.stderr)
        return LaunchError.exit_code
    _send_output_to(logs / f"rank-{rank}.log")
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: asked.append(received))
    (logs / f"rank-{rank}.pid").write_text(str(os.getpid()))
    beat = _heartbeat(logs / f"rank-{rank}.step")

    def begin_step(step: int) -> bool:
        beat(step)
        return bool(asked)

    try:
        outcome = _run(arguments, rank, begin_step)
    except BaseException as error:  # everything is told in the outcome file
        traceback.print_exc()
        _write_outcome(logs, rank, _failure(error))
        return 1
    _write_outcome(logs, rank, outcome)
    return 0


def _run(
    arguments: argparse.Namespace, rank: int, begin_step: Callable[[int], bool]
) -> dict[str, Any]:
    plan = read_plan(arguments.plan.read_text())
    import torch

    from toolkit.train.loop import train

    device = _device(plan)
    torch.set_num_threads(_threads(plan))
    with _process_group(plan, rank, device):
        result = train(plan, arguments.run_dir, device, arguments.attempt, begin_step)
    return vars(result)


def _device(plan: Plan) -> Any:
    """This rank's device; LaunchError where the machine has not what the plan asks for."""
    import torch

    if plan.recipe.cluster.gpu == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() <= local:
        raise LaunchError(
            f"the plan asks for GPU {local} ({plan.recipe.cluster.gpu}), this machine shows "
            f"{torch.cuda.device_count()}. Nearest: cluster.gpu=cpu, or fewer batch.gpus"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _threads(plan: Plan) -> int:
    """Compute threads of a CPU rank, so that the ranks of a node share its cores."""
    per_node = plan.batch.gpus // plan.batch.nodes
    return max(1, len(os.sched_getaffinity(0)) // per_node)


@contextlib.contextmanager
def _process_group(plan: Plan, rank: int, device: Any) -> Iterator[None]:
    """Join the other ranks; the world must be the plan's."""
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.batch.gpus:
        raise LaunchError(f"the plan names {plan.batch.gpus} ranks, the launcher started {world}")
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=plan.recipe.launch.hang_timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield
        dist.barrier()  # a rank that leaves early can abort the others' shutdown
    finally:
        dist.destroy_process_group()


def _heartbeat(path: Path) -> Callable[[int], None]:
    """A file that always holds the step that this rank is in; one small write a step."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def beat(step: int) -> None:
        os.pwrite(descriptor, f"{step:20d}".encode(), 0)

    return beat


def _failure(error: BaseException) -> dict[str, Any]:
    return {
        "outcome": "failed",
        "when": time.time(),
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code if isinstance(error, DrumlineError) else 4,
    }


def _write_outcome(logs: Path, rank: int, outcome: dict[str, Any]) -> None:
    path = logs / f"rank-{rank}.outcome.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(outcome))
    temporary.replace(path)


def _send_output_to(path: Path) -> None:
    """Everything this rank prints, from C++ too, goes to its own log."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
