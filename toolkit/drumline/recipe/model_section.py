"""The recipe's `model` section: where the model comes from, what of it is trained, how it is computed."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from drumline.recipe.section import (
    AddedLater,
    FactoryName,
    Fraction,
    Name,
    Positive,
    Section,
    require_only,
)


class Adapter(Section):
    """LoRA (Hu et al. 2021): W·x + scale·B·A·x, where W is frozen, and A and B of `rank` are trained.

    The scale is alpha / rank, with `rslora` alpha / √rank (Kalajdzievski 2023). `dora` also trains the norm
    of every output (Liu et al. 2024). `targets`: names of linear layers, such as q_proj or
    self_attn.q_proj, or all of those in the model's layers, but for routers and experts. `train_also`:
    patterns of names of parameters that are trained whole; the head of a classifier always is.
    """

    type: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=65536)] = 8
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[Name] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_also: list[Name] = []

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.targets:
            raise ValueError("targets names no layer. Nearest: targets all-linear")
        return self


def _policy_of(value: Any) -> Any:
    """Yes and no, as other tools state it, are full and none."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class Model(Section):
    """The model; `architecture` and the fields of `config` are those of transformers.

    `quantization`: of the linear layers in the frozen layers under an adapter, in 4 or 8 bits.
    `frozen`: patterns of names of parameters that are not trained, such as `model.embed_tokens.*`.
    `neftune_alpha`: noise on the embeddings of tokens while training (Jain et al. 2023).
    `edits` are functions of the recipe's project, called with the model before random weights are drawn,
    or after pretrained ones are loaded.
    """

    source: Literal["config", "hub", "folder", "factory"]
    architecture: Name | None = None
    config: dict[str, Any] = {}
    name: Name | None = None
    path: Name | None = None
    revision: Annotated[Name | None, AddedLater()] = None
    factory: FactoryName | None = None
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    activation_checkpointing: Annotated[
        Literal["none", "full", "selective"], BeforeValidator(_policy_of)
    ] = "none"
    activation_offload: Annotated[bool, AddedLater()] = False
    sync_batchnorm: bool = False
    compile: bool = False
    frozen: Annotated[list[Name], AddedLater()] = []
    adapter: Annotated[Adapter | None, AddedLater()] = None
    quantization: Annotated[Literal["none", "nf4", "int8"], AddedLater()] = "none"
    neftune_alpha: Annotated[Positive | None, AddedLater()] = None
    edits: Annotated[list[FactoryName], AddedLater()] = []

    @model_validator(mode="after")
    def _source_has_its_key(self) -> Self:
        needed = {"config": "architecture", "hub": "name", "folder": "path", "factory": "factory"}
        require_only(self, "source", self.source, needed)
        if self.revision is not None and self.source != "hub":
            raise ValueError(
                "revision is a commit, branch or tag of the hub, and source is not hub"
            )
        if self.frozen and self.adapter:
            raise ValueError(
                "an adapter freezes all weights of the model but those under adapter.train_also. Nearest: "
                "frozen []"
            )
        if self.quantization != "none" and self.adapter is None:
            raise ValueError(
                f"quantization {self.quantization} is of frozen weights, and no adapter is trained beside "
                "them. Nearest: adapter {rank: 16}, or quantization none"
            )
        if self.adapter and self.adapter.dora and self.quantization != "none":
            raise ValueError(
                "adapter.dora needs the norms of the base's weights, which are quantized. Nearest: dora "
                "false, or quantization none"
            )
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "activation_offload keeps the inputs of checkpointed layers in host memory, and "
                "activation_checkpointing is none. Nearest: activation_checkpointing full or selective"
            )
        return self
