"""Recordings: where they come from, what is refused, Whisper and wav2vec 2 at every split, with workers, resumed."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from arena import STEPS, Arena
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, WhisperFeatureExtractor

from advice import heard
from drumline.data.audio import AudioPipeline
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.errors import DataError
from drumline.plan.model import Plan
from drumline.recipe.audio_section import Audio
from drumline.recipe.data_section import Data
from drumline.session.planning import with_trace
from drumline.session.row_lengths import manifest_of_run
from drumline.trace.rehearse import rehearse

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [
    ("fsdp", SPLITS[2]),
    ("zero3", SPLITS[1]),
]
WHISPER = {"source": "config", "architecture": "whisper", "config": {
    "vocab_size": 258, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 40, "max_source_positions": 50,
    "max_target_positions": 32, "dropout": 0.0, "decoder_start_token_id": 256, "pad_token_id": 256, "bos_token_id": 256,
    "eos_token_id": 256}}  # fmt: skip
WAV2VEC = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [16, 16],
    "conv_stride": [8, 8], "conv_kernel": [16, 16], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "classifier_proj_size": 16,
    "feat_extract_norm": "layer"}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "whisper": {"model": WHISPER, "data": {"task": "seq2seq", "target_length": 12, "completion_field": "text", "audio": {"seconds": 1, "mels": 40}}},
    "wav2vec2": {"model": {"source": "folder"}, "data": {"task": "classification", "audio": {"features": "waveform", "seconds": 1}}},
}  # fmt: skip


def tone(number: int, rate: int = 16_000) -> np.ndarray[Any, Any]:
    """A tone whose pitch is the class, of a length of its own."""
    times = np.arange(int(rate * (0.4 + 0.05 * (number % 9)))) / rate
    return (0.4 * np.sin(2 * np.pi * (220, 440, 880)[number % 3] * times)).astype(np.float32)


def rows_in(folder: Path, count: int = 41) -> Path:
    (folder / "sounds").mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        name = f"sounds/{number:03}.{'flac' if number % 2 else 'wav'}"
        soundfile.write(folder / name, tone(number), 16_000)
        lines.append(
            {"audio": name, "label": number % 3, "text": ("low", "mid", "high")[number % 3]}
        )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plan_of(
    arena: Arena, kind: str, engine: str, split: tuple[int, int, int], workers: int = 0
) -> Plan:
    sections = KINDS[kind]
    path = arena.folder / "rows.jsonl"
    if not path.exists():
        rows_in(arena.folder)
        torch.manual_seed(
            3
        )  # its weights cannot be drawn block by block, because their norms are parameters
        Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**WAV2VEC, num_labels=3)).save_pretrained(
            arena.folder / "model"
        )
    model = sections["model"]
    if model["source"] == "folder":
        model = {
            "source": "folder",
            "path": str(arena.folder / "model"),
            "frozen": ["*.masked_spec_embed"],
        }
    data = {"path": str(path), "audio_field": "audio", "validation": 0.15, "workers": workers, "sequence_length": None, **sections["data"]}  # fmt: skip
    return arena.plan(
        engine,
        split,
        model=model,
        data=data,
        evaluation={"every_steps": 4, "per_device": 2},
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("speech"))
    for kind in KINDS:
        for engine, split in RUNS:
            made.ask("train", f"{kind}-{engine}-{split}", plan_of(made, kind, engine, split))
        made.ask("train", f"{kind}-workers", plan_of(made, kind, "ddp", SPLITS[1], workers=1))
        made.ask("verify", f"{kind}-verify", plan_of(made, kind, "fsdp", SPLITS[1]), fault="")
        made.ask("train", f"{kind}-stopped", plan_of(made, kind, "ddp", SPLITS[1]), stop_after=5)
    made.go()
    for kind in KINDS:
        made.ask("train", f"{kind}-stopped", plan_of(made, kind, "ddp", SPLITS[1]))
    made.go()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_curve(arena: Arena, kind: str) -> None:
    """Under every engine, evaluations too; it learns, and verification agrees with single recordings and the model's own loss."""
    wanted = arena.curve(f"{kind}-ddp-{SPLITS[0]}", "accuracy")
    assert len(wanted) == STEPS + 2
    for engine, split in RUNS[1:]:
        for ours, theirs in zip(
            arena.curve(f"{kind}-{engine}-{split}", "accuracy"), wanted, strict=True
        ):
            assert ours == pytest.approx(theirs, rel=5e-5, abs=2e-5), (engine, split)
    losses = [line["loss"] for line in wanted if "loss" in line]
    assert min(losses[-3:]) < losses[0]
    assert arena.verdict(f"{kind}-verify") == (True, True)
    assert arena.own_loss(f"{kind}-verify")


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_and_a_resume_change_nothing(arena: Arena, kind: str) -> None:
    """Bitwise."""
    wanted = arena.curve(f"{kind}-ddp-{SPLITS[1]}", "accuracy")
    assert arena.curve(f"{kind}-workers", "accuracy") == wanted
    assert arena.curve(f"{kind}-stopped", "accuracy") == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_traced(arena: Arena, kind: str) -> None:
    """There is no closed form."""
    plan = plan_of(arena, kind, "ddp", SPLITS[1])
    assert plan.memory.method == "unknown"
    assert with_trace(plan, rehearse(plan, manifest_of_run(plan)).traced()).memory.fits


