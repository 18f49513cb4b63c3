"""`drumline import`: files of other tools become recipes; what does not is listed with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from advice import command, heard
from drumline.errors import RecipeError
from drumline.recipe.load import load_recipe
from drumline.session.importing.draft import MEANINGLESS, UNKNOWN, UNSUPPORTED
from drumline.session.importing.importer import Imported, import_files
from drumline.session.planning import make_plan

AXOLOTL = """
base_model: meta-llama/Llama-3.1-8B
datasets:
  - {path: talks.jsonl, type: chat_template, field_messages: turns}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
deepspeed: configs/zero2.json
output_dir: out
shiny_new_key: 3
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: dpo
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: sigmoid
dataset: mine
template: qwen
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
plot_loss: true
"""
TRL = """
model_name_or_path: mistralai/Mistral-7B-v0.1
dataset_name: HuggingFaceH4/ultrachat_200k
dataset_splits: [train_sft, test_sft]
do_eval: true
eval_strategy: epoch
bf16: true
max_length: 2048
packing: true
use_peft: true
lora_r: 16
lora_alpha: 16
lora_target_modules: [q_proj, k_proj]
learning_rate: 2e-4
num_train_epochs: 1
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
gradient_checkpointing: true
lr_scheduler_type: cosine
warmup_ratio: 0.1
optim: adamw_torch_fused
seed: 42
trust_remote_code: true
"""
TORCHTUNE = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model, max_seq_len: 2048}
model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_attn_modules: [q_proj, v_proj, output_proj], apply_lora_to_mlp: true, lora_rank: 64, lora_alpha: 128, lora_dropout: 0.0}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/}
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: false, train_on_input: true}
batch_size: 4
optimizer: {_component_: torch.optim.AdamW, fused: true, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
epochs: 1
gradient_accumulation_steps: 8
clip_grad_norm: null
dtype: bf16
enable_activation_checkpointing: true
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: false}
"""
SCRIPT = """#!/bin/bash
MODEL=meta-llama/Llama-2-7b-hf
export NCCL_DEBUG=INFO
torchrun --nproc_per_node=8 --nnodes 2 --master_port=20001 train.py \\
    --model_name_or_path $MODEL --data_path talks.json \\
    --bf16 True --num_train_epochs 3 \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps ${ACC:-16} \\
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 1200 --save_total_limit 10 \\
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" \\
    --logging_steps 1 --model_max_length 2048 --gradient_checkpointing True --deepspeed ds.json
rm -rf ./everything
"""
DEEPSPEED = {
    "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
}  # fmt: skip
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}
mixed_precision: bf16
num_machines: 2
num_processes: 16
"""
FILES = {"ax.yml": AXOLOTL, "lf.yaml": LLAMA_FACTORY, "trl.yaml": TRL, "tt.yaml": TORCHTUNE, "train.sh": SCRIPT,
         "ds.json": json.dumps(DEEPSPEED), "acc.yaml": ACCELERATE}  # fmt: skip
WANTED: dict[tuple[str, ...], dict[str, Any]] = {
    ("ax.yml",): {
        "model.name": "meta-llama/Llama-3.1-8B", "model.quantization": "nf4", "model.adapter.rank": 32, "model.adapter.alpha": 16.0,
        "model.adapter.targets": "all-linear", "model.activation_checkpointing": "full", "model.attention": "sdpa",
        "data.messages_field": "turns", "data.path": "talks.jsonl", "data.packing": "documents", "data.validation": 0.05,
        "data.sequence_length": 4096, "batch.per_device": 2, "batch.accumulation": 4, "optimizer.name": "adamw_8bit", "optimizer.lr": 2e-4,
        "schedule.name": "cosine", "schedule.warmup_steps": 10, "duration.epochs": 4.0, "evaluation.every_epochs": 0.25,
        "checkpoint.every_epochs": 1.0, "strategy.name": "fsdp", "precision": "bf16",
    },
    ("lf.yaml",): {
        "objective.name": "dpo", "objective.beta": 0.2, "data.task": "preference", "model.adapter.targets": ["q_proj", "v_proj"],
        "model.adapter.alpha": 16.0, "data.samples": 1000, "data.path": "data/pairs.json", "evaluation.every_steps": 500, "optimizer.lr": 5e-6,
        "model.activation_checkpointing": "full",
    },
    ("trl.yaml", "acc.yaml"): {
        "batch.gpus": 16, "cluster.gpus_per_node": 8, "strategy.name": "fsdp", "strategy.shard": "node", "data.split": "train_sft",
        "data.packing": "documents", "data.train_on": "all", "optimizer.implementation": "fused", "seed": 42, "model.adapter.rank": 16,
        "evaluation.every_epochs": 1.0, "precision": "bf16",
    },
    ("tt.yaml",): {
        "model.name": "meta-llama/Llama-3.2-1B-Instruct", "model.adapter.targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "precision": "bf16-pure", "loss.chunked": True, "optimizer.weight_decay": 0.01, "optimizer.max_grad_norm": None, "data.train_on": "all",
        "data.sequence_length": 2048, "schedule.warmup_steps": 100, "batch.per_device": 4, "model.activation_checkpointing": "full",
    },
    ("train.sh", "ds.json"): {
        "batch.gpus": 16, "cluster.gpus_per_node": 8, "batch.accumulation": 16, "strategy.name": "zero3", "strategy.offload": "optimizer",
        "launch.launcher": "deepspeed", "data.sequence_length": 2048, "schedule.warmup_ratio": 0.03, "checkpoint.keep_last": 10,
        "precision": "bf16", "optimizer.lr": 2e-5,
    },
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    info = {"mine": {"file_name": "pairs.json", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def imported(files: Path, *names: str, **options: Any) -> Imported:
    return import_files([files / name for name in names], **options)


@pytest.mark.parametrize("names", WANTED, ids=" ".join)
def test_a_recipe_says_what_the_files_say(files: Path, names: tuple[str, ...]) -> None:
    """Its keys, and that it is legal and can be planned as it stands."""
    found = imported(files, *names, gpu="a100-80gb")
    assert not found.problem
    for key, value in WANTED[names].items():
        assert found.draft.keys.get(key) == value, key
    path = files / "recipe.yaml"
    path.write_text(found.text)
    plan = make_plan(load_recipe(str(path), ["data.samples=10000"]))
    assert plan.batch.effective == plan.batch.per_device * plan.batch.gpus * plan.batch.accumulation
    assert plan.memory.method == "closed-form"


def test_what_is_not_carried_over_is_listed_with_the_reason(files: Path) -> None:
    left = {one.key: one for one in imported(files, "ax.yml").draft.left}
    assert {key: one.kind for key, one in left.items()} == {
        "special_tokens": UNSUPPORTED, "pad_to_sequence_len": MEANINGLESS, "output_dir": MEANINGLESS, "shiny_new_key": UNKNOWN,
    }  # fmt: skip
    assert "tokenizer" in left["special_tokens"].why
    left = {one.key: one for one in imported(files, "trl.yaml").draft.left}
    assert left["trust_remote_code"].kind == UNSUPPORTED


def test_where_results_will_differ_is_said(files: Path) -> None:
    told = imported(files, "ax.yml").text
    assert "fp32 ones beside them" in told.replace("# Differs: ", "")
    assert "take rate 0 at the first step of a warm-up" in told
    assert "weighs the same here" in told
    assert "rounded up" in imported(files, "train.sh", "ds.json").text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: gpt2\ndatasets: [{path: a/b, type: alpaca}]\nmicro_batch_size: 1\n", "type alpaca: axolotl frames"),
        ("model_name_or_path: gpt2\nstage: sft\ntemplate: default\ndataset: a\nfinetuning_type: full\n",
         "template default: the tokenizer's own chat template is used"),
        ("model: {_component_: torchtune.models.llama3_2.llama3_2_1b}\ndataset: {_component_: torchtune.datasets.alpaca_dataset}\n"
         "batch_size: 1\n", "alpaca_dataset: torchtune frames rows"),
    ],
    ids=["axolotl", "llama-factory", "torchtune"],
)  # fmt: skip
def test_another_frame_around_an_instruction_is_said(files: Path, text: str, words: str) -> None:
    """What stands around an instruction changes the training, and no recipe can state another tool's words."""
    (files / "framed.yaml").write_text(text)
    assert words in imported(files, "framed.yaml").text


