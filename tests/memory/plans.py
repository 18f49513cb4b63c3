"""Small plans of every family, made from a few words, for the tests of memory."""

import random
from typing import Any

from drumline.architectures.config_fields import config_fields
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe.load import merge, validate

LLAMA = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
GPT2 = {
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "vocab_size": 2000,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024,
        "vocab_size": 2000}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 32}
NEOX = {
    **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DEEPSEEK = {**LLAMA, "num_key_value_heads": 8, "moe_intermediate_size": 128, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 64,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 32},
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen3_moe": {**LLAMA, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
                  "head_dim": 32},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 96, "n_group": 2, "topk_group": 1},
    "granite": LLAMA,
    "smollm3": {**LLAMA, "pad_token_id": 0},
    "olmo2": {**LLAMA, "eos_token_id": 0},
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "cohere": {**LLAMA, "bos_token_id": 0, "eos_token_id": 0},
    "phi": LLAMA,
    "phi3": {**LLAMA, "pad_token_id": 0, "eos_token_id": 0},
    "gpt_neox": NEOX,
    "starcoder2": {**LLAMA, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {**{k: v for k, v in NEOX.items() if k != "intermediate_size"}, "ffn_dim": 704, "dropout": 0.0,
            "word_embed_proj_dim": 256},
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": {**BERT, "type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "distilbert": {"dim": 256, "n_layers": 4, "n_heads": 8, "hidden_dim": 1024, "vocab_size": 2000},
    "modernbert": {**BERT, "intermediate_size": 384, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "cls_token_id": 1, "sep_token_id": 2},
    "deberta-v2": {**BERT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 32,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
                   "type_vocab_size": 0},
    "t5": {"d_model": 256, "d_kv": 32, "d_ff": 704, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 8,
           "vocab_size": 2000, "pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0},
    "dinov2": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "image_size": 64,
               "patch_size": 8},
    "siglip": {"vision_config": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
                                 "intermediate_size": 1024, "image_size": 64, "patch_size": 8}},
    "vit": {**{k: v for k, v in BERT.items() if k != "vocab_size"}, "image_size": 64, "patch_size": 8},
}  # fmt: skip
FULL = {"model": {"activation_checkpointing": "full"}}
IMAGES = ("vit", "dinov2", "siglip")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "deberta-v2", "t5", *IMAGES)
LOOKS_AT_VALUES = ("t5",)
"""Families that are traced on real tensors only: their classifiers look for the end of each row, which 0 is here."""
LATENT = ("deepseek_v2", "deepseek_v3")
SCALES_LOGITS = ("granite", "gemma2", "cohere")
"""Families whose loss cannot be chunked."""


def small_plan(
    architecture: str,
    config: dict[str, Any] | None = None,
    b: int = 2,
    length: int = 128,
    gpus: int = 1,
    k: int = 1,
    **sections: Any,
) -> Plan:
    """A plan of that architecture; sections replace the recipe's own key by key."""
    plain: dict[str, Any] = {
        "recipe": "memory",
        "schema": 1,
        "model": {"source": "config", "architecture": architecture,
                  "config": config or SMALL[architecture]},
        "data": {"source": "files", "path": "/x.txt", "task": "causal_lm", "sequence_length": length,
                 "samples": 100000},
        "batch": {"per_device": b, "gpus": gpus, "accumulation": k},
        "cluster": {"gpu": "h100-80gb"},
        "precision": "bf16",
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "duration": {"steps": 10},
    }  # fmt: skip
    if architecture in ENCODERS:
        plain["data"]["task"] = "classification"
    if architecture in IMAGES:
        plain["data"]["sequence_length"] = None
    if architecture == "gemma2":
        sections = merge({"model": {"attention": "eager"}}, sections)
    return resolve(validate(merge(plain, sections), "memory"))


LAYOUTS = [(1, "ddp", "all"), (1, "ddp", "all"), (2, "ddp", "all"), (1, "fsdp", "all"), (3, "fsdp", "all"),
           (8, "fsdp", "all"), (64, "fsdp", "all"), (16, "fsdp", "node")]  # fmt: skip
OPTIMIZERS = [{"name": "adamw", "implementation": "fused"}, {"name": "adamw", "implementation": "foreach"},
              {"name": "adam", "implementation": "foreach"},
              {"name": "sgd", "momentum": 0.9, "implementation": "foreach"}]  # fmt: skip


def sized(
    architecture: str, heads: int, width: int, layers: int, ffn: int, vocabulary: int
) -> dict[str, Any]:
    """A config of this family with heads of `width` features, by its own names of the keys."""
    h, small = heads * width, SMALL[architecture]
    if architecture == "gpt2":
        return {**small, "n_embd": h, "n_head": heads, "n_inner": ffn, "n_layer": layers,
                "vocab_size": vocabulary}  # fmt: skip
    if architecture == "distilbert":
        return {
            "dim": h,
            "n_heads": heads,
            "hidden_dim": ffn,
            "n_layers": layers,
            "vocab_size": vocabulary,
        }
    if architecture == "t5":
        return {**small, "d_model": h, "d_kv": width, "d_ff": ffn, "num_heads": heads,
                "num_layers": layers, "num_decoder_layers": layers, "vocab_size": vocabulary}  # fmt: skip
    sizes = {"hidden_size": h, "num_attention_heads": heads, "num_hidden_layers": layers}
    if architecture == "siglip":
        return {"vision_config": {**small["vision_config"], **sizes, "intermediate_size": ffn}}
    config = {**small, **sizes}
    if architecture == "dinov2":
        return {**config, "mlp_ratio": max(1, round(ffn / h))}
    if architecture == "opt":
        config |= {"ffn_dim": ffn, "word_embed_proj_dim": h}
    else:
        config |= {"intermediate_size": ffn}
    if architecture not in IMAGES:
        config |= {"vocab_size": vocabulary}
    if architecture in LATENT:
        config |= {"num_key_value_heads": heads}
    elif "head_dim" in (config_fields(architecture) or {}):
        config |= {"head_dim": width}
    return config


