"""Every "Nearest" that a plan can print is followed once: the recipe is then accepted, or fails otherwise.

A message without a row here fails the last test, so that advice cannot be added without being tried.
"""

import re
from typing import Any

import pytest

from advice import pattern_of, skeletons
from drumline.errors import DrumlineError
from drumline.plan.resolve import resolve
from drumline.plan.resplit import on_gpus
from drumline.plan.world import World
from drumline.recipe.load import merge as merged
from drumline.recipe.load import override, parse_override, validate

LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 300}  # fmt: skip
BASE: dict[str, Any] = {
    "recipe": "advice",
    "schema": 1,
    "model": {"source": "config", "architecture": "llama", "config": LLAMA},
    "data": {"source": "files", "path": "/x.txt", "task": "causal_lm", "sequence_length": 64, "samples": 1000},
    "batch": {"effective": 16, "per_device": 2, "gpus": 2, "accumulation": 4},
    "cluster": {"gpu": "h100-80gb"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "duration": {"steps": 100},
}  # fmt: skip
CLASSES = ["data.task=classification"]
VIT = ["model.architecture=vit", "!model.config={}"]
IMAGES = ["data={task: classification, image_field: image, image: {size: 224}}", *VIT]
CHATS = [
    "data={task: sft, path: /x.jsonl, image_field: images}",
    "model.architecture=llava",
    "!model.config={}",
]
OWN = ["data={source: dataset, path: null, factory: 'm:f', task: custom, workers: 2}"]
PAIRS = ["data.task=preference"]
WARMUP = ["schedule.name=cosine"]
SETS = "data.evaluation={source: files, path: /e.txt}"

FOLLOWED: list[tuple[list[str], str, list[list[str]]]] = [
    # batch, cluster and GPUs
    (["batch={effective: null, per_device: null, gpus: null, accumulation: null}"], "effective, per_device and gpus",
     [["batch={effective: 16, per_device: 2, gpus: 2}"]]),
    (["batch={effective: 16, per_device: null, gpus: 2, accumulation: null}", "model.architecture=gptj",
      "!model.config={n_positions: 64}"], "batch.per_device=1", [["batch.per_device=1"]]),
    (["batch={effective: 16, per_device: 2, gpus: null, accumulation: null}"], "batch.gpus=N", [["batch.gpus=2"]]),
    (["batch={effective: 16, per_device: 3, gpus: 2, accumulation: null}"], "effective 12 (k=2) or 18 (k=3); or per_device 4 (k=2)",
     [["batch.effective=12"], ["batch.effective=18"], ["batch.per_device=4"]]),
    (["batch.ramp=[{until_step: 10, effective: 9}]"], "9 / 2 = 4.50). Nearest: 8 or 10",
     [["batch.ramp=[{until_step: 10, effective: 8}]"], ["batch.ramp=[{until_step: 10, effective: 10}]"]]),
    (["batch.ramp=[{until_step: 100, effective: 8}]"], "until_step 50, or a longer duration",
     [["batch.ramp=[{until_step: 50, effective: 8}]"], ["duration.steps=200"]]),
    (["cluster.nodes=3", "cluster.gpus_per_node=2"], "gpus 2", [["cluster.nodes=null"]]),
    (["batch.remainder=drop", "data.samples=9"], "remainder keep (steps of 9), or effective 9",
     [["batch.remainder=keep"], ["batch={effective: 9, per_device: 1, gpus: 1, accumulation: 9}"]]),
    (["cluster.gpu=v100-32gb", "precision=bf16"], "precision=fp16", [["precision=fp16"]]),
    (["data={source: mixture, path: null, mixture: [{weight: 1.0, source: files, path: /a.txt}]}"], "Nearest: source and its keys",
     [["data={source: files, path: /a.txt, mixture: null}"]]),
    (["data={source: mixture, path: null, samples: 9, mixture: [{weight: 1.0, source: files, path: /a.txt}, {weight: 0.01, source: files, path: /b.txt}]}"],
     "Nearest: a larger weight, or data.samples, those of an epoch",
     [["data.mixture=[{weight: 1.0, source: files, path: /a.txt}, {weight: 0.2, source: files, path: /b.txt}]"], ["data.samples=900"]]),
    (["data={source: mixture, path: null, validation_split: periodic, mixture: [{weight: 1.0, source: files, path: /a.txt}, {weight: 1.0, source: files, path: /b.txt}]}"],
     "Nearest: drawn", [["data.validation_split=drawn"]]),
    (["optimizer.name=galore_adamw"], "Nearest: adamw, or optimizer.name custom", [["optimizer.name=adamw"]]),
    (["schedule.name=reduce_lr_on_plateau"], "is not offered. Nearest: linear or cosine", [["schedule.name=linear"], ["schedule.name=cosine"]]),
    (["schedule.lr_scheduler_kwargs={timescale: 3}"], "Nearest: keys of schedule", [["!schedule={name: polynomial, power: 2.0}"]]),
    (["schedule.lr_scheduler_kwargs=3"], "is no mapping of options. Nearest: min_lr_rate=0.1", [["!schedule={name: cosine, min_lr_ratio: 0.1}"]]),
    (["model.attn_implementation=flex_attention"], "is not offered. Nearest: model.attention=sdpa",
     [[f"!model={{source: config, architecture: llama, config: {LLAMA}, attention: sdpa}}"]]),
    (["model.quantization_bit=3"], "bits are not offered. Nearest: model.quantization=nf4",
     [[f"!model={{source: config, architecture: llama, config: {LLAMA}, adapter: {{rank: 8}}, quantization: nf4}}"]]),
    (["strategy=fsdp"], "is no section of keys. Nearest: strategy.name=fsdp", [["!strategy={name: fsdp}"]]),
    (["data.config=c"], "not of files. Nearest: config null", [["data.config=null"]]),
    (["data.text_pair_field=other"], "text_pair_field null", [["data.text_pair_field=null"]]),
    (["data.task=regression", "model.config.pad_token_id=0", "objective.name=bce"], "objective.name=mse", [["objective.name=mse"]]),
    (["data={task: classification, image_field: image}", *VIT], "Nearest: data.image={size: 224}", [["data.image={size: 224}"]]),
    (["data={task: classification, image: {size: 224}}", *VIT], "Nearest: data.image_field=image", [["data.image_field=image"]]),
    ([*IMAGES, "model.config={image_size: 384}"], "Nearest: data.image.size=384, or model.config.image_size=224",
     [["data.image.size=384"], ["model.config.image_size=224"]]),
    ([*IMAGES, "data.image.transform='m:f'", "data.workers=0"], "it needs a process of its own. Nearest: data.workers=4", [["data.workers=4"]]),
    ([*IMAGES, "model.config={num_channels: 1}"], "Nearest: data.image.channels=1, or model.config.num_channels=3",
     [["data.image.channels=1"], ["model.config.num_channels=3"]]),
    ([*CHATS, "data.image={size: 32}"], "Nearest: data.image={processor: ...}, the model's folder", [["!data.image={processor: /p}"]]),
    ([*CHATS, "data.image={processor: /p, flip: 0.0}"], "Nearest: data.image.options, which it is called with", [["!data.image={processor: /p, options: {size: {longest_edge: 784}}}"]]),
    ([*CHATS, "data.image={processor: /p}", "data.chat_template=chatml"], "Nearest: data.chat_template=null", [["data.chat_template=null"]]),
    ([*CHATS, "data.image={processor: /p}", "data.packing=documents"], "Nearest: data.packing=none", [["data.packing=none"]]),
    ([*OWN, "data.workers=0"], "their own. Nearest: data.workers=4", [["data.workers=4"]]),
    ([*OWN, "data.task=causal_lm"], "source dataset is for task custom, without task_factory. Nearest: data.task=custom", [["data.task=custom"]]),
    ([*OWN, "data.evaluation={source: files, path: /e.txt}", "evaluation.every_steps=9"], "Nearest: evaluation={source: dataset, factory: ...}",
     [["!data.evaluation={source: dataset, factory: 'm:g'}"]]),
    (["data={source: mixture, path: null, mixture: [{weight: 1.0, source: files, path: /a.txt}, {weight: 1.0, source: dataset, factory: 'm:f'}]}"],
     "Nearest: source dataset alone", [["data={source: dataset, factory: 'm:f', mixture: null, task: custom}"]]),
    (["evaluation={after: [{every_steps: 1, run: [a]}, {every_steps: 2, run: [a]}]}"], "two commands are called a. Nearest: a name for each",
     [["evaluation={after: [{every_steps: 1, run: [a]}, {every_steps: 2, run: [a], name: b}]}"]]),
    (["data={task: classification, audio_field: a}", *VIT], "Nearest: data.audio={seconds: 30}", [["data.audio={seconds: 30}"]]),
    (["data={task: classification, audio: {seconds: 5}}", *VIT], "Nearest: data.audio_field=audio", [["data.audio_field=audio"]]),
    ([*IMAGES, "data={audio_field: a, audio: {seconds: 5}}"], "Nearest: data.image=null", [["data={image: null, image_field: null}"]]),
    (["data={task: seq2seq, audio_field: a, audio: {seconds: 5}}", "model.architecture=whisper", "!model.config={}"], "Nearest: data.target_length=448",
     [["data.target_length=448"]]),
    ([*PAIRS, "objective.name=kto"], "kto learns from single ones with a label, and the prepared rows are pairs", [["objective.name=dpo"]]),
    ([*PAIRS, "objective={name: simpo, label_smoothing: 0.1, reference: stored}"], "label_smoothing, reference has no meaning for simpo",
     [["objective.label_smoothing=null", "objective.reference=null"]]),
    ([*PAIRS, "objective={loss_type: hinge, label_smoothing: 0.1}"], "Nearest: objective.label_smoothing=0.0", [["objective.label_smoothing=0.0"]]),
    ([*PAIRS, "objective.loss_type=exo_pair"], "Nearest: objective.label_smoothing=0.001", [["objective.label_smoothing=0.001"]]),
    ([*PAIRS, "objective.reference=adapter_off"], "Nearest: objective.reference=stored", [["objective.reference=stored"]]),
    (["data.task=masked_lm", "loss.chunked=true"], "Nearest: loss.chunked=false", [["loss.chunked=false"]]),
    (["data.task=masked_lm", "model.architecture=bert", "!model.config={is_decoder: true}"], "does not attend to the tokens after a masked one",
     [["model.config.is_decoder=false"]]),
    (["data.task=multi_label", "model.config.pad_token_id=0", "loss.label_smoothing=0.1"], "Nearest: loss.label_smoothing=0.0", [["loss.label_smoothing=0.0"]]),
    (["data.task=regression", "model.architecture=gpt2", "!model.config={n_embd: 64, n_head: 4, pad_token_id: 0, num_labels: 3}"],
     "Nearest: num_labels 1", [["model.config.num_labels=1"]]),
    # model
    (["cluster.gpu=v100-32gb", "model.attention=flash"], "sdpa", [["model.attention=sdpa"]]),
    (["model.config.num_hidden_layers=2.0"], "Nearest: 2", [["model.config.num_hidden_layers=2"]]),
    (["model.config.tie_word_embeddings='yes'"], "Nearest: true", [["model.config.tie_word_embeddings=true"]]),
    (["model.config.rms_norm_eps=1"], "Nearest: 1.0", [["model.config.rms_norm_eps=1.0"]]),
    (["model.config.torch_dtype=bfloat16"], "the recipe's precision", [["precision=bf16", f"!model.config={LLAMA}"]]),
    (["model.config.layer_types=[full_attention]", "model.architecture=qwen2", "model.config.num_key_value_heads=4"], "Nearest: state 2",
     [["model.config.layer_types=[full_attention, full_attention]"]]),
    (["model.architecture=mixtral", "model.config.num_key_value_heads=4", "model.config.num_experts_per_tok=9", "model.config.num_local_experts=4"],
     "Nearest: 4", [["model.config.num_experts_per_tok=4"]]),
    (["model.config.hidden_size=66"], "Nearest: 64 or 68", [["model.config.hidden_size=64"], ["model.config.hidden_size=68"]]),
    (["model.architecture=bert", "model.config.vocab_size=300"], "model.config.is_decoder=true, or a decoder such as gpt2",
     [["model.config.is_decoder=true"], ["model.architecture=gpt2", "!model.config={n_embd: 64, n_head: 4}"]]),
    (["model.architecture=mixtral", "model.config.num_key_value_heads=4", "model.config.output_router_logits=true"], "model.config.output_router_logits=false",
     [["model.config.output_router_logits=false"]]),
    (["model.config.pad_token_id=300"], "Nearest: 299", [["model.config.pad_token_id=299"]]),
    ([*CLASSES], "model.config.pad_token_id=0", [["model.config.pad_token_id=0"]]),
    (["model.architecture=gptj", "!model.config={n_positions: 32}"], "sequence_length 32, or model.config.n_positions 64",
     [["data.sequence_length=32"], ["model.config.n_positions=64"]]),
    (["model.architecture=gpt2", "!model.config={n_positions: 32}"], "sequence_length 32, or model.config.n_positions 64",
     [["data.sequence_length=32"], ["model.config.n_positions=64"]]),
    (["model.architecture=gemma2"], "model.attention=eager", [["model.attention=eager"]]),
    (["model.architecture=granite", "loss.chunked=true"], "chunked loss would not. Nearest: loss.chunked=false", [["loss.chunked=false"]]),
    (["model.architecture=gptj", "!model.config={n_positions: 64}", "loss.chunked=true"], "missing from the loss. Nearest: loss.chunked=false",
     [["loss.chunked=false"]]),
    ([*CLASSES, "model.config.pad_token_id=0", "model.config.num_labels=2"], "num_labels 3", [["model.config.num_labels=3"]]),
    (["model.activation_offload=true"], "activation_checkpointing full or selective",
     [["model.activation_checkpointing=full"], ["model.activation_checkpointing=selective"]]),
    (["model.sync_batchnorm=true", "strategy.name=fsdp"], "strategy.name ddp", [["strategy.name=ddp"]]),
    (["model.sync_batchnorm=true", "cluster.gpu=cpu"], "sync_batchnorm false", [["model.sync_batchnorm=false"]]),
    (["model.sync_batchnorm=true", "launch.launcher=deepspeed"], "launcher torchrun", [["launch.launcher=torchrun"]]),
    (["model.neftune_alpha=5.0", "data.packing=documents"], "Nearest: model.neftune_alpha=null", [["model.neftune_alpha=null"]]),
    (["ema.decay=0.9", "evaluation.every_steps=5", "data.evaluation={ema: {source: files, path: /e.txt}}"], "or ema.evaluate=false",
     [["ema.evaluate=false"]]),
    (["model.frozen=[a.*]", "model.adapter={rank: 4}"], "Nearest: frozen []", [["model.frozen=[]"]]),
    (["model.adapter={targets: []}"], "targets all-linear", [["model.adapter.targets=all-linear"]]),
    (["model.quantization=nf4"], "adapter {rank: 16}, or quantization none",
     [["model.adapter={rank: 16}"], ["model.quantization=none"]]),
    (["model.quantization=nf4", "model.adapter={dora: true}"], "dora false, or quantization none",
     [["model.adapter.dora=false"], ["model.quantization=none"]]),
    (["model.quantization=nf4", "model.adapter={rank: 4}", "launch.launcher=deepspeed"],
     "launch.launcher=torchrun strategy.name=fsdp", [["launch.launcher=torchrun", "strategy.name=fsdp"]]),
    # precision, optimizer, logging
    (["precision=bf16-pure", "launch.launcher=deepspeed"], "bf16, or strategy fsdp with launcher torchrun",
     [["precision=bf16"], ["strategy.name=fsdp", "launch.launcher=torchrun"]]),
    (["logging.noise_scale=true", "strategy={name: fsdp, shard: node}", "cluster.gpus_per_node=1"], "strategy.shard=all", [["strategy.shard=all"]]),
    (["logging.noise_scale=true", "strategy={name: fsdp, reduce: step}"], "strategy.reduce=micro_batch", [["strategy.reduce=micro_batch"]]),
    (["optimizer={name: sgd, lr: 0.1, implementation: fused}", "strategy.name=fsdp"], "Nearest: foreach", [["optimizer.implementation=foreach"]]),
    (["optimizer={name: custom, factory: 'm:f', lr: 0.1, implementation: foreach}"], "leave it out", [["optimizer.implementation=null"]]),
    (["optimizer.lr=1e308", "optimizer.lr_scaling={rule: linear, reference_batch: 1}"], "a smaller rate", [["optimizer.lr=1e-3"]]),
    (["optimizer={name: muon, lr: 0.01}", "launch.launcher=deepspeed", "strategy.name=zero2"],
     "does not go with strategy zero2. Nearest: ddp, fsdp",
     [["strategy.name=ddp"], ["strategy.name=fsdp", "launch.launcher=torchrun"]]),
    (["data={task: custom, task_factory: 'm:f', sequence_length: null}", "loss.chunked=true"], "state data.sequence_length, or loss.chunked=false",
     [["data.sequence_length=64"], ["loss.chunked=false"]]),
    (["objective={name: custom, factory: 'm:f'}", "loss.label_smoothing=0.1"], "Nearest: loss.label_smoothing=0.0",
     [["loss.label_smoothing=0.0"]]),
    (["objective={name: custom, factory: 'm:f'}", "loss.z_loss=1e-4"], "Nearest: loss.z_loss=0.0",
     [["loss.z_loss=0.0"]]),
    ([*CLASSES, "model.config.pad_token_id=0", "loss.z_loss=1e-4"], "tokens, not classes. Nearest: loss.z_loss=0.0",
     [["loss.z_loss=0.0"]]),
    (["loss={label_smoothing: 0.1, z_loss: 1e-4}"], "do not go together. Nearest: loss.label_smoothing=0.0",
     [["loss.label_smoothing=0.0"]]),
    # packing
    (["data.packing=documents", "model.architecture=bloom", "!model.config={hidden_size: 64, n_head: 4}"],
     "is not known to keep documents of a row apart. Nearest: data.packing=stream", [["data.packing=stream"]]),
    (["data.packing=documents", "model.attention=flash"], "Nearest: model.attention=sdpa", [["model.attention=sdpa"]]),
    (["data.packing=documents", "duration={steps: null, tokens: 9000}"], "duration.epochs or duration.steps",
     [["duration={tokens: null, epochs: 1}"], ["duration={tokens: null, steps: 9}"]]),
    # data, steps and schedule
    (["data.samples=900"], "samples 1000, or samples null", [["data.samples=1000"], ["data.samples=null"]]),
    ([SETS, "data.validation=0.1", "evaluation.every_steps=9"], "validation 0, or no evaluation",
     [["data.validation=0"], ["data.evaluation=null"]]),
    (["data.evaluation={}"], "leave it out", [["data.evaluation=null"]]),
    ([SETS], "evaluation.every_steps=100", [["evaluation.every_steps=100"]]),
    (["data.samples=null", "duration={steps: null, epochs: 1}"], "state data.samples, or use duration.steps",
     [["data.samples=1000"], ["duration={steps: 9, epochs: null}"]]),
    (["data.samples=null", "schedule={name: cosine, unit: epoch}"], "state data.samples, or use unit step",
     [["data.samples=1000"], ["schedule.unit=step"]]),
    ([*WARMUP, "schedule.unit=epoch", "schedule.warmup_steps=3"], "warmup_steps 126 (two epochs), or unit step",
     [["schedule.warmup_steps=126", "duration.steps=500"], ["schedule.unit=step"]]),
    (["schedule={name: cosine_restarts, cycles: 60}"], "cycles 50", [["schedule.cycles=50"]]),
    ([*WARMUP, "schedule.warmup_steps=200"], "warmup_steps 10, or duration.steps above 200, or horizon_steps 2000",
     [["schedule.warmup_steps=10"], ["duration.steps=201"], ["schedule.horizon_steps=2000"]]),
    ([*WARMUP, "schedule.min_lr=1.0"], "Nearest: min_lr 0.0001", [["schedule.min_lr=0.0001"]]),
    (["schedule={name: one_cycle, warmup_start_ratio: 0.1}"], "Nearest: start_ratio 0.1",
     [["schedule={warmup_start_ratio: 0.0, start_ratio: 0.1}"]]),
    (["data.samples=null", "checkpoint.every_epochs=1"], "state data.samples, or use steps",
     [["data.samples=1000"], ["checkpoint={every_epochs: null, every_steps: 9}"]]),
    ([*WARMUP, "schedule.warmup_ratio=0.001"], "warmup_steps 2", [["schedule={warmup_steps: 2, warmup_ratio: null}"]]),
    ([*WARMUP, "schedule.warmup_steps=100"], "a shorter warm-up", [["schedule.warmup_steps=50"]]),
    (["schedule={name: wsd, warmup_steps: 60, decay_ratio: 0.5}"], "decay_ratio 0.400", [["schedule.decay_ratio=0.4"]]),
    (["schedule={name: piecewise, milestones: {'0.001': 0.1}}"], "a larger fraction", [["!schedule.milestones={'0.1': 0.1}"]]),
    (["schedule={name: piecewise, milestones: {'200': 0.1}}"], "a fraction of the run, such as 0.9", [["!schedule.milestones={'0.9': 0.1}"]]),
    (["schedule={name: piecewise, milestones: {'20.0': 0.1}}"], "the step '20' in quotes",
     [["!schedule.milestones={'20': 0.1}"], ["!schedule.milestones={'0.9': 0.1}"]]),
    # the recipe's form
    (["strategy.name=tensor_parallel"], "Nearest: fsdp", [["strategy.name=fsdp"]]),
    (["checkpoint.every_minutes=.inf"], "null, or a large number", [["checkpoint.every_minutes=null"], ["checkpoint.every_minutes=999999"]]),
    (["batch=null"], "give it a key", [["batch={effective: 16, per_device: 2, gpus: 2}"]]),
    (["batch.gpus=2.0"], "Nearest: 2", [["batch.gpus=2"]]),
]  # fmt: skip
"""Overrides that are wrong, words of the advice, and every way to follow it."""

ELSEWHERE = {
    "data: every row has class 0": "needs other data",
    "is a pickle, which can run code": "tests/plan/test_weight_files.py",
    "the weights of": "tests/plan/test_weight_files.py",
    "is not in the cache whole": "needs the network; tests/train/test_pretrained.py",
    "memory is not known": "tests/cli: --trace",
    "more than one node of": "test_a_resplit_follows_its_advice",
    "start_from": "tests/plan/test_start_from.py",
    "where start_from begins": "tests/plan/test_start_from.py",
    "whose steps are counted on": "tests/plan/test_start_from.py",
    "secrets do not belong": "names no recipe",
    "merge keys": "tests/recipe",
    "no key of a recipe": "names no recipe: tests/recipe/test_meaning_of_keys.py",
    "several keys are called so": "names no recipe: tests/recipe/test_meaning_of_keys.py",
}
"""Advice that is not about a key of the recipe, and where it is tried, or why it cannot be."""


def _emptied(change: dict[str, Any]) -> dict[str, Any]:
    """The same key, with nothing in its mapping."""
    ((key, value),) = change.items()
    is_inner = (
        isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict)
    )
    return {key: _emptied(value) if is_inner else None}


