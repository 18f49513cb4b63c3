"""From nothing to a chat model, offline: pretrain, fine-tune on chats in full and with LoRA, export, generate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from advice import heard
from data.chat_templates import CHATML
from train.test_export import bpe

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

BASE = """
recipe: base
schema: 1
model:
  source: config
  architecture: llama
  config: {vocab_size: 320, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
data: {source: builtin, name: python-stdlib, options: {max_files: 6}, task: causal_lm, tokenizer: ./bpe, sequence_length: 64}
batch: {per_device: 16, gpus: 1, accumulation: 1}
optimizer: {name: adamw, lr: 3.0e-3}
duration: {steps: 60}
"""
CHAT = """
recipe: chat
schema: 1
model: {source: folder, path: base}
data: {source: builtin, name: synthetic-chats, task: sft, tokenizer: ./bpe, chat_template: ./chatml.jinja,
       sequence_length: 160, validation: 0.05}
batch: {effective: 16, per_device: 4, gpus: 2, accumulation: 2}
optimizer: {name: adamw, lr: 5.0e-3}
duration: {steps: 60}
evaluation: {every_steps: 15}
"""
LORA = ["model.adapter={rank: 8, alpha: 16.0}", "optimizer.lr=5e-3"]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def test_from_nothing_to_a_chat_model(tmp_path: Path, forked: Any) -> None:
    """Evaluation improves in both; exports generate the same tokens; merged is within 1e-5 of the adapter."""
    bpe(tmp_path / "bpe")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "chat.yaml").write_text(CHAT)
    for words in (
        ("run", "base.yaml", "--run-dir", "pretrained"),
        ("export", "pretrained", "base"),
        ("run", "chat.yaml", "--run-dir", "full"),
        ("run", "chat.yaml", *LORA, "--run-dir", "lora"),
        ("export", "full", "full-model"),
        ("export", "lora", "adapter"),
        ("export", "lora", "merged", "--merge"),
    ):
        done = forked(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    for run in ("full", "lora"):
        found = losses(tmp_path / run)
        assert len(found) >= 2
        assert found[-1] < 0.9 * found[0]
    assert losses(tmp_path / "full")[-1] != losses(tmp_path / "lora")[-1]

    told = heard("trained no adapter. Nearest: without --merge", forked("export", "full", "x", "--merge").stderr)  # fmt: skip
    assert "--merge" in told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    asked = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked, return_tensors="pt").input_ids
    adapter: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    full: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "full-model").eval()
    with torch.no_grad():
        apart = (adapter(input_ids=ids).logits - merged(ids).logits).abs().max()
    assert apart < 1e-5
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(input_ids=ids, **options)[0].tolist() for model in (adapter, merged)]
    assert written[0] == written[1]
    answer = tokenizer.decode(full.generate(input_ids=ids, **options)[0, ids.shape[1] :])
    assert answer.startswith("It is")

    done = forked("run", "base.yaml", "model.adapter={rank: 2}", "duration.steps=1", "--run-dir", "random")  # fmt: skip
    assert done.returncode == 0, done.stderr
    heard("so nobody could load it. Nearest: --merge", forked("export", "random", "y").stderr)
    assert forked("export", "random", "y", "--merge").returncode == 0
    done = forked("verify", "chat.yaml", *LORA)
    assert done.returncode == 0, done.stderr
    done = forked("reproduce", "lora", "--gpus", "1", "--steps", "6", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "equal"
