"""How fast is `drumline prepare`, against datasets.map with the same tokenizer?

    python benchmarks/prepare.py [--rounds 3] [--megabytes 40]

A BPE tokenizer of 8,192 tokens trained on Python's own sources, and those sources as documents of a JSON-lines
file. Each in a process of its own, in turns: `drumline.data.prepare` (tokenised, packed, hashed, published), and
`load_dataset("json").map(batched, num_proc=cores)` with the same tokenizer, written to its Arrow cache (not
packed). Medians of tokens per second, and the largest memory of a process and its children.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))


def write_documents(path: Path, megabytes: int) -> None:
    """Python's own sources, again and again until there are enough."""
    sources = [
        p.read_text(errors="replace")
        for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ]
    written, number = 0, 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            text = f"# {number}\n{sources[number % len(sources)]}"
            number += 1
            written += file.write(json.dumps({"text": text}) + "\n")


def make_tokenizer(folder: Path, documents: Path) -> None:
    """Byte-level BPE, trained on the first documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = documents.read_text().splitlines()[:150]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|end|>"])
    inner.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(folder)


def ours(folder: Path) -> int:
    """Tokens that drumline prepares."""
    from drumline.data.dataset_manifest import read_dataset_manifest
    from drumline.data.prepare import prepare
    from drumline.recipe.data_section import Data

    data = Data(source="files", path=str(folder / "documents.jsonl"), task="causal_lm",
                tokenizer=str(folder / "tokenizer"), sequence_length=1024)  # fmt: skip
    manifest = read_dataset_manifest(prepare(data, None))
    assert manifest
    return manifest.label_tokens + 1


def datasets_map(folder: Path) -> int:
    """Tokens that datasets.map gives, each document with its end token."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        ids = [[*one, tokenizer.eos_token_id] for one in found.input_ids]
        return {"input_ids": ids, "length": [len(one) for one in ids]}

    rows = load_dataset("json", data_files=str(folder / "documents.jsonl"), split="train")
    done = rows.map(encode, batched=True, num_proc=CORES, remove_columns=["text"])
    return int(sum(done["length"]))


WAYS = {"drumline": ours, "datasets.map": datasets_map}


def resident_of_tree(pid: int) -> int:
    """Resident bytes of a process and all below it."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def start(way: str, folder: Path) -> dict[str, float]:
    """One way in a process and caches of its own."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "DRUMLINE_CACHE": f"{cache}/ours", "HF_HOME": f"{cache}/hf", "HF_HUB_OFFLINE": "1",
               "PYTHONPATH": f"{ROOT}/toolkit:{ROOT}/launchers"}  # fmt: skip
        command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        most = [0]

        def watch() -> None:
            while process.poll() is None:
                most[0] = max(most[0], resident_of_tree(process.pid))
                time.sleep(0.05)

        thread = threading.Thread(target=watch)
        thread.start()
        output = process.communicate()[0]
        thread.join()
        assert process.returncode == 0
        return {**json.loads(output.splitlines()[-1]), "memory": most[0] / 1e6}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        import datasets  # noqa: F401
        import transformers  # noqa: F401

        import drumline.data.prepare  # noqa: F401

        started = time.perf_counter()
        tokens = WAYS[options.way](options.folder)
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - started}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", options.megabytes)
        make_tokenizer(folder / "tokenizer", folder / "documents.jsonl")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(start(way, folder))
    print(f"{options.megabytes} MB of text, {CORES} cores, {options.rounds} rounds in turns")
    speed = {way: [one["tokens"] / one["seconds"] for one in runs] for way, runs in found.items()}
    for way, runs in found.items():
        ratios = [a / b for a, b in zip(speed[way], speed["datasets.map"], strict=True)]
        print(f"{way:<14} {runs[0]['tokens']:>12,.0f} tokens {statistics.median(speed[way]):>12,.0f} a second  ratio "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
              f"{max(one['memory'] for one in runs):,.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