def test_masks_of_the_model_itself_are_told(arena: Arena) -> None:
    """wav2vec 2 masks while it trains unless its config says otherwise."""
    plan = plan_of(arena, "wav2vec2", "ddp", SPLITS[1])
    assert plan.split_invariance.level == "none"
    assert "no closed form" in plan.split_invariance.why
    assert "apply_spec_augment" not in plan.split_invariance.why


def file_of(samples: np.ndarray[Any, Any], rate: int, subtype: str | None = None) -> bytes:
    raw = io.BytesIO()
    soundfile.write(raw, samples, rate, format="WAV", subtype=subtype)
    return raw.getvalue()


def test_channels_are_mixed_and_rates_converted() -> None:
    """Two channels of 44,100 a second become one of 16,000, with the same tone; features are those of transformers."""
    pipeline = AudioPipeline(Audio(seconds=1, mels=40))
    both = np.stack([tone(1, 44_100), tone(1, 44_100)], axis=1)
    found, wanted = pipeline.samples(file_of(both, 44_100)), tone(1)
    assert abs(len(found) - len(wanted)) <= 1
    middle = slice(1000, 5000)
    assert np.abs(found[middle] - wanted[middle]).max() < 2e-3
    theirs = WhisperFeatureExtractor(feature_size=40, chunk_length=1)
    (features,) = pipeline.features([wanted])["input_features"]
    assert np.allclose(features, theirs(wanted, sampling_rate=16_000, return_tensors="np")["input_features"][0], atol=1e-5)  # fmt: skip


def section(path: Path, **keys: Any) -> Data:
    base = {"source": "files", "path": str(path), "task": "classification", "audio_field": "audio", "audio": {"seconds": 1}}  # fmt: skip
    return Data.model_validate({**base, **keys})


def test_a_folder_of_classes_and_long_recordings(tmp_path: Path) -> None:
    """Classes by folder; a class is learnt of the beginning, and a text of too long a recording is dropped."""
    for name, seconds in (("a", 0.5), ("b", 1.5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "set" / name / "1.wav", np.zeros(int(16_000 * seconds)), 16_000)
    rows = Rows(prepare(section(tmp_path / "set"), None), "train", find_task(section(tmp_path / "set"), None))  # fmt: skip
    assert rows.manifest.class_names == ["a", "b"]
    assert (len(rows), rows.manifest.truncated) == (2, 1)
    table = tmp_path / "rows.csv"
    table.write_text("audio,text\nset/a/1.wav,short\nset/b/1.wav,long\n")
    data = section(table, task="seq2seq", completion_field="text", target_length=9)
    rows = Rows(prepare(data, None), "train", find_task(data, None))
    assert (len(rows), rows.manifest.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"no sound", "no recording that can be read"),
        (file_of(np.zeros(0), 16_000), "a recording without a sample"),
        (file_of(np.array([0.0, np.nan]), 16_000, subtype="FLOAT"), "samples that are not finite"),
    ],
    ids=["text", "empty", "broken"],
)  # fmt: skip
def test_what_is_no_recording_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    """With the line, before anything starts."""
    (tmp_path / "one.wav").write_bytes(raw)
    (tmp_path / "rows.csv").write_text("audio,label\none.wav,0\n")
    with pytest.raises(DataError, match=f"line 2: .*{words}"):
        prepare(section(tmp_path / "rows.csv"), None)


def test_a_processor_of_another_rate(tmp_path: Path) -> None:
    """Refused, with its own; then it is the model's extractor."""
    WhisperFeatureExtractor(feature_size=24, sampling_rate=8000, chunk_length=1).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(DataError) as caught:
        _ = AudioPipeline(Audio(processor=str(tmp_path), seconds=1)).extractor
    heard("Nearest: data.audio.sampling_rate=8000", str(caught.value))
    found = AudioPipeline(Audio(processor=str(tmp_path), seconds=1, sampling_rate=8000))
    assert found.features([tone(0, 8000)])["input_features"].shape[:2] == (1, 24)
