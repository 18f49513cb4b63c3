"""Is the predicted memory what a GPU really needs?

    python benchmarks/memory_truth.py              on a GPU: the whole grid, at most 24 minutes
    python benchmarks/memory_truth.py --smoke      without one: two tiny models on real CPU tensors, to see
                                                   the script run
    python benchmarks/memory_truth.py --predict-again   anywhere: what was measured stays, the estimates are
                                                   those of the present code

Trains three real steps of every model of a grid through `drumline.train.loop.train`, one process, world
size 1 (also with DDP's and FSDP2's wrappers around it). Models whose lowest estimate is above the device's
memory are left out. Writes into `benchmarks/truth/` (`--out`), named by GPU and torch:

- a CSV with predicted and measured bytes (allocated, reserved, device) and the phase of the peak, whose first
  line names GPU, driver and versions;
- a calibration table for DRUMLINE_CALIBRATION; what NCCL needs is not measured by one process, so it is added
  from the published figures;
- and, in `docs/memory.md` (`--docs`), the summary of all these CSVs: errors by total, and how many
  configurations that were said to fit ran out of memory.
"""

import argparse
import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / "toolkit"),
    str(ROOT / "launchers"),
]  # also where drumline is not installed
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as workers do
os.environ.setdefault("DRUMLINE_CACHE", str(Path(tempfile.gettempdir()) / "drumline-truth"))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from drumline.architectures.gpus import find_gpu, gpu_names
from drumline.data.prepare import prepare
from drumline.memory.calibration import Calibration, Pair, fit
from drumline.memory.closed_form import estimate
from drumline.memory.ranges import Device
from drumline.phases import Phase
from drumline.plan.footprint import device_of, load_of
from drumline.plan.model import Plan
from drumline.plan.resolve import shape_of
from drumline.plan.world import World
from drumline.recipe.load import merge, validate
from drumline.session.planning import make_plan
from drumline.trace.recorder import Recorder
from drumline.train import loop
from drumline.train.compiling import compile_module
from drumline.train.device_memory import device_peaks
from drumline.train.engines.torch import TorchEngine
from drumline.train.models import ModelBuilder, builder
from drumline.train.watch import Watch

STEPS = 3
TOTALS = ("allocated", "reserved", "device")
COLUMNS = ("model", "parameters", "per_device", "length", "accumulation", "precision", "wrapper", "checkpointing",
           "offload", "attention", "implementation", "chunked", "compile", "verdict", "outcome", "phase", "measured_phase",
           *(f"{kind}_{name}" for name in TOTALS for kind in ("low", "expected", "high", "measured")), "seconds")  # fmt: skip

MARKS = ("<!-- benchmarks/memory_truth.py writes from here -->", "<!-- to here -->")
"""Lines of docs/memory.md."""

NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


_WORKSPACES = 100 << 20
"""Bytes that stay allocated between configurations: cuBLAS' workspaces."""


