"""An exported adapter is loaded by peft with the trained model's logits, and merged it is a whole model with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from whole_tensors import whole_tensors

from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.row_lengths import manifest_of_run
from drumline.train.export import export
from drumline.train.loop import train
from drumline.train.models import ModelBuilder
from pretrained_folders import saved

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 257, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 257, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
DEEPSEEK = {**LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "n_group": 2,
            "topk_group": 1}  # fmt: skip
LM, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lora": ("llama", LLAMA, LM, {"rank": 4, "alpha": 8.0}),
    "dora": ("llama", LLAMA, LM, {"rank": 4, "dora": True, "targets": ["q_proj", "up_proj"]}),
    "rslora and norms": ("llama", LLAMA, LM, {"rank": 8, "rslora": True, "train_also": ["*norm*"]}),
    "conv1d": ("gpt2", GPT2, LM, {"rank": 4, "targets": ["c_attn", "mlp.c_proj"]}),
    "experts": (
        "mixtral",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        LM,
        {"rank": 4},
    ),
    "latent": ("deepseek_v3", DEEPSEEK, LM, {"rank": 4}),
    "classifier": ("bert", BERT, CLASSIFIER, {"rank": 4, "targets": ["query", "value"]}),
    "new head": ("bert", BERT, "AutoModelForMaskedLM", {"rank": 4}),
}


def trained(folder: Path, kind: str, **model: Any) -> Plan:
    """Eight steps from a pretrained folder."""
    architecture, config, auto, adapter = KINDS[kind]
    rows = [f'{{"text": "{"abc"[n % 3] * (1 + n % 9)}", "label": {n % 2}}}' for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    saved(folder / "base", auto, architecture, config)
    task = "causal_lm" if auto == LM else "classification"
    plain = tiny_recipe(
        model={"source": "folder", "factory": None, "path": str(folder / "base"), "adapter": adapter, **model},
        data={"source": "files", "name": None, "path": str(folder / "rows.jsonl"), "task": task,
              "sequence_length": 32, "samples": None, "validation": 0.0},
        batch={"effective": 4, "per_device": 4, "gpus": 1}, optimizer={"name": "adamw", "lr": 1e-2},
        duration={"steps": 8})  # fmt: skip
    plain["model"]["config"] = {}
    recipe = validate(plain, "r")
    prepare(recipe.data, recipe.project)
    plan = make_plan(recipe)
    (folder / "checkpoints").mkdir()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(plan, folder, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    return plan


def test_a_quantised_base_is_merged_as_it_was_trained_on(tmp_path: Path) -> None:
    """The merged folder has the logits of the model with its quantised base, and the names of the base."""
    KINDS["nf4"] = ("llama", {**LLAMA, "hidden_size": 64}, LM, {"rank": 4})
    plan = trained(tmp_path, "nf4", quantization="nf4")
    manifest = manifest_of_run(plan)
    assert manifest
    checkpoint = tmp_path / "checkpoints/step-00000008"
    export(plan, manifest, checkpoint, tmp_path / "merged", merge=True)
    ours: Any = ModelBuilder(plan.recipe, manifest).whole().eval()
    weights = whole_tensors(checkpoint, "model.")
    ours.load_state_dict({n.removeprefix("model."): w for n, w in weights.items()}, strict=False)
    ids = torch.tensor([[3, 50, 8, 99, 7, 201]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        wanted = ours(ids).logits
        assert (merged(ids).logits - wanted).abs().max() < 1e-5
        assert (base(ids).logits - wanted).abs().max() > 1e-3
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_peft_loads_an_export(tmp_path: Path, kind: str) -> None:
    """The same logits from our model, from base and adapter under peft, and from the merged folder."""
    plan = trained(tmp_path, kind)
    manifest = manifest_of_run(plan)
    assert manifest
    checkpoint = tmp_path / "checkpoints/step-00000008"
    export(plan, manifest, checkpoint, tmp_path / "adapter")
    export(plan, manifest, checkpoint, tmp_path / "merged", merge=True)

    ours: Any = ModelBuilder(plan.recipe, manifest).whole().eval()
    weights = whole_tensors(checkpoint, "model.")
    lacking = ours.load_state_dict({n.removeprefix("model."): w for n, w in weights.items()}, strict=False)  # fmt: skip
    assert not lacking.unexpected_keys
    auto: Any = AutoModelForCausalLM if KINDS[kind][2] == LM else AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base").eval()
    ids = torch.tensor([[3, 50, 8, 99, 7, 201]])
    with torch.no_grad():
        before = base(ids).logits.clone()
        wanted = ours(ids).logits
        under_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        merged = auto.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (wanted - before).abs().max() > 1e-3
    assert torch.equal(under_peft, wanted)
    assert (merged - wanted).abs().max() < 1e-5
    sizes = [sum(t.numel() for t in load_file(tmp_path / name).values()) for name in (
        "adapter/adapter_model.safetensors", "merged/model.safetensors")]  # fmt: skip
    assert sizes[0] < sizes[1] / 2
    if kind == "lora":
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        written = loaded.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            while ids.shape[1] < written.shape[1]:
                ids = torch.cat([ids, ours(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert written.tolist() == ids.tolist()