def told_by(overrides: list[str], is_accepted: bool = False) -> str:
    """The error of this recipe, which one that `is_accepted` must not have, or its warnings; "" for none."""
    plain = BASE
    try:
        for text in overrides:
            change = parse_override(text.removeprefix("!"))
            if text.startswith("!"):  # in place of what stands there, as in an editor
                plain = merged(plain, merged(change, {}) | _emptied(change))
            plain = merged(plain, change)
        recipe = validate(plain, "r")
        samples = 1000 if recipe.data.samples == 900 else None
        classes = {"classification": 3, "regression": 1}.get(recipe.data.task)
        sequences = 2 if recipe.data.task == "preference" else 1
        world = World(samples=samples, classes=classes, sequences=sequences)
        return "\n".join(resolve(recipe, world).warnings)
    except DrumlineError as error:
        if is_accepted:
            raise
        return str(error)


@pytest.mark.parametrize(("wrong", "advice", "ways"), FOLLOWED, ids=lambda value: str(value)[:50])
def test_advice_works_when_followed(wrong: list[str], advice: str, ways: list[list[str]]) -> None:
    """The words stand in the message; with any of the changes that they name it is not told again."""
    told = told_by(wrong)
    assert "Nearest" in told, told
    assert advice in told, told
    for way in ways:
        again = told_by([*wrong, *way], is_accepted=True)
        assert advice not in again, f"{way}: {again}"