def gpt2(h: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    """A GPT-2 of the published sizes."""
    return "gpt2", {"n_embd": h, "n_layer": layers, "n_head": heads, "vocab_size": 50304,
                    "n_positions": 4096, **NO_DROPOUT}  # fmt: skip


def llama(h: int, ffn: int, layers: int, heads: int, tied: bool) -> tuple[str, dict[str, Any]]:
    """A Llama-3 shape."""
    return "llama", {"hidden_size": h, "intermediate_size": ffn, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256,
                     "tie_word_embeddings": tied, "max_position_embeddings": 8192}  # fmt: skip


MODELS = {
    "gpt2-124m": gpt2(768, 12, 12),
    "gpt2-355m": gpt2(1024, 24, 16),
    "gpt2-774m": gpt2(1280, 36, 20),
    "llama-1b": llama(2048, 8192, 16, 32, True),
    "llama-3b": llama(3072, 8192, 28, 24, True),
    "llama-8b": llama(4096, 14336, 32, 32, False),
    "tiny-gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512, **NO_DROPOUT}),
    "tiny-llama": ("llama", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                             "num_attention_heads": 4, "vocab_size": 512}),
}  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    """Every configuration: the most different ones first, what is compiled last."""
    base = {"model": "llama-1b", "b": 2, "length": 2048, "precision": "bf16"}
    changes: list[dict[str, Any]] = [
        {}, {"precision": "bf16-pure"}, {"precision": "fp32"}, {"implementation": "foreach"}, {"chunked": True},
        {"k": 4}, {"wrapper": "ddp"}, {"attention": "eager"}, {"checkpointing": "selective"},
        {"checkpointing": "full", "offload": True}, {"wrapper": "ddp", "k": 4}, {"wrapper": "fsdp"},
        {"wrapper": "fsdp", "k": 4}, {"wrapper": "fsdp", "precision": "bf16-pure"},
    ]  # fmt: skip
    yield from ({**base, **change} for change in changes)
    big = {"model": "llama-8b", "b": 1, "length": 4096, "precision": "bf16-pure", "checkpointing": "full",
           "chunked": True}  # fmt: skip
    yield from (
        {**big, **change}
        for change in ({}, {"implementation": "foreach"}, {"b": 4, "wrapper": "fsdp"})
    )
    for model, b, length in (("gpt2-355m", 16, 1024), ("llama-1b", 8, 4096), ("llama-3b", 4, 4096)):
        full = {**base, "model": model, "b": b, "length": length, "checkpointing": "full"}
        yield full
        yield {**full, "chunked": True}
    yield {**base, "compile": True}
    for model, sizes in (("gpt2-124m", [(8, 1024), (32, 1024)]), ("gpt2-355m", [(8, 1024)]),
                         ("gpt2-774m", [(8, 1024)]), ("llama-1b", [(4, 2048), (1, 4096)]),
                         ("llama-3b", [(1, 2048), (2, 4096)])):  # fmt: skip
        for b, length in sizes:
            for precision in ("bf16", "bf16-pure", "fp32"):
                yield {"model": model, "b": b, "length": length, "precision": precision}
    yield {**base, "compile": True, "checkpointing": "full"}


def smoke_grid() -> Iterator[dict[str, Any]]:
    """Two that run anywhere."""
    yield {"model": "tiny-gpt2", "b": 2, "length": 64, "precision": "fp32"}
    yield {
        "model": "tiny-llama",
        "b": 2,
        "length": 64,
        "precision": "fp32",
        "checkpointing": "full",
    }


def plan_of(spec: dict[str, Any], gpu: str, steps: int = STEPS) -> Plan:
    """The plan of one configuration, on data that every machine has."""
    architecture, config = MODELS[spec["model"]]
    k, wrapper = spec.get("k", 1), spec.get("wrapper", "none")
    plain = {
        "recipe": "truth",
        "schema": 1,
        "model": {"source": "config", "architecture": architecture, "config": config,
                  "activation_checkpointing": spec.get("checkpointing", "none"),
                  "activation_offload": spec.get("offload", False),
                  "attention": spec.get("attention", "sdpa"),
                  "compile": spec.get("compile", False),
                  "adapter": spec.get("adapter")},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "tokenizer": "bytes",
                 "sequence_length": spec["length"]},
        "batch": {"per_device": spec["b"], "gpus": 1, "accumulation": k},
        "cluster": {"gpu": gpu},
        "strategy": {"name": "fsdp" if wrapper == "fsdp" else "ddp"},
        "precision": spec["precision"],
        "optimizer": {"name": "adamw", "lr": 1e-5, "weight_decay": 0.1,
                      "implementation": spec.get("implementation", "fused")},
        "loss": {"chunked": spec.get("chunked", False)},
        "duration": {"steps": steps},
        "checkpoint": {"keep_best": 0, "async": False},
    }  # fmt: skip
    recipe = validate(merge(plain, {}), "truth")
    prepare(recipe.data, recipe.project)
    return make_plan(recipe)


