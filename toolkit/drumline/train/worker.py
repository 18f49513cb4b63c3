"""One rank: read the attempt's plan, join the others, train, write the outcome.

Started by a launcher as `python -m drumline.train.worker --plan FILE --run-dir DIR --attempt N`.
The supervisor reads the outcome file, because a launcher's exit code is not reliable.
"""

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from drumline.errors import LaunchError
from drumline.hang_timeout import HangTimeout
from drumline.output import ForgivingOutput
from drumline.phases import Phase
from drumline.plan.model import Plan, read_plan
from drumline.processes import STACKS_SIGNAL, STOP_SIGNALS, Process
from drumline.rank_files import RankFiles
from drumline.secrets import Secrets
from drumline.train.failures import OUT_OF_MEMORY, exit_code_of, kind_of
from drumline.train.rank_watchdog import RankWatchdog, keep_collectives
from drumline.train.watch import Watch

_SUPERVISOR_POLL_S = 0.5
_FETCH_S = 6 * 3600.0
"""The longest that a model of the hub may take to be fetched."""


def main(argv: list[str] | None = None) -> int:
    """Run one rank; the exit code is 0 both when it finished and when it was stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--task", choices=["train", "verify", "verify-bitwise"], default="train")
    parser.add_argument("--until", type=int, help="Save and stop after this step.")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logs: Path = arguments.run_dir / "logs" / f"attempt-{arguments.attempt}"
    if not logs.is_dir():
        print(f"{logs} is not visible on this node; the run folder must be shared", file=sys.stderr)
        return LaunchError.exit_code
    files = RankFiles(logs, rank)
    _send_output_to(files.log)
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: asked.append(received))
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    _heed_the_supervisor(files, asked)
    if not files.announce():
        return 1
    heartbeats = files.open_heartbeat()
    watch = Watch(
        heartbeat=heartbeats.enter,
        wait=heartbeats.wait,
        stop_asked=lambda: bool(asked),
        begun=files.write_begun,
        started=files.write_started,
    )
    exit_code = 0
    try:
        plan = read_plan(arguments.plan.read_text(encoding="utf-8"))
        launch = plan.recipe.launch
        hang_timeout = HangTimeout(launch.hang_timeout_s, launch.hang_factor)
        with RankWatchdog(heartbeats, files, hang_timeout):
            outcome = _run(plan, arguments, files, watch)
    except BaseException as error:  # the outcome file reports every failure
        traceback.print_exc()
        outcome, exit_code = _failure(error, files.log), 1
    files.write_outcome({**outcome, "memory": _peaks()})
    watch.enter(Phase.ENDED)
    heartbeats.sync()
    return exit_code


def _run(
    plan: Plan, arguments: argparse.Namespace, files: RankFiles, watch: Watch
) -> dict[str, Any]:
    watch.enter(Phase.IMPORTING)
    # Expandable segments fragment far less than fixed ones (benchmarks/memory_ranges.py).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with _uncollected():
        import torch
        import torch._dynamo  # else the first optimizer or DDP imports it

        from drumline.train.device_memory import device_facts
        from drumline.train.loop import train

    device = _device(plan)
    torch.set_num_threads(_threads(plan))

    files.write_device(device_facts(device))
    watch.enter(Phase.JOINING)
    with _process_group(plan, files.rank, device):
        _have_model(plan, watch)
        if arguments.task == "train":
            outcome = train(
                plan,
                arguments.run_dir,
                device,
                attempt=arguments.attempt,
                watch=watch,
                until=arguments.until,
            )
            return vars(outcome)
        from drumline.train.verify import verify, verify_bitwise

        prove = verify if arguments.task == "verify" else verify_bitwise
        return vars(prove(plan, arguments.run_dir, device, watch))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection during imports, where it takes a fifth of the time, then freeze objects."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _heed_the_supervisor(files: RankFiles, asked: list[int]) -> None:
    """Start a thread that kills this rank within a second or two of its supervisor's death.

    A rank on another host gets no signals from the supervisor, so there the thread polls the files by which
    the supervisor asks for stacks, a stop, or the end of the attempt.
    """
    supervisor = Process.parse(os.environ.get("DRUMLINE_SUPERVISOR", ""))
    if supervisor is None:
        return

    def look() -> None:
        told = False
        while True:
            time.sleep(_SUPERVISOR_POLL_S)
            if supervisor.is_here and not supervisor.is_alive:
                _die("the supervisor is gone; so is this rank")
            asked_for = files.asked()
            if asked_for.stacks and not told:
                told = True
                if not supervisor.is_here:
                    faulthandler.dump_traceback(all_threads=True)
                keep_collectives(files)
            if supervisor.is_here:
                continue
            if asked_for.stop and not asked:
                asked.append(signal.SIGTERM)
            if asked_for.ended:
                _die("the attempt has ended; so has this rank")

    threading.Thread(target=look, name="supervisor", daemon=True).start()


def _die(words: str) -> None:
    print(words, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _device(plan: Plan) -> Any:
    """This rank's device; LaunchError where the machine has fewer GPUs than the plan needs."""
    import torch

    if plan.recipe.cluster.gpu == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() <= local:
        raise LaunchError(
            f"the plan asks for GPU {local} ({plan.recipe.cluster.gpu_name}), this machine shows "
            f"{torch.cuda.device_count()}. Nearest: cluster.gpu=cpu, or fewer batch.gpus"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _threads(plan: Plan) -> int:
    """Compute threads of this rank: the node's available cores divided among its ranks."""
    per_node = plan.mesh.ranks_per_node
    return max(1, len(os.sched_getaffinity(0)) // per_node)


@contextlib.contextmanager
def _process_group(plan: Plan, rank: int, device: Any) -> Iterator[None]:
    """Join the process group; LaunchError where the world size is not the plan's."""
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.mesh.ranks:
        raise LaunchError(f"the plan names {plan.mesh.ranks} ranks, the launcher started {world}")
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    # Longer than the watchdogs' timeouts: they can name the late rank, this last resort cannot.
    timeout = timedelta(seconds=2 * plan.recipe.launch.hang_timeout_s + 60)
    alone = world == 1 and "MASTER_ADDR" not in os.environ  # accelerate sets none for one rank
    meeting: dict[str, Any] = {}
    if alone:
        meeting = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, **meeting)
    try:
        yield
        if world > 1:
            dist.barrier()  # a rank that leaves early can abort the others' shutdown
    finally:
        dist.destroy_process_group()


def _have_model(plan: Plan, watch: Watch) -> None:
    """Fetch a model of the hub where this node's cache lacks it: one rank of the node, the others wait.

    They look at the cache, because a collective would time out before a large model is there.
    """
    spec = plan.recipe.model
    if spec.name is None:
        return
    from drumline.architectures.hub import fetch, is_cached

    if is_cached(spec.name, spec.revision):
        return
    watch.enter(Phase.JOINING, f"fetching {spec.name}", limit_s=_FETCH_S)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        fetch(spec.name, spec.revision)
    while not is_cached(spec.name, spec.revision):
        time.sleep(_SUPERVISOR_POLL_S)


def _failure(error: BaseException, log: Path) -> dict[str, Any]:
    """The outcome of an exception; its `kind` decides what the supervisor does next."""
    kind = kind_of(error)
    if kind == OUT_OF_MEMORY:
        _keep_memory_summary(log)
    return {
        "outcome": "failed",
        "when": time.time(),
        "error": type(error).__name__,
        "kind": kind,
        "message": _hidden(str(error).split("\nException raised from")[0])[:4000],
        "exit_code": exit_code_of(error),
        "suspect": getattr(error, "checkpoint", ""),
    }


def _hidden(text: str) -> str:
    return Secrets(os.environ).hide(text)


def _peaks() -> dict[str, int] | None:
    """Measured peak device memory of this rank in bytes; None without a GPU."""
    if "torch" not in sys.modules:
        return None
    from drumline.train.device_memory import device_peaks

    return device_peaks()


def _keep_memory_summary(log: Path) -> None:
    """Write the CUDA caching allocator's summary beside the rank's log, after an out-of-memory error."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(OSError, RuntimeError):
            log.with_suffix(".memory.txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")


def _send_output_to(path: Path) -> None:
    """Redirect stdout and stderr, C++ output included, to the rank's log; a full disk only loses output."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    hide = Secrets(os.environ).hide_quickly
    sys.stdout, sys.stderr = ForgivingOutput(1, hide=hide), ForgivingOutput(2, hide=hide)


if __name__ == "__main__":
    sys.exit(main())