def random_plan(draw: random.Random) -> tuple[str, Plan]:
    """Any family, shape, precision, strategy and loss; what it is, in words."""
    architecture = draw.choice([name for name in SMALL if name not in LOOKS_AT_VALUES])
    precision = draw.choice(["bf16", "bf16", "bf16-pure", "fp32", "fp16"])
    heads = draw.choice([4, 8, 16])
    width = draw.choice([32, 48, 64])
    ffn = draw.randrange(256, 3072, 32)
    layers = draw.randrange(1, 8)
    vocabulary = draw.randrange(500, 20000, 4)
    config = sized(architecture, heads, width, layers, ffn, vocabulary)
    if architecture == "gpt2" and draw.random() < 0.5:
        config |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if architecture not in ("gpt2", *ENCODERS):
        config |= {"tie_word_embeddings": draw.random() < 0.5}
    if "num_key_value_heads" in config and architecture not in LATENT:
        config |= {"num_key_value_heads": draw.choice([1, 2, 4])}
    gpus, strategy, shard = draw.choice(LAYOUTS)
    if strategy == "ddp" and gpus > 1:  # DDP refuses weights that the loss does not use
        config |= {"dinov2": {"use_mask_token": False}}.get(architecture, {})
        config.get("vision_config", {})["vision_use_head"] = False
    chunked = architecture not in (*ENCODERS, *SCALES_LOGITS) and draw.random() < 0.3
    optimizer = draw.choice(OPTIMIZERS)
    extra: dict[str, Any] = {}
    if draw.random() < 0.3:
        extra = {"evaluation": {"every_steps": 2, "per_device": draw.choice([1, 3, 16])},
                 "data": {"validation": 0.1}}  # fmt: skip
    b, length = draw.choice([1, 2, 3, 8]), draw.choice([64, 97, 256, 384])
    k = draw.choice([1, 1, 2])
    model = {
        "activation_checkpointing": draw.choice(["none", "none", "full", "selective"]),
        "attention": draw.choice(["sdpa", "sdpa", "sdpa", "eager"]),
    }
    if architecture == "gemma2":
        model["attention"] = "eager"
    plan = small_plan(architecture, config, b, length, gpus, k, model=model, precision=precision,
                      strategy={"name": strategy, "shard": shard}, loss={"chunked": chunked},
                      optimizer=optimizer, **extra)  # fmt: skip
    words = f"{architecture} {precision} {strategy}/{shard}×{gpus} b={b} L={length} k={k} {model} {optimizer} {extra}"
    return f"{words}{' chunked' if chunked else ''}", plan


def large_plan(draw: random.Random) -> tuple[str, Plan]:
    """A plan of a size that people train, with few layers, for `benchmarks/memory_ranges.py`."""
    architecture = draw.choice(["llama", "llama", "qwen3", "mixtral", "gpt2"])
    heads = draw.choice([16, 24, 32])
    h, layers, vocabulary = heads * 128, draw.randrange(4, 9), draw.choice([32000, 50304, 128256])
    config: dict[str, Any]
    if architecture == "gpt2":
        config = {**GPT2, "n_embd": h, "n_head": heads, "n_layer": layers, "vocab_size": vocabulary,
                  "n_positions": 4096, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
    else:
        config = {**SMALL[architecture], "hidden_size": h, "num_attention_heads": heads,
                  "num_key_value_heads": 8, "intermediate_size": draw.randrange(2 * h, 4 * h, 256),
                  "num_hidden_layers": layers, "vocab_size": vocabulary, "head_dim": 128}  # fmt: skip
    gpus, strategy = draw.choice([(1, "ddp"), (8, "ddp"), (8, "fsdp"), (64, "fsdp")])
    b, length, k = draw.choice([1, 2, 4]), draw.choice([1024, 2048, 4096]), draw.choice([1, 4])
    checkpointing = draw.choice(["none", "full"])
    precision = draw.choice(["bf16", "bf16", "bf16-pure"])
    chunked = draw.random() < 0.4
    plan = small_plan(architecture, config, b, length, gpus, k, precision=precision,
                      strategy={"name": strategy}, loss={"chunked": chunked},
                      model={"activation_checkpointing": checkpointing})  # fmt: skip
    words = f"{architecture} h={h} layers={layers} V={vocabulary} {precision} {strategy}×{gpus} b={b} L={length} k={k}"
    return f"{words} checkpointing={checkpointing}{' chunked' if chunked else ''}", plan