def predicted(plan: Plan, spec: dict[str, Any]) -> Any:
    """The closed form's peak; DDP's buckets need a second rank to be there, so it is said to exist."""
    gpu = find_gpu(plan.recipe.cluster.gpu)
    shape = shape_of(plan.recipe, World())
    assert not isinstance(shape, str)
    length = plan.recipe.data.sequence_length
    load = load_of(plan.recipe, shape, plan.batch.split, gpu, length)
    if spec.get("wrapper") == "ddp":
        load = replace(load, ranks=2)
    return estimate(load, device_of(gpu, plan.memory.capacity, plan.mesh))


class WrappedEngine(TorchEngine):
    """DDP around a single rank, as the engine does it with several."""

    def _wrap(self) -> Any:
        if self.plan.recipe.model.compile:
            compile_module(self.module)
        return DistributedDataParallel(
            self.module, device_ids=[self.device.index], gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )  # fmt: skip

    def skip(self) -> None:
        """Keep the views of the buckets."""
        self.optimizer.zero_grad(set_to_none=False)


class Phases(Watch):
    """The largest allocation of each of the loop's phases."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase = str(Phase.BUILDING)

    def enter(self, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        """Close the phase before."""
        self.close()
        self._phase = str(phase)

    def close(self) -> None:
        """Read the counters of the phase that ends, and begin them anew."""
        found = device_peaks()
        if found:
            before = self.peaks.get(self._phase, found)
            self.peaks[self._phase] = {name: max(found[name], before[name]) for name in TOTALS}
            torch.cuda.reset_peak_memory_stats()


def measure(
    plan: Plan, spec: dict[str, Any], device: torch.device
) -> tuple[str, dict[str, int], str]:
    """Outcome, peak bytes by total, and the phase of the largest allocation."""
    watch = Phases()
    original = loop.build_engine
    if spec.get("wrapper") == "ddp":
        loop.build_engine = WrappedEngine  # type: ignore[assignment]
    outcome = "trained"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        try:
            if device.type == "cpu":
                with Recorder() as recorder:
                    loop.train(plan, Path(folder), device, watch=watch)
                peak = recorder.recording.peak()
                return outcome, dict.fromkeys(TOTALS, peak.bytes), peak.phase or "not told"
            loop.train(plan, Path(folder), device, watch=watch)
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            if "out of memory" not in str(error):
                raise
            outcome = "out of memory"
        finally:
            loop.build_engine = original
            watch.close()
    peaks = {name: max(found[name] for found in watch.peaks.values()) for name in TOTALS}
    phase = max(watch.peaks, key=lambda name: watch.peaks[name]["allocated"])
    return outcome, peaks, phase


def row_of(spec: dict[str, Any], plan: Plan, device: torch.device) -> dict[str, Any]:
    """One line of the CSV."""
    clear(device)
    started = time.monotonic()
    outcome, measured, phase = measure(plan, spec, device)
    row: dict[str, Any] = {
        "model": spec["model"], "parameters": plan.cost.parameters, "per_device": spec["b"],
        "length": spec["length"], "accumulation": spec.get("k", 1), "precision": spec["precision"],
        "wrapper": spec.get("wrapper", "none"), "checkpointing": spec.get("checkpointing", "none"),
        "offload": spec.get("offload", False), "attention": spec.get("attention", "sdpa"),
        "implementation": spec.get("implementation", "fused"), "chunked": spec.get("chunked", False),
        "compile": spec.get("compile", False),
        "outcome": outcome, "measured_phase": phase, "seconds": round(time.monotonic() - started, 1),
        **{f"measured_{name}": measured[name] for name in TOTALS},
    }  # fmt: skip
    return {**row, **estimates(plan, spec)}


def estimates(plan: Plan, spec: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that the closed form gives."""
    peak = predicted(plan, spec)
    row: dict[str, Any] = {
        "verdict": peak.totals.verdict(plan.memory.capacity),
        "phase": peak.phase,
    }
    for name in TOTALS:
        three = getattr(peak.totals, name)
        row |= {f"low_{name}": three.low, f"expected_{name}": three.expected,
                f"high_{name}": three.high}  # fmt: skip
    return row