def test_nothing_of_a_script_is_executed(files: Path) -> None:
    """Its variables are filled in by what it assigns; commands are words."""
    (files / "evil.sh").write_text("X=$(touch made)\n`touch made`\ntorchrun --nproc_per_node=$N t.py --learning_rate 1e-3 --output_dir $(touch made)\n")  # fmt: skip
    found = imported(files, "evil.sh")
    assert not (files / "made").exists()
    assert not Path("made").exists()
    assert found.draft.keys["optimizer.lr"] == 1e-3
    assert "no file says on how many GPUs" in found.text


def test_the_file_that_a_script_names_is_read(files: Path) -> None:
    assert imported(files, "train.sh").draft.keys["strategy.name"] == "zero3"


def test_what_is_of_no_tool(files: Path) -> None:
    (files / "odd.yaml").write_text("a: 1\n")
    with pytest.raises(RecipeError) as error:
        imported(files, "odd.yaml")
    heard("of no tool that is known", str(error.value))
    (files / "odd.sh").write_text("echo hello\n")
    with pytest.raises(RecipeError) as error:
        imported(files, "odd.sh")
    heard("no command that starts a training was found", str(error.value))


def test_files_of_the_same_name_lie_in_their_own_folders(files: Path) -> None:
    """What a script names is looked for beside it."""
    other = files / "other"
    other.mkdir()
    (other / "train.sh").write_text(SCRIPT.replace("2e-5", "3e-5"))
    (other / "ds.json").write_text(json.dumps({**DEEPSPEED, "zero_optimization": {"stage": 1}}))
    found = import_files([other / "train.sh"])
    assert found.draft.keys["strategy.name"] == "zero1"