def test_a_resplit_follows_its_advice() -> None:
    """`--gpus` that make no whole nodes: both numbers that it names work."""
    stated = merged(
        BASE,
        {
            "cluster": {"gpus_per_node": 4},
            "batch": {"gpus": 4, "effective": 96, "accumulation": 12},
        },
    )
    recipe = validate(stated, "r")
    with pytest.raises(DrumlineError, match="Nearest: 4 or 8; or cluster.gpus_per_node"):
        on_gpus(recipe, 6, None, World())
    for gpus in (4, 8):
        assert on_gpus(recipe, gpus, None, World())
    assert on_gpus(override(recipe, ["cluster.gpus_per_node=2"]), 6, None, World())


def test_no_advice_is_left_out() -> None:
    """Each message of the plan's layers was told above, or stands among those that are tried elsewhere."""
    told = [told_by(wrong) for wrong, _, _ in FOLLOWED]
    below = [f"toolkit/drumline/{part}" for part in ("recipe", "architectures", "plan")]
    left = [
        (where, pattern)
        for where, pattern in ((where, pattern_of(parts)) for where, parts in skeletons(*below))
        if not any(re.search(pattern, text, flags=re.DOTALL) for text in told)
        and not any(re.escape(words) in pattern for words in ELSEWHERE)
    ]
    assert left == []