def spec_of(row: dict[str, str]) -> dict[str, Any]:
    """The configuration of a line of a CSV."""
    numbers = {"b": "per_device", "length": "length", "k": "accumulation"}
    flags = ("offload", "chunked", "compile")
    words = ("model", "precision", "wrapper", "checkpointing", "attention", "implementation")
    return {
        **{name: int(row[column]) for name, column in numbers.items()},
        **{name: row[name] == "True" for name in flags},
        **{name: row[name] for name in words},
    }


def predict_again(folder: Path) -> None:
    """Replace the estimates in every CSV of the folder by those of the present code."""
    for path in sorted(folder.glob("*.csv")):
        first, *lines = path.read_text().splitlines()
        gpu = path.stem.partition("-torch")[0]
        rows: list[dict[str, Any]] = list(csv.DictReader(lines))
        for row in rows:
            spec = spec_of(row)
            row.update(estimates(plan_of(spec, gpu), spec))
        with path.open("w", newline="") as file:
            file.write(first + "\n")
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        cells, wrong = summary(rows)
        print(path.name, *cells, f"said to fit and ran out of memory: {wrong}", sep="\n  ")


def clear(device: torch.device) -> None:
    """Give back what the configuration before held, and begin the counters anew.

    NCCL's thread keeps tensors of collectives that are done for up to a second.
    """
    gc.unfreeze()
    gc.collect()
    if device.type == "cuda":
        deadline = time.monotonic() + 5
        while torch.cuda.memory_allocated() > _WORKSPACES and time.monotonic() < deadline:
            time.sleep(0.2)
            gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def leave_out(device: torch.device) -> None:
    """Leave out what takes minutes and is not measured here: drawing on the CPU, and saving.

    A run draws its first weights on the CPU, so that every machine begins from the same ones, and saves after
    its last step. With both, three configurations had their peaks in backward, of the same bytes.
    """

    def draw(self: ModelBuilder, units: list[tuple[str, list[torch.nn.Module]]]) -> None:
        for _, modules in units:
            builder._allocate(modules, device)
            builder._initialise(self.model, modules)

    def save(*arguments: Any, **options: Any) -> None: ...

    ModelBuilder._draw = draw  # type: ignore[method-assign]
    loop._Loop._save = save


def machine() -> dict[str, str]:
    """GPU, driver and versions."""
    import transformers

    facts = {"torch": torch.__version__, "transformers": transformers.__version__,
             "python": sys.version.split()[0]}  # fmt: skip
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda),
                  "driver": driver[0] if driver else "unknown"}  # fmt: skip
    return facts


def known_gpu() -> str:
    """The table's name for this machine's GPU: the longest whose words are all in the name that torch gives."""
    name = torch.cuda.get_device_name().lower()
    fitting = [
        row for row in gpu_names() if all(word in name for word in row.replace("gb", "").split("-"))
    ]
    if not fitting:
        raise SystemExit(
            f"{name}: not in the table of GPUs; add a row to toolkit/drumline/architectures/gpus.yaml"
        )
    return max(fitting, key=len)


