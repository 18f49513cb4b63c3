"""One rank: read the attempt's plan, join the others, train, write the outcome.

Started by a launcher as `python -m toolkit.train.worker --plan FILE --run-dir DIR --attempt N`.
A launcher's exit code does not tell the truth; the outcome file does.
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

from toolkit.errors import DrumlineError, LaunchError
from toolkit.files import ForgivingOutput
from toolkit.patience import Patience
from toolkit.plan.model import Plan, read_plan
from toolkit.processes import STACKS_SIGNAL, STOP_SIGNALS, Process
from toolkit.rank_files import RankFiles
from toolkit.train.alarm import Alarm, keep_collectives
from toolkit.train.watch import Watch

_SUPERVISOR_POLL_S = 0.5
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo",
              "Timed out waiting", "DistNetworkError", "DistBackendError")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one rank; exit code 0 also when stopped, because the outcome file says which."""
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
    beats = files.open_beat()
    watch = Watch(beats, beats.wait, lambda: bool(asked), files.write_begun)
    try:
        plan = read_plan(arguments.plan.read_text())
        launch = plan.recipe.launch
        with Alarm(beats, files, Patience(launch.hang_timeout_s, launch.hang_factor)):
            outcome = _run(plan, arguments, files, watch)
    except BaseException as error:  # everything is told in the outcome file
        traceback.print_exc()
        files.write_outcome({**_failure(error, files.log), "memory": _peaks()})
        return 1
    files.write_outcome({**outcome, "memory": _peaks()})
    return 0


def _run(
    plan: Plan, arguments: argparse.Namespace, files: RankFiles, watch: Watch
) -> dict[str, Any]:
    watch.at("imports")
    # Far less fragmentation than segments of fixed size (benchmarks/memory_ranges.py).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with _uncollected():
        import torch
        import torch._dynamo  # the first optimizer would import it, and the first DDP

        from toolkit.train.loop import train
        from toolkit.train.memory import device_facts

    device = _device(plan)
    torch.set_num_threads(_threads(plan))

    files.write_device(device_facts(device))
    watch.at("joining the others")
    with _process_group(plan, files.rank, device):
        if arguments.task == "train":
            where = arguments.run_dir, device, arguments.attempt
            return vars(train(plan, *where, watch, arguments.until))
        from toolkit.train.verify import verify, verify_bitwise

        prove = verify if arguments.task == "verify" else verify_bitwise
        return vars(prove(plan, arguments.run_dir, device, watch))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """For imports: what they make stays, and looking for garbage among it takes a fifth of their time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _heed_the_supervisor(files: RankFiles, asked: list[int]) -> None:
    """Die within a second or two of the process that supervises this attempt, however it ended.

    On another host than the supervisor's no signal comes: there its files tell all that it wants.
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
    # Longer than the watchdog's, which can tell who is late; this one ends ranks without a supervisor.
    timeout = timedelta(seconds=2 * plan.recipe.launch.hang_timeout_s + 60)
    alone = world == 1 and "MASTER_ADDR" not in os.environ  # accelerate sets nothing for one rank
    meeting: dict[str, Any] = {}
    if alone:
        meeting = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, **meeting)
    try:
        yield
        dist.barrier()  # a rank that leaves early can abort the others' shutdown
    finally:
        dist.destroy_process_group()


def _failure(error: BaseException, log: Path) -> dict[str, Any]:
    """The outcome of an exception: what kind it is decides what the supervisor does."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, DrumlineError):
        exit_code = error.exit_code
    else:
        exit_code = 4
        if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            kind = "OutOfMemory"
            _keep_memory_summary(log)
        elif any(words in f"{kind} {text}" for words in _PEER_LOST):
            kind = "PeerLost"
    return {
        "outcome": "failed",
        "when": time.time(),
        "error": type(error).__name__,
        "kind": kind,
        "message": text.split("\nException raised from")[0][:4000],
        "exit_code": exit_code,
        "suspect": getattr(error, "checkpoint", ""),
    }


def _peaks() -> dict[str, int] | None:
    """What this rank's device really held at most; None where there was none."""
    if "torch" not in sys.modules:
        return None
    from toolkit.train.memory import device_peaks

    return device_peaks()


def _keep_memory_summary(log: Path) -> None:
    """On a GPU: what the caching allocator held when it ran out, beside the rank's log."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(OSError, RuntimeError):
            log.with_suffix(".memory.txt").write_text(torch.cuda.memory_summary())


def _send_output_to(path: Path) -> None:
    """Everything this rank prints, from C++ too, goes to its own log; a full disk only mutes it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = ForgivingOutput(1), ForgivingOutput(2)


if __name__ == "__main__":
    sys.exit(main())
