"""What an adapter's names choose: refused where they choose nothing, or not what peft would adapt."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from advice import heard
from drumline.errors import PlanError
from drumline.recipe.model_section import Adapter
from drumline.train.models.adapter import adapted_layers, add_adapter
from memory.plans import SMALL


def built(architecture: str) -> Any:
    config = transformers.AutoConfig.for_model(architecture, **SMALL[architecture])
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def ends(model: nn.Module) -> set[str]:
    """Last parts of the names of the layers with an adapter, in layer 1."""
    return {n.rpartition(".")[2] for n in adapted_layers(model).values() if ".1." in n}


def test_all_linear_is_every_linear_layer_but_routers_and_experts() -> None:
    """Of a dense model all of a layer's matrices; of one with experts those of attention."""
    llama, mixtral, gpt2 = built("llama"), built("mixtral"), built("gpt2")
    for model in (llama, mixtral, gpt2):
        add_adapter(model, Adapter(rank=2), ())
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert ends(llama) == attention | {"gate_proj", "up_proj", "down_proj"}
    assert ends(mixtral) == attention
    assert ends(gpt2) == {"c_attn", "c_proj", "c_fc"}
    trained = {n.rpartition(".lora_")[2] for n, p in mixtral.named_parameters() if p.requires_grad}
    assert trained == {"A.default.weight", "B.default.weight"}


def test_names_that_peft_takes_for_experts_are_refused() -> None:
    """The feed-forward of DeepSeek's first layer: peft would adapt the experts of all others."""
    spec = Adapter(rank=2, targets=["q_b_proj", "down_proj", "up_proj", "gate_proj"])
    with pytest.raises(PlanError) as caught:
        add_adapter(built("deepseek_v3"), spec, ())
    told = heard("model.adapter.targets: peft would adapt", str(caught.value))
    advised = told.rpartition("Nearest: ")[2].split(", ")
    assert advised == ["q_b_proj"]
    model = built("deepseek_v3")
    add_adapter(model, Adapter(rank=2, targets=advised), ())
    assert ends(model) == {"q_b_proj"}


def test_a_model_without_linear_layers_is_refused() -> None:
    """all-linear finds none among the blocks; the advice names one outside of them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.register_module("_no_split", nn.Embedding(4, 3))

    bare = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(PlanError) as caught:
        add_adapter(bare, Adapter(rank=2), ())
    heard("all-linear finds no linear layer in the model's blocks", str(caught.value))
    whole = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(3, 2)))
    add_adapter(whole, Adapter(rank=2), ())
    assert list(adapted_layers(whole).values()) == ["1.0"]