def test_variables_that_nobody_sets_and_what_is_lost_are_told(files: Path) -> None:
    """One message, not a traceback; nothing is dropped without a word."""
    (files / "open.sh").write_text(
        "torchrun --nproc_per_node 2 t.py --max_steps $STEPS --learning_rate 1e-3\n"
    )
    with pytest.raises(RecipeError, match="a variable that the script does not set"):
        imported(files, "open.sh")
    (files / "lost.sh").write_text("torchrun --nproc_per_node 2 t.py --load_in_4bit True --per_device_eval_batch_size 3 --learning_rate 1e-3\n")  # fmt: skip
    left = {one.key: one.why for one in imported(files, "lost.sh").draft.left}
    assert "under an adapter only" in left["quantization"]
    assert "which data to evaluate" in left["evaluation.per_device"]


def script(files: Path, words: str, ds: dict[str, Any] | None = None) -> Imported:
    """A launch of a script of transformers on two GPUs, with a file of DeepSpeed's where one is given."""
    (files / "one.sh").write_text(f"torchrun --nproc_per_node 2 {words}\n")
    (files / "one.json").write_text(json.dumps(ds or {}))
    return imported(files, "one.sh", *(["one.json"] if ds else []))


def test_words_that_mean_something_else_than_they_say(files: Path) -> None:
    """A constant rate has no warm-up in transformers, and DeepSpeed's Adam is AdamW unless it says so."""
    plain = script(
        files, "t.py --lr_scheduler_type constant --warmup_steps 10 --learning_rate 1e-3"
    )
    assert "schedule.warmup_steps" not in plain.draft.keys
    assert any(one.key == "warmup_steps" for one in plain.draft.left)
    warm = script(
        files,
        "t.py --lr_scheduler_type constant_with_warmup --warmup_steps 10 --learning_rate 1e-3",
    )
    assert warm.draft.keys["schedule.warmup_steps"] == 10
    for more, name in (
        ({}, "adamw"),
        ({"adam_w_mode": False}, "adam"),
        ({"torch_adam": True}, "adam"),
    ):
        adam = {"type": "Adam", "params": {"lr": 1e-3, **more}}
        found = script(
            files, "t.py --output_dir o", {"zero_optimization": {"stage": 1}, "optimizer": adam}
        )
        assert found.draft.keys["optimizer.name"] == name
        assert found.draft.keys["optimizer.lr"] == 1e-3


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_deepspeeds_warm_ups_grow_with_the_logarithm(files: Path, name: str) -> None:
    """By default, and under each of its schedules; a line where its file says so."""
    for kind, is_told in ((None, True), ("log", True), ("linear", False)):
        parameters = {"warmup_num_steps": 5, **({"warmup_type": kind} if kind else {})}
        ds = {"zero_optimization": {"stage": 1}, "scheduler": {"type": name, "params": parameters}}
        found = script(files, "t.py --learning_rate 1e-3", ds)
        assert found.draft.keys["schedule.warmup_steps"] == 5
        assert any("logarithm" in one for one in found.draft.differences) == is_told


def test_options_of_schedules(files: Path) -> None:
    words = """t.py --learning_rate 1e-3 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr": 1e-5}'"""
    assert script(files, words).draft.keys["schedule.min_lr"] == 1e-5
    other = script(
        files, words.replace("min_lr", "timescale").replace("cosine_with_timescale", "inverse_sqrt")
    )
    assert any("timescale" in one.why for one in other.draft.left)


def test_scripts_of_transformers_say_what_the_rows_are(files: Path) -> None:
    """And those whose training no recipe states are refused."""
    keys = script(
        files, "run_glue.py --task_name mnli --model_name_or_path bert-base-cased --do_eval"
    ).draft.keys
    assert (keys["data.text_field"], keys["data.text_pair_field"]) == ("premise", "hypothesis")
    assert keys["data.evaluation"]["split"] == "validation_matched"
    keys = script(
        files, "run_translation.py --source_lang en --target_lang ro_RO --dataset_name wmt16"
    ).draft.keys
    assert (keys["data.prompt_field"], keys["data.completion_field"]) == (
        "translation.en",
        "translation.ro",
    )
    keys = script(
        files, "run_mlm_no_trainer.py --train_file a.txt --mlm_probability 0.3 --line_by_line"
    ).draft.keys
    assert (keys["data.mask_probability"], keys["data.packing"]) == (0.3, "none")
    with pytest.raises(RecipeError) as error:
        script(files, "run_speech_recognition_ctc.py --dataset_name a --model_name_or_path b")
    heard("there is no CTC loss, so this training is not imported", str(error.value))


