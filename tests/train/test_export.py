"""From an exported folder transformers writes the same text as the trained model does, for bytes and for BPE."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from whole_tensors import whole_tensors

from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.data.tokenizers import find_tokenizer
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.row_lengths import manifest_of_run
from drumline.train.export import export
from drumline.train.loop import train
from drumline.train.models import ModelBuilder

TEXT = "the cat sat on the mat and the dog ran to the cat\n" * 60


def bpe(folder: Path) -> str:
    """Byte-level, 300 tokens; the end token is the first."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_export_writes_what_the_model_says(tmp_path: Path, kind: str) -> None:
    """Trained for twelve steps, exported, loaded by transformers alone: the same greedy tokens, and they decode."""
    (tmp_path / "t.txt").write_text(TEXT)
    tokenizer = "bytes" if kind == "bytes" else bpe(tmp_path / "tokenizer")
    recipe = validate(tiny_recipe(
        model={"source": "config", "factory": None, "architecture": "llama", "config": {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4}},
        data={"source": "files", "name": None, "path": str(tmp_path / "t.txt"), "task": "causal_lm",
              "tokenizer": tokenizer, "sequence_length": 32, "samples": None, "validation": 0.0},
        batch={"effective": 8, "per_device": 8, "gpus": 1, "weighting": "token"},
        optimizer={"name": "adamw", "lr": 1e-2}, duration={"steps": 12}), "r")  # fmt: skip
    prepare(recipe.data, recipe.project)
    plan = make_plan(recipe)
    (tmp_path / "checkpoints").mkdir()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(plan, tmp_path, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    checkpoint = tmp_path / "checkpoints/step-00000012"
    manifest = manifest_of_run(plan)
    assert manifest
    export(plan, manifest, checkpoint, tmp_path / "model")

    ours: Any = ModelBuilder(plan.recipe, manifest).whole().eval()
    weights = whole_tensors(checkpoint, "model.")
    ours.load_state_dict(
        {n.removeprefix("model."): w for n, w in weights.items()},
        strict=False,
    )
    own = find_tokenizer(tokenizer)
    ids = torch.from_numpy(own.encode("the cat").astype("int64"))[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs("the cat").input_ids == ids[0].tolist()
    assert exported.config.eos_token_id == theirs.eos_token_id == own.end
    written = exported.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=own.end)
    while ids.shape[1] < written.shape[1]:
        with torch.no_grad():
            ids = torch.cat([ids, ours(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids.tolist()
    assert len(set(written[0].tolist())) > 3
    assert theirs.decode(written[0]).startswith("the cat")
