"""torch.compile: each kind of repeated block is compiled once, and the loss of the logits; nothing else changes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

from drumline.train.compiling import compile_module
from drumline.train.objectives.base import ObjectiveModule
from drumline.train.objectives.cross_entropy import ClassCrossEntropy, TokenCrossEntropy


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(graphs: list[GraphModule]) -> Callable[..., Any]:
    """A compiler that notes its graphs and runs them as they are."""

    def backend(graph: GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def llama(chunks: int = 0) -> tuple[ObjectiveModule, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, vocab_size=64,
        use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 16))
    batch = {"input_ids": ids, "targets": ids, "weights": torch.ones(2)}
    return ObjectiveModule(LlamaForCausalLM(config), TokenCrossEntropy(chunks)), batch


def loss_and_gradients(
    module: ObjectiveModule, batch: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    loss = module(batch)[0]
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None)]  # fmt: skip


@pytest.mark.parametrize("chunks", [0, 2])
def test_five_layers_are_compiled_once(chunks: int) -> None:
    """One graph for all five, one for the loss (of each chunk); loss and gradients as without."""
    plain = loss_and_gradients(*llama(chunks))
    graphs: list[GraphModule] = []
    module, batch = llama(chunks)
    compile_module(module, backend=counting(graphs))
    compiled = loss_and_gradients(module, batch)
    assert len(graphs) == 2
    linear = [sum("linear" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert linear == [7, 0], "a layer's seven products, and no head within the loss"
    for mine, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    loss_and_gradients(module, batch)
    assert len(graphs) == 2, "nothing is compiled again"


def test_a_model_without_repeated_blocks_is_compiled_whole() -> None:
    graphs: list[GraphModule] = []
    module = ObjectiveModule(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), ClassCrossEntropy()
    )
    compile_module(module, backend=counting(graphs))
    module({"features": torch.ones(4, 8), "targets": torch.zeros(4, dtype=torch.long), "weights": torch.ones(4)})  # fmt: skip
    assert len(graphs) == 1