def errors_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Expected over measured bytes of one total, less one, of the rows that trained."""
    return [int(row[f"expected_{name}"]) / int(row[f"measured_{name}"]) - 1 for row in rows]


def summary(rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """By total: median and worst error, and how many were above the high end; and the wrongly said to fit."""
    trained = [row for row in rows if row["outcome"] == "trained"]
    cells = []
    for name in TOTALS:
        errors = errors_of(trained, name)
        above = sum(int(row[f"measured_{name}"]) > int(row[f"high_{name}"]) for row in trained)
        cells.append(
            f"{statistics.median(map(abs, errors)):.2%}, worst {max(errors, key=abs):+.2%}, "
            f"above high {above} of {len(trained)}"
        )
    wrong = sum(row["outcome"] != "trained" and row["verdict"] == "fits" for row in rows)
    return cells, f"{wrong} of {len(rows)}"


def calibration_of(rows: list[dict[str, Any]], gpu: str) -> Calibration:
    """What these rows correct, by strategy; for several ranks the published bytes of NCCL are added."""
    pairs = [
        Pair(
            run=row["model"],
            gpu=gpu,
            strategy="fsdp" if row["wrapper"] == "fsdp" else "ddp",
            predicted={name: int(row[f"expected_{name}"]) for name in TOTALS},
            measured={name: int(row[f"measured_{name}"]) for name in TOTALS},
        )
        for row in rows
        if row["outcome"] == "trained"
    ]
    alone, several = Device(None, 0).outside(), Device(None, 0, ranks=8).outside()
    network = [0.0, several[1] - alone[1], several[2] - alone[2]]
    return Calibration(tuple(
        replace(row, outside=[int(size + more) for size, more in zip(row.outside, network, strict=True)])
        for row in fit(pairs).rows
    ))  # fmt: skip


def write_docs(docs: Path, folder: Path) -> None:
    """Replace what stands between MARKS in the docs by a table of all CSVs in the folder."""
    lines = [
        "| GPU and versions | allocated | reserved | device | said to fit, ran out |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.csv")):
        text = path.read_text().splitlines()
        cells, wrong = summary(list(csv.DictReader(text[1:])))
        lines.append(f"| {text[0][2:]} | {' | '.join(cells)} | {wrong} |")
    before, _, rest = docs.read_text().partition(MARKS[0])
    assert rest, f"{docs} has no {MARKS[0]}"
    after = rest.partition(MARKS[1])[2]
    docs.write_text(before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after)


def main() -> None:
    """Measure, write, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=24.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/truth")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/memory.md")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--predict-again", action="store_true")
    arguments = parser.parse_args()
    if arguments.predict_again:
        predict_again(arguments.out)
        write_docs(arguments.docs, arguments.out)
        return
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --smoke shows that the script runs")
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", 0)
    gpu = "cpu" if arguments.smoke else known_gpu()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        leave_out(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    facts = machine()
    path = arguments.out / f"{gpu}-torch{facts['torch'].split('+')[0]}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    rows: list[dict[str, Any]] = []
    with path.open("w", newline="") as file:
        file.write("# " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for spec in smoke_grid() if arguments.smoke else grid():
            if time.monotonic() > deadline:
                print("out of time; the rest is left out")
                break
            plan = plan_of(spec, gpu)
            memory = plan.memory
            if memory.capacity and memory.device and memory.device.low > memory.capacity:
                print(f"{spec}: left out, needs {memory.device.low / 2**30:.0f} GiB at least")
                continue
            rows.append(row_of(spec, plan, device))
            writer.writerow(rows[-1])
            file.flush()
            shown = " ".join(
                f"{name} {rows[-1][f'expected_{name}'] / 2**30:.2f}/{rows[-1][f'measured_{name}'] / 2**30:.2f}"
                for name in TOTALS
            )
            print(f"{spec} {rows[-1]['outcome']}: expected/measured GiB {shown}", flush=True)
    cells, wrong = summary(rows)
    for name, cell in zip(TOTALS, cells, strict=True):
        print(f"{name:<10} median |error| {cell}")
    print(f"said to fit and ran out of memory: {wrong}")
    table = path.with_suffix(".yaml")
    table.write_text(json.dumps(calibration_of(rows, gpu).to_plain(), indent=2) + "\n")
    write_docs(arguments.docs, arguments.out)
    print(f"measured in {path}, calibration in {table}, summary in {arguments.docs}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
