"""Tiny models of images and text with their processors, as their folders on the hub look, and chats for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "attention_dropout": 0.0}  # fmt: skip
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "attention_dropout": 0.0}  # fmt: skip
_PARTS = "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    + _PARTS
    + "{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_IMAGES_FIRST = (  # whatever their order in a message; marks what the assistant says
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{% if m.role == 'assistant' %}{% generation %}{{ p.text }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ p.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def tokenizer(*extra: str, merges: tuple[tuple[str, str], ...] = (), **named: str) -> Any:
    """A byte-level tokenizer with <|im_start|>, <|im_end|> and these special tokens."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters |= {"".join(pair): len(letters) + n for n, pair in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=letters, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *extra]})
    return found


def _llava() -> tuple[Any, Any]:
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        images, tokenizer("<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_IMAGES_FIRST,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=_CLIP, text_config={"model_type": "llama", **_TEXT},
        image_token_id=processor.image_token_id, vision_feature_layer=-1,
    )  # fmt: skip
    return processor, config


def _llava_next() -> tuple[Any, Any]:
    grids = [[28, 56], [56, 28]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grids,
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer("<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_CHATML.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config=_CLIP, text_config={"model_type": "llama", **_TEXT}, image_grid_pinpoints=grids,
        image_token_id=processor.image_token_id, vision_feature_layer=-1,
    )  # fmt: skip
    return processor, config


def _qwen() -> tuple[Any, Any]:
    kind = transformers.Qwen2_5_VLProcessor
    kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    processor = kind(
        transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=16 * 28 * 28), words, None,
        chat_template=_CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = words.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                       "fullatt_block_indexes": [1], "window_size": 56},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return processor, config


def _gemma() -> tuple[Any, Any]:
    words = tokenizer(
        "<start_of_image>", "<end_of_image>", "<image_soft_token>", boi_token="<start_of_image>",
        merges=(("\u010a", "\u010a"), ("\u010a\u010a", "\u010a")),  # of line breaks, as Gemma's has them
        eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}), words, image_seq_length=4,
        chat_template=_CHATML.replace("IMAGE", "<start_of_image>"),
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "sliding_window": 64},
        vision_config={**_CLIP, "model_type": "siglip_vision_model", "image_size": 28},
        mm_tokens_per_image=4, image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    return processor, config


def _idefics() -> tuple[Any, Any]:
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    words = tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles
    )
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    processor = transformers.Idefics3Processor(
        images, words, image_seq_len=1, chat_template=_CHATML.replace("IMAGE", "<image>")
    )
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **_TEXT, "pad_token_id": 0},
        vision_config={**_CLIP, "model_type": "idefics3_vision"}, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return processor, config


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen,
    "gemma3": _gemma,
    "idefics3": _idefics,
}


def model_folder(family: str, folder: Path) -> Path:
    """The processor and a model with random weights of a family."""
    processor, config = FAMILIES[family]()
    if getattr(processor, "video_processor", 0) is None:
        _save_as_on_the_hub(processor, folder)
    else:
        processor.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    return folder


def _save_as_on_the_hub(processor: Any, folder: Path) -> None:
    """The files of a processor of images and videos, whose videos' part needs torchvision."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    stated = {**json.loads(file.read_text()), "processor_class": type(processor).__name__}
    file.write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(processor.chat_template)


def picture(number: int) -> Image.Image:
    """An image with sides and a colour of its own."""
    draws = np.random.default_rng(number)
    shape = (40 + 8 * (number % 3), 56, 3)
    noise = draws.integers(0, 60, shape)
    noise[..., number % 3] += 180
    return Image.fromarray(noise.astype(np.uint8))


COLOURS = ("red", "green", "blue")


def chats_in(folder: Path, count: int = 24) -> Path:
    """A file of chats: most with an image or two, some without, of which several have the same one."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        own = (
            []
            if number % 6 == 5
            else [number % 9]
            if number % 4
            else [number % 9, (number + 1) % 9]
        )
        for one in own:
            picture(one).save(folder / f"pictures/{one}.png")
        asked = "<image>\n" * len(own) + (
            "which colour?" if own else "say red" + "!" * (number % 3)
        )
        said = " and ".join(COLOURS[one % 3] for one in own) or "red"
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": said},
                ],
                "images": [f"pictures/{one}.png" for one in own],
            }
        )
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