def test_what_llama_factory_freezes_by_default(files: Path) -> None:
    """The eye and the projector of a model that reads images, unless its file says otherwise."""
    text = LLAMA_FACTORY.replace("stage: dpo", "stage: sft").replace(
        "finetuning_type: lora", "finetuning_type: full"
    )
    text = (
        text.replace("template: qwen", "template: qwen2_vl")
        .replace("pref_", "x_")
        .replace("lora_", "l_")
    )
    for more, frozen in (
        ("", ["model.visual.patch_embed.*", "model.visual.blocks.*", "model.visual.merger.*"]),
        (
            "freeze_multi_modal_projector: false",
            ["model.visual.patch_embed.*", "model.visual.blocks.*"],
        ),
        ("freeze_vision_tower: false\nfreeze_multi_modal_projector: false", None),
    ):
        (files / "vl.yaml").write_text(text + more)
        assert imported(files, "vl.yaml").draft.keys.get("model.frozen") == frozen


def test_a_card_that_is_not_known_writes_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    done = command("import", "axolotl.yaml", "--gpu", "a100")
    assert done.code == 2
    assert "Did you mean 'a100-40gb' or 'a100-80gb'" in done.err
    assert sorted(files.rglob("*")) == before


def test_the_command(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the recipe, tells what is not in it, plans it, and overwrites nothing."""
    monkeypatch.chdir(files)
    done = command("import", "train.sh", "ds.json", "--gpu", "a100-80gb", "--to", "mine.yaml")
    assert done.code == 0
    assert "not carried over: no meaning here" in done.out
    assert "256 = 2 per_device × 8 gpus × 16" not in done.out
    assert "512 = 2 per_device × 16 gpus × 16 accumulation" in done.out
    assert load_recipe("mine.yaml").strategy.name == "zero3"
    again = command("import", "train.sh", "--to", "mine.yaml")
    assert again.code == 2
    heard("exists and would be overwritten. Nearest: --to another.yaml", again.err)


@pytest.mark.parametrize(
    ("words", "config", "shard", "reshard"),
    [
        (["full_shard", "auto_wrap"], {}, None, None),
        (["shard_grad_op", "auto_wrap"], {}, None, "backward"),
        (["hybrid_shard"], {}, "node", None),
        (["hybrid_shard_zero2"], {}, "node", "backward"),
        ([], {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, None, "backward"),
        ([], {"sharding_strategy": 5}, "node", "backward"),
        ([], {"fsdp_reshard_after_forward": False}, None, "backward"),
        ([], {"reshard_after_forward": "true"}, None, None),
        ([], {"fsdp_reshard_after_forward": "HYBRID_SHARD"}, "node", None),
    ],
)
def test_when_fsdp_frees_gathered_weights(
    files: Path, words: list[str], config: dict[str, Any], shard: str | None, reshard: str | None
) -> None:
    """As accelerate's file, axolotl's keys and the Trainer's arguments say it; none of it is left behind."""
    (files / "acc.yaml").write_text(
        ACCELERATE.replace("{fsdp_sharding_strategy: HYBRID_SHARD}", json.dumps(config))
    )
    (files / "ax.yml").write_text(
        f"{AXOLOTL}\nfsdp: {json.dumps(words)}\nfsdp_config: {json.dumps(config)}\n"
    )
    drafts = [imported(files, "ax.yml").draft]
    drafts.append(
        script(files, f't.py --output_dir o --fsdp "{" ".join(words)}"').draft
        if words
        else imported(files, "trl.yaml", "acc.yaml").draft
    )
    for draft in drafts:
        assert draft.keys["strategy.name"] == "fsdp"
        assert draft.keys.get("strategy.shard") == shard
        assert draft.keys.get("strategy.reshard") == reshard
        assert not any("fsdp_sharding" in one.key for one in draft.left)


def test_fsdp_that_shards_nothing_is_ddp(files: Path) -> None:
    (files / "acc.yaml").write_text(ACCELERATE.replace("HYBRID_SHARD", "NO_SHARD"))
    draft = imported(files, "trl.yaml", "acc.yaml").draft
    assert draft.keys["strategy.name"] == "ddp"
    assert not any("sharding" in one.key for one in draft.left)
