"""Documents side by side in a row have the losses and gradients that they have alone, for every family that may."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_recipe
from drumline.data.document_packer import DocumentPacker
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import Encoded, find_task
from drumline.data.tasks.base import SEGMENTS, TURNS
from drumline.errors import PlanError
from drumline.plan.checks import PACKABLE
from drumline.plan.resolve import resolve
from drumline.recipe.data_section import Data
from drumline.recipe.load import validate
from drumline.train.batches import as_tensors, micro_batch_tensors
from drumline.train.models.masks import answer_without_looking
from drumline.train.objectives.cross_entropy import TokenCrossEntropy
from memory.plans import SMALL

WINDOWS = {"mistral": {"sliding_window": 5}, "gemma2": {"sliding_window": 5}, "starcoder2": {"sliding_window": 5},
           "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
           "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}}  # fmt: skip
STILL = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "residual_dropout": 0.0, "embedding_dropout": 0.0}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "n_embd": 64, "head_dim": 16,
          "num_attention_heads": 4, "moe_intermediate_size": 32, "vocab_size": 260}  # fmt: skip


def model_of(architecture: str, attention: str) -> Any:
    small = SMALL[architecture]
    config = {
        **small,
        **{k: v for k, v in NARROW.items() if k in small},
        **WINDOWS.get(architecture, {}),
    }
    made = transformers.AutoConfig.for_model(architecture, **config)
    for key, value in STILL.items():
        if hasattr(made, key):
            setattr(made, key, value)
    torch.manual_seed(1)
    answer_without_looking()
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    model.config.use_cache = False
    return model.train()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """Prompts and completions of 3 to 40 tokens, padded and packed into rows of 48."""
    folder = tmp_path_factory.mktemp("documents")
    path = folder / "pairs.jsonl"
    pairs = [{"prompt": "q" * (1 + n % 5), "completion": chr(97 + n) * (1 + n * 7 % 25)} for n in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = {}
    for packing in ("none", "documents"):
        data = Data(source="files", path=str(path), task="sft", sequence_length=48, packing=packing)
        found[packing] = Rows(prepare(data, None), "train", find_task(data, None))
    return found


def gradient(model: Any, rows: Rows, chunked: bool = False, leak: bool = False) -> tuple[float, torch.Tensor]:  # fmt: skip
    """The summed loss over all rows, two at a time, and its gradient."""
    model.zero_grad()
    total = 0.0
    for start in range(0, len(rows), 2):
        indices = np.arange(start, min(start + 2, len(rows)))
        tensors = micro_batch_tensors(rows, indices, by_sample=False, dummy=False)
        if leak:
            del tensors["position_ids"]
        loss = TokenCrossEntropy(3 if chunked else 0).sums(model, tensors).loss
        loss.backward()
        total += float(loss)
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> float:
    losses = abs(one[0] - other[0]) / abs(other[0])
    return max(losses, float((one[1] - other[1]).norm() / other[1].norm()))


CASES = [(name, "eager" if name == "gemma2" else "sdpa") for name in sorted(PACKABLE)]
CASES += [(name, "eager") for name in ("llama", "mistral", "gpt2")]


@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_packed_is_unpacked(rows: dict[str, Rows], architecture: str, attention: str) -> None:
    """Loss and gradient within 2e-6, sliding windows included; without positions they leak, which shows."""
    torch.set_num_threads(1)
    model = model_of(architecture, attention)
    assert len(rows["documents"]) < len(rows["none"]) / 2
    alone, packed = gradient(model, rows["none"]), gradient(model, rows["documents"])
    assert difference(packed, alone) < 2e-6
    if attention == "eager":
        assert difference(gradient(model, rows["documents"], leak=True), alone) > 1e-2


def test_a_chunked_loss_keeps_them_apart(rows: dict[str, Rows]) -> None:
    """The head is applied to chunks of hidden states that were made with the positions."""
    model = model_of("llama", "sdpa")
    alone, packed = gradient(model, rows["none"]), gradient(model, rows["documents"], chunked=True)
    assert difference(packed, alone) < 2e-6


def test_a_warm_up_is_of_rows_with_positions(rows: dict[str, Rows]) -> None:
    """The dummy micro-batch has the inputs of a real one, so that memory and buckets are the same."""
    packed = rows["documents"]
    real = micro_batch_tensors(packed, np.arange(2), by_sample=False, dummy=True)
    blank = as_tensors(packed.task.blank(2, packed.manifest), np.zeros(2), dummy=True)
    assert real.keys() == blank.keys()
    assert (real["targets"] == -100).all()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 33), min_size=1, max_size=300), most=st.sampled_from([None, 3])
)
def test_every_document_is_in_one_row(sizes: list[int], most: int | None) -> None:
    """In rows that are not too long, with what is trained and where it begins; the same each time."""

    class Writer:
        def __init__(self) -> None:
            self.samples: list[Encoded] = []

        @property
        def rows(self) -> int:
            return len(self.samples)

        def append_sample(self, sample: Encoded) -> None:
            self.samples.append(sample)

    found = []
    for _ in range(2):
        writer: Any = Writer()
        packer = DocumentPacker(writer, 32, most)
        for number, size in enumerate(sizes):
            tokens = np.full(size, number, dtype=np.uint32)
            packer.add(Encoded(count=size - 1, tokens=tokens, prompt_targets=0))
        packer.finish()
        found.append(writer.samples)
    seen: list[int] = []
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert len(one.tokens) <= 33
        starts, turns = one.arrays[SEGMENTS], one.arrays[TURNS]
        seen += one.tokens[starts].tolist()
        assert (np.diff(one.tokens, prepend=one.tokens[0] + 1) != 0).sum() == len(starts)
        assert np.array_equal(turns[0::2], starts + 1)
        assert one.count == int((turns[1::2] - turns[0::2]).sum())
    assert len(seen) == len(set(seen))
    if most is None:
        assert sorted(seen) == list(range(len(sizes)))
        if sum(sizes) > 3000 and max(sizes) < 17:  # close to as few rows as can be
            assert len(found[0]) <= 1.1 * sum(sizes) / 33 + 1


def test_long_documents_of_a_stream_are_cut_in_pieces(tmp_path: Path) -> None:
    """Every token but the first of each document is a target once, in pieces that overlap by a token."""
    texts = ["a" * 3, "b" * 70, "c" * 20, "d"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = Data(source="files", path=str(tmp_path / "t.jsonl"), task="causal_lm", sequence_length=32, packing="documents")  # fmt: skip
    stored = Rows(prepare(data, None), "train", find_task(data, None))
    arrays = stored.collate(np.arange(len(stored)))
    targets = arrays["targets"][arrays["targets"] != -100]
    counts = {letter: int((targets == ord(letter)).sum()) for letter in "abcd"}
    assert counts == {"a": 2, "b": 69, "c": 19, "d": 0}
    assert int((targets == 256).sum()) == 4
    assert int(stored.counts.sum()) == len(targets)


def recipe(architecture: str, **data: Any) -> Any:
    plain = tiny_recipe(
        model={"source": "config", "factory": None, "architecture": architecture},
        data={"source": "files", "name": None, "path": "/x.jsonl", "task": "sft", "sequence_length": 64,
              "samples": 100, "validation": 0.0, **data},
    )  # fmt: skip
    plain["model"]["config"] = {}
    return plain


def test_other_families_are_refused_by_name() -> None:
    """Mamba-2 would mix documents silently; the advice is followed."""
    for architecture in ("mamba2", "bloom", "mpt"):
        with pytest.raises(
            PlanError, match=f"data.packing: documents: {architecture} is not known to keep"
        ):
            resolve(validate(recipe(architecture, packing="documents"), "r"))
        assert resolve(validate(recipe(architecture, packing="none"), "r"))
    assert resolve(validate(recipe("llama", packing="documents"), "r")).recipe.data.packs_documents
