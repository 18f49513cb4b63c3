"""Names of transformers' parameters for the weights of a known shape, by architecture. Pure.

`tests/plan/test_weight_paths.py` compares every row with the model that transformers builds.
"""

from dataclasses import dataclass, field

from drumline.architectures.shapes import ModelShape, layer_tensors, outer_tensors


@dataclass(frozen=True)
class Paths:
    """Paths by the names in `outer_tensors` and `layer_tensors`.

    `layers`: how the names of a layer begin, with `{}` for its number. `layer`: paths of its modules; those
    of vectors with the parameter's name.
    """

    layers: str
    layer: dict[str, str]
    outer: dict[str, str] = field(default_factory=dict)

    def in_layer(self, number: int, name: str) -> str | None:
        """The name of a parameter of a layer, None where it is not known."""
        if name.endswith("_bias"):
            path = self.layer.get(name.removesuffix("_bias"))
            return None if path is None else f"{self.layers.format(number)}.{path}.bias"
        path = self.layer.get(name)
        if path is None:
            return None
        end = "" if name.startswith("vector_") or name.endswith("_norm") else ".weight"
        return f"{self.layers.format(number)}.{path}{end}"

    def all_names(self, shape: ModelShape) -> set[str]:
        """The names of all parameters of a model of this shape that are known."""
        shapes = [one for one, count in shape.layer_shapes for _ in range(count)]
        found = {self.outer.get(name) for name in outer_tensors(shape)}
        for number, one in enumerate(shapes):
            found |= {self.in_layer(number, name) for name in layer_tensors(one)}
        return {name for name in found if name is not None}


def _norms(*names: str) -> dict[str, str]:
    return {f"vector_{number}": f"{name}.weight" for number, name in enumerate(names)}


_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
              "out": "self_attn.o_proj", "qkv": "self_attn.qkv_proj", "q_norm": "self_attn.q_norm.weight",
              "k_norm": "self_attn.k_norm.weight"}  # fmt: skip
_FEED_FORWARD = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
                 "gate_up": "mlp.gate_up_proj"}  # fmt: skip
_OUTER = {"embedding": "model.embed_tokens.weight", "vector_0": "model.norm.weight"}
_TWO = _norms("input_layernorm", "post_attention_layernorm")
_LLAMA = Paths("model.layers.{}", {**_ATTENTION, **_FEED_FORWARD, **_TWO}, _OUTER)
_GEMMA2 = Paths(
    "model.layers.{}",
    {**_ATTENTION, **_FEED_FORWARD,
     **_norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
              "post_feedforward_layernorm")},
    _OUTER,
)  # fmt: skip
_OLMO2 = Paths(
    "model.layers.{}",
    {**_ATTENTION, **_FEED_FORWARD, **_norms("post_attention_layernorm", "post_feedforward_layernorm")},
    _OUTER,
)  # fmt: skip
_MIXTRAL = Paths("model.layers.{}", {**_ATTENTION, **_TWO, "router": "mlp.gate"}, _OUTER)
_GPT2 = Paths(
    "transformer.h.{}",
    {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    {"embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight"},
)
_BERT = Paths(
    "bert.encoder.layer.{}",
    {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
     "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
    {"embedding": "bert.embeddings.word_embeddings.weight",
     "positions": "bert.embeddings.position_embeddings.weight",
     "types": "bert.embeddings.token_type_embeddings.weight"},
)  # fmt: skip
_ROBERTA = Paths(
    "roberta.encoder.layer.{}",
    _BERT.layer,
    {name: path.replace("bert.", "roberta.", 1) for name, path in _BERT.outer.items()},
)

PATHS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3"), _LLAMA
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "olmo2": _OLMO2,
    "mixtral": _MIXTRAL,
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _ROBERTA,
}
"""By architecture; of another one the names are known only once it is built."""

_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3", "gemma2",
          "gemma3_text", "olmo2", "mixtral", "gpt2"}  # fmt: skip


def paths_of(shape: ModelShape) -> Paths | None:
    """The paths of a model of this shape; None where its architecture is not in the table."""
    found = PATHS.get(shape.architecture)
    if found is None or shape.architecture not in _HEADS:
        return found
    head = "lm_head.weight" if shape.classes is None else "score.weight"
    return Paths(found.layers, found.layer, {**found.outer, "head": head})
