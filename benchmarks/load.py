"""What does loading pretrained weights cost under FSDP2: host memory of each rank, and time?

    python benchmarks/load.py [--ranks 2] [--rounds 3]

A Llama of 500 MB in files of fp32 (125 M parameters) and of bf16 (250 M), its fp32 shards on the CPU; each way in fresh processes, in turns.
`ours`: drumline's ModelBuilder, which reads each block on one rank, broadcasts and shards it. `from_pretrained`:
every rank loads the whole model, then shards it. Memory is the peak of the process above what it held before:
anonymous, and all that is resident (with pages of the mapped files, which the kernel can drop). The bound is a
rank's share of the weights, one block, and 300 MB. Both ways must give the same bits.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
CONFIG = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048,
          "num_attention_heads": 12, "num_key_value_heads": 12}  # fmt: skip
WAYS = ("ours", "from_pretrained")


def resident() -> dict[str, float]:
    """Anonymous and all resident memory of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: line.split()[1]
        for line in lines
        if line.startswith(("RssAnon", "VmRSS"))
    }
    return {
        "anonymous": int(found["RssAnon"]) * 1024 / MB,
        "resident": int(found["VmRSS"]) * 1024 / MB,
    }


class Peak:
    """Context that watches this process' memory every 2 ms; `above`: its peak less what it was before, MB."""

    def __enter__(self) -> "Peak":
        self._before, self.above = resident(), {"anonymous": 0.0, "resident": 0.0}
        self._going = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._going:
            now = resident()
            self.above = {n: max(self.above[n], now[n] - self._before[n]) for n in now}
            time.sleep(0.002)

    def __exit__(self, *rest: Any) -> None:
        self._going = False
        self._thread.join()


def load_ours(folder: Path) -> Any:
    """Through ModelBuilder, block by block."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from drumline.data.dataset_manifest import DatasetManifest
    from drumline.recipe.load import validate
    from drumline.train.models import ModelBuilder

    recipe = validate(
        {"recipe": "load", "schema": 1, "model": {"source": "folder", "path": str(folder)},
         "data": {"source": "files", "path": "/x.txt", "task": "causal_lm", "sequence_length": 64},
         "batch": {"per_device": 1, "gpus": dist.get_world_size(), "accumulation": 1},
         "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 1}}, "load")  # fmt: skip
    manifest = DatasetManifest(
        task="causal_lm", fingerprint="f", samples=9, validation_samples=0, sequence_length=64,
        tokenizer="bytes", token_dtype="<u2", vocabulary=257)  # fmt: skip
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with Peak() as peak:
        started = time.perf_counter()
        builder = ModelBuilder(recipe, manifest, torch.device("cpu"))
        for block in builder.blocks():
            fully_shard(block, mesh=mesh)
        model = fully_shard(builder.finish(), mesh=mesh)
        seconds = time.perf_counter() - started
    return model, peak.above, seconds


def load_from_pretrained(folder: Path) -> Any:
    """Whole on every rank, then sharded."""
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with Peak() as peak:
        started = time.perf_counter()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
        seconds = time.perf_counter() - started
    return model, peak.above, seconds


def rank_main(way: str, folder: Path) -> None:
    """One rank of one way; prints one line of JSON."""
    import torch
    import torch.distributed as dist
    import transformers

    import drumline.train.models.builder
    import drumline.train.models.pretrained  # noqa: F401

    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **{
        **CONFIG, "num_hidden_layers": 1, "hidden_size": 24}))  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    model, above, seconds = (load_ours if way == "ours" else load_from_pretrained)(folder)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.to_local().detach().contiguous().numpy().tobytes())
    print(json.dumps({**above, "seconds": seconds, "digest": digest.hexdigest()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def start(way: str, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """All ranks of one way."""
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": f"{ROOT}/toolkit:{ROOT}/launchers"}  # fmt: skip
        command = [sys.executable, __file__, "--rank-of", way, "--folder", str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        return rank_main(options.rank_of, options.folder)
    for dtype, layers in (("float32", 16), ("bfloat16", 34)):
        compare(dtype, layers, options.ranks, options.rounds)


def compare(dtype: str, layers: int, world: int, rounds: int) -> None:
    """Both ways in turns; one table."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = transformers.AutoConfig.for_model("llama", **CONFIG, num_hidden_layers=layers)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100MB")
        whole = sum(p.numel() for p in model.parameters()) * 4 / MB
        block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 / MB
        bound = whole / world + block + 300
        del model
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        digests = set()
        for _ in range(rounds):
            for way in WAYS:
                ranks = start(way, folder, world)
                found[way] += ranks
                digests.add(tuple(rank["digest"] for rank in ranks))
    print(
        f"{dtype} files; as fp32 {whole:.0f} MB, a block {block:.0f} MB, {world} ranks: bound {bound:.0f} MB"
    )
    print(
        f"{'way':<16} {'anonymous':>10} {'resident':>9} {'seconds':>8}   (largest of all ranks; median time)"
    )
    for way, ranks in found.items():
        largest = {name: max(rank[name] for rank in ranks) for name in ("anonymous", "resident")}
        seconds = statistics.median(rank["seconds"] for rank in ranks)
        print(
            f"{way:<16} {largest['anonymous']:>10.0f} {largest['resident']:>9.0f} {seconds:>8.2f}"
        )
    print("the same bits" if len(digests) == 1 else f"{len(digests)} DIFFERENT sets of bits")


if __name__ == "__main__":
    main()
