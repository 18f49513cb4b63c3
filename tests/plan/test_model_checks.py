"""What plan refuses of a model, and when it promises that a split changes nothing."""

from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto

from drumline.errors import PlanError
from drumline.plan.checks import TWO_WAY, WITHOUT_PADDING
from memory.plans import BERT, GPT2, IMAGES, SMALL, small_plan

DECODERS_OF_THEIR_OWN = {"bart", "mbart", "mvp", "reformer"}
"""Their causal language models are causal by themselves, or refuse to be built otherwise."""
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_every_encoder_that_can_be_a_decoder_is_known() -> None:
    """Those of transformers that have a masked and a causal language model."""
    both = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    assert set(TWO_WAY) == both - DECODERS_OF_THEIR_OWN
    for name, key in TWO_WAY.items():
        assert getattr(transformers.AutoConfig.for_model(name), key) is False


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_a_model_that_sees_its_targets_is_refused(architecture: str) -> None:
    """As a decoder it is planned, as its message says."""
    config = {"num_hidden_layers": 2, "vocab_size": 2000}
    data = {"task": "causal_lm"}
    with pytest.raises(
        PlanError, match="is_decoder: not set.*Nearest: model.config.is_decoder=true"
    ):
        small_plan(architecture, config, data=data)
    assert small_plan(architecture, {**config, "is_decoder": True}, data=data).batch.effective
    assert small_plan(architecture, config, data={"task": "classification"}).batch.effective


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_an_auxiliary_loss_is_refused(architecture: str) -> None:
    """Transformers would add it to its own loss, and ours would leave it out."""
    config = SMALL[architecture]
    with pytest.raises(PlanError, match="Nearest: model.config.output_router_logits=false"):
        small_plan(architecture, {**config, "output_router_logits": True})
    assert small_plan(architecture, {**config, "output_router_logits": False}).batch.effective


@pytest.mark.parametrize(
    ("architecture", "config", "level", "words"),
    [
        ("bert", {**BERT, **QUIET}, "rounding", "only rounding differs"),
        ("bert", {**BERT, **QUIET, "classifier_dropout": 0.5}, "none", "classifier_dropout 0.5 draws"),
        ("deberta-v2", {**SMALL["deberta-v2"], **QUIET, "pooler_dropout": 0.2}, "none", "pooler_dropout 0.2"),
        ("t5", {**SMALL["t5"], "dropout_rate": 0.0, "classifier_dropout": 0.3}, "none", "classifier_dropout"),
        ("dinov2", {**SMALL["dinov2"], "drop_path_rate": 0.1}, "none", "drop_path_rate 0.1"),
        ("opt", {**SMALL["opt"], "layerdrop": 0.1}, "none", "layerdrop 0.1"),
        ("gpt_neox", {**SMALL["gpt_neox"], "classifier_dropout": 0.1}, "rounding", "only rounding differs"),
        ("gpt2", {**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "rounding", "only"),
    ],
)  # fmt: skip
def test_every_dropout_of_a_config_is_seen(
    architecture: str, config: dict[str, Any], level: str, words: str
) -> None:
    """Also one that needs no memory of its own, or that no closed form knows."""
    found = small_plan(architecture, config).split_invariance
    assert (found.level, words in found.why) == (level, True), found


def test_sums_in_bf16_are_said() -> None:
    """bf16-pure sums the gradients of micro-batches in bf16, so more than fp32's rounding differs."""
    assert "the rounding of bf16" in small_plan("llama", precision="bf16-pure").split_invariance.why


def test_a_pad_token_is_one_of_the_vocabulary() -> None:
    """The embedding has no row for another."""
    with pytest.raises(
        PlanError, match="pad_token_id: 2048 is not one of 2048 tokens. Nearest: 2047"
    ):
        small_plan("llama", {**SMALL["llama"], "pad_token_id": 2048})


@pytest.mark.parametrize("architecture", ["bert", "granitemoe"])
def test_a_chunked_loss_needs_a_head_that_is_known(architecture: str) -> None:
    """What else a model does to its logits, such as BERT's layers before the head, would be left out."""
    config = {"num_hidden_layers": 2} | ({"is_decoder": True} if architecture == "bert" else {})
    data = {"task": "causal_lm"}
    assert small_plan(architecture, config, data=data).batch.effective
    with pytest.raises(
        PlanError, match="may be missing from the loss. Nearest: loss.chunked=false"
    ):
        small_plan(architecture, config, data=data, loss={"chunked": True})
    assert small_plan("llama", {**SMALL["llama"], "pad_token_id": -1}).batch.effective
    with pytest.raises(PlanError, match="pad_token_id: -1 is not one of 2048 tokens. Nearest: 0"):
        small_plan("bert", {**BERT, "vocab_size": 2048, "pad_token_id": -1})


def test_every_architecture_without_a_pad_token_is_known() -> None:
    """Of those with a closed form, by transformers' own defaults; images have none and need none."""
    texts = set(SMALL) - set(IMAGES)
    without = {
        name
        for name in texts
        if transformers.AutoConfig.for_model(name).get_text_config().pad_token_id is None
    }
    assert without == WITHOUT_PADDING & texts


def test_a_classifier_without_a_pad_token_is_refused_by_the_plan() -> None:
    """Before the start; one row at a time needs none, and the advice works."""
    classes = {"data": {"task": "classification"}}
    with pytest.raises(PlanError, match=r"llama has none.*Nearest: model.config.pad_token_id=0"):
        small_plan("llama", SMALL["llama"], **classes)
    assert small_plan("llama", {**SMALL["llama"], "pad_token_id": 0}, **classes).batch.effective
    one = {**classes, "batch": {"per_device": 1}}
    assert small_plan("llama", SMALL["llama"], **one).batch.effective


@pytest.mark.parametrize(
    ("architecture", "config", "limit"),
    [
        ("gptj", {"n_positions": 64, "vocab_size": 300}, 64),
        ("albert", {"max_position_embeddings": 64, "vocab_size": 300}, 64),
        ("camembert", {"max_position_embeddings": 66, "vocab_size": 300}, 64),
        ("mpt", {"max_seq_len": 64, "vocab_size": 300}, 64),
    ],
)
def test_positions_of_architectures_without_a_closed_form(
    architecture: str, config: dict[str, Any], limit: int
) -> None:
    """Read from whichever field means them, after those that padding takes; the advice works."""
    task = {"task": "classification"} if architecture in ("albert", "camembert") else {}
    assert small_plan(architecture, config, data={"sequence_length": limit, **task}).batch.effective
    with pytest.raises(
        PlanError, match=f"{limit + 1} > {limit} positions.*sequence_length {limit}"
    ):
        small_plan(architecture, config, data={"sequence_length": limit + 1, **task})
