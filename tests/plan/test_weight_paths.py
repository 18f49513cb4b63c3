"""The names of weights that planning knows are those of the model that transformers builds."""

import pytest
import torch
import transformers

from drumline.architectures.configs import read_shape
from drumline.architectures.shapes import layer_tensors, outer_tensors
from drumline.architectures.trained import layers_of, with_trained
from drumline.architectures.weight_paths import PATHS, paths_of
from drumline.errors import PlanError
from drumline.recipe.model_section import Adapter, Model
from memory.plans import SMALL


def shape_of(architecture: str, classes: int | None = None):  # type: ignore[no-untyped-def]
    found = read_shape(architecture, SMALL[architecture], classes)
    assert not isinstance(found, str)
    return found


@pytest.mark.parametrize("architecture", PATHS)
@pytest.mark.parametrize("classes", [None, 3])
def test_every_path_is_a_parameter_of_this_shape(architecture: str, classes: int | None) -> None:
    """Every name that is known, of layers and around them, for language models and classifiers."""
    is_encoder = architecture in ("bert", "roberta")
    if (is_encoder and classes is None) or (classes and architecture == "granite"):
        pytest.skip("transformers has no such model, or an encoder is planned as a classifier")
    shape = shape_of(architecture, classes)
    config = transformers.AutoConfig.for_model(architecture, **SMALL[architecture])
    if classes:
        config.num_labels, config.pad_token_id = classes, 0
    kind = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForCausalLM  # fmt: skip
    with torch.device("meta"):
        built = kind.from_config(config)
    real = {name: tuple(p.shape) for name, p in built.named_parameters()}
    paths = paths_of(shape)
    assert paths
    seen = 0
    for name, sizes in outer_tensors(shape).items():
        if name in paths.outer:
            assert real[paths.outer[name]] == sizes
            seen += 1
    for number, (one, _) in enumerate(layers_of(shape)):
        for name, sizes in layer_tensors(one).items():
            path = paths.in_layer(number, name)
            if path is not None:
                assert real[path] == sizes, path
                seen += 1
    assert seen >= len(layer_tensors(shape)) * shape.layers / 2


def test_what_matches_nothing_is_refused_with_near_misses() -> None:
    """Where every name is known, in the plan; the nearest names are told."""
    shape = shape_of("llama")
    model = Model(source="config", architecture="llama", config=SMALL["llama"])
    for change, words in (
        ({"frozen": ["model.embed_token.*"]}, "model.frozen: 'model.embed_token.*' matches no parameter. Nearest: model.embed_tokens.weight"),
        ({"adapter": Adapter(targets=["q_prj"])}, "model.adapter.targets: no layer is called 'q_prj'. Nearest: q_proj"),
        ({"adapter": Adapter(train_also=["*nrom*"])}, "model.adapter.train_also: '*nrom*' matches no parameter"),
    ):  # fmt: skip
        with pytest.raises(PlanError) as caught:
            with_trained(shape, model.model_copy(update=change))
        assert words in str(caught.value)
