"""Chats with images: the tokens and pixels are those of transformers' processors, and what cannot be right is refused."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from advice import heard
from conftest import tiny_recipe
from drumline.data.chats.template import save_template
from drumline.data.prepare import prepare
from drumline.data.processors import processor_digests, save_processor
from drumline.data.rows import Rows
from drumline.data.show import show
from drumline.data.tasks import find_task
from drumline.errors import DataError, PlanError
from drumline.recipe.data_section import Data
from drumline.recipe.load import validate
from drumline.session.prepare import prepare_data
from vision_folders import FAMILIES, chats_in, model_folder, picture, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model_folder(family, folder / family)
    chats_in(folder)
    return folder


def section(folders: Path, path: Path, family: str = "qwen2_5_vl", **keys: Any) -> Data:
    """The data section of a recipe for chats of a family's model."""
    own = str(folders / family)
    base = {"source": "files", "path": str(path), "task": "sft", "image": {"processor": own}, "tokenizer": own, "sequence_length": 200}  # fmt: skip
    return Data(**{**base, "image_field": "images", **keys})


def prepared(data: Data) -> Rows:
    return Rows(prepare(data, None), "train", find_task(data, None))


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": parts[0] if len(parts) == 1 else list(parts)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, format="PNG")
    return file.getvalue()


def answered(*parts: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [said("user", *parts), said("assistant", "red")], **columns}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_those_of_the_processor(folders: Path, family: str) -> None:
    """Its own apply_chat_template, of messages with parts, row by row and as a batch; trained are the assistant's words."""
    processor, _ = FAMILIES[family]()
    rows = prepared(section(folders, folders / "chats.jsonl", family))
    lines = [json.loads(line) for line in (folders / "chats.jsonl").read_text().splitlines()]
    types = {"mm_token_type_ids", "token_type_ids"}
    assert len(rows) == len(lines)
    for number, line in enumerate(lines):
        asked, answer = line["messages"]
        words = asked["content"].replace("<image>\n", "")
        parts = [{"type": "image"} for _ in line["images"]] + [text(words)]
        chat = [
            said("user", *parts, text("")),
            said("assistant", text(answer["content"]), text("")),
        ]
        for one in chat:
            one["content"] = [part for part in one["content"] if part.get("text") != ""]
        whole = processor.apply_chat_template(chat, tokenize=False)
        own = [picture(int(Path(name).stem)) for name in line["images"]]
        given = {"images": [own]} if own else {}
        wanted = processor(text=[whole], **given, return_tensors="np", add_special_tokens=False)
        ours = rows.collate(np.array([number]))
        ids = wanted.pop("input_ids")[0]
        assert np.array_equal(ours.pop("input_ids")[0], ids[:-1])
        targets = ours.pop("targets")[0]
        marked = processor.tokenizer.decode(targets[targets >= 0])
        assert marked == answer["content"] + "<|im_end|>"
        wanted.pop("attention_mask")
        for name in types & wanted.keys():
            assert np.array_equal(ours.pop(name), wanted.pop(name)[:, :-1])
        assert not types & ours.keys()
        assert ours.keys() == wanted.keys()
        for name, values in ours.items():
            assert np.array_equal(values, np.asarray(wanted[name])), name
    which = np.array([5, 0, 1, 11])  # without an image, with two, with one, without
    batch = rows.collate(which)
    alone = [rows.collate(which[n : n + 1]) for n in range(4)]
    features = [int(np.isin(one["input_ids"], processor.image_token_ids).sum()) for one in alone]
    assert int(np.isin(batch["input_ids"], processor.image_token_ids).sum()) == sum(features) > 0
    assert features[0] == features[3] == 0


def test_each_file_is_stored_once(folders: Path) -> None:
    rows = prepared(section(folders, folders / "chats.jsonl"))
    assert sum(map(len, rows.array("files", np.arange(len(rows))))) == 26
    assert len(rows.column("ends-file")) == 9
    stored = rows.array("file", np.arange(9))
    assert {one.tobytes() for one in stored} == {png(n) for n in range(9)}


STYLES: dict[str, dict[str, Any]] = {
    "<image> and a list": answered("<image>\n<image>\nwhich?", images=["0.png", "1.png"]),
    "a list without places": answered("which?", images=["0.png", "1.png"]),
    "parts, and a list": answered({"type": "image"}, {"type": "image"}, text("which?"), images=["0.png", "1.png"]),
    "parts with paths": answered({"type": "image", "image": "0.png"}, {"type": "image", "path": "1.png"}, text("which?")),
    "parts with addresses": answered(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"}},
        {"type": "image", "image": "1.png"},
        text("which?"),
    ),
    "some of both": answered({"type": "image", "image": "0.png"}, text("<image>which?"), images=["1.png"]),
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "<image><image>\nwhich?"},
            {"from": "gpt", "value": "red"},
        ],
        "images": ["0.png", "1.png"],
    },
    "alpaca": {"instruction": "<image><image>\nwhich?", "output": "red", "images": ["0.png", "1.png"]},
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_the_same_row(folders: Path, tmp_path: Path, style: str) -> None:
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.png")
    rows = prepared(section(folders, written(tmp_path, STYLES[style])))
    assert [one.tobytes() for one in rows.array("file", np.arange(2))] == [png(0), png(1)]
    tokens = rows.tokens(np.array([0]))[0][0]
    words = transformers.AutoTokenizer.from_pretrained(folders / "qwen2_5_vl").decode(tokens)
    assert words == (
        "<|im_start|>user\n" + ("<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>")
        + ("<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>")
        + "which?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )  # fmt: skip


def test_one_image_needs_no_list(folders: Path, tmp_path: Path) -> None:
    """As in LLaVA's data, whose column is called image."""
    picture(3).save(tmp_path / "3.png")
    row = {"conversations": [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]}  # fmt: skip
    rows = prepared(
        section(folders, written(tmp_path, {**row, "image": "3.png"}), image_field="image")
    )
    assert rows.array("file", np.array([0]))[0].tobytes() == png(3)


def test_a_chat_without_images_says_what_it_says(folders: Path, tmp_path: Path) -> None:
    """<image> there is text, as are the model's own marks."""
    picture(0).save(tmp_path / "0.png")
    words = "the tag <image>, and <|image_pad|>"
    path = written(tmp_path, answered("which?", images=["0.png"]), answered(words, images=[]))
    rows = prepared(section(folders, path))
    whole = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = rows.collate(np.array([1]))["input_ids"][0]
    assert words in whole.decode(ids)
    assert whole.convert_tokens_to_ids("<|image_pad|>") not in ids


def test_a_chat_whose_images_do_not_fit_is_left_out(folders: Path, tmp_path: Path) -> None:
    """A part of an image is none; a long answer is cut as in any chat."""
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    fits = answered("which?", images=["0.png"])
    long = {"messages": [said("user", "which?"), said("assistant", "red " * 90)], "images": ["0.png"]}  # fmt: skip
    rows = prepared(section(folders, written(tmp_path, fits, answered("which? " * 20 + "<image>", images=["0.png"]), long), sequence_length=64))  # fmt: skip
    assert (len(rows), rows.manifest.dropped, rows.manifest.truncated) == (2, 1, 2)
    assert rows.tokens(np.array([1]))[0].shape == (1, 65)


def test_an_image_that_ends_at_the_last_token_does_not_fit(folders: Path, tmp_path: Path) -> None:
    """The last token is a target only, so its feature would be missing."""
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    messages = [said("user", "<image>a?"), said("assistant", "red"), said("user", "<image>b?"), said("assistant", "green")]  # fmt: skip
    row = {"messages": messages, "images": ["0.png", "1.png"]}
    path = written(tmp_path, answered("which?", images=["0.png"]), row)
    ids = prepared(section(folders, path)).tokens(np.array([1]))[0][0]
    last = int(np.flatnonzero(ids == ids[np.isin(ids, [260, 261])][0])[-1])
    assert len(prepared(section(folders, path, sequence_length=last))) == 1
    assert len(prepared(section(folders, path, sequence_length=last + 1))) == 2


def test_images_stand_where_they_are_named(folders: Path, tmp_path: Path) -> None:
    """By their index; lines of their own go at the beginning and end of a message, and stay within it."""
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    own = {"images": ["0.png", "1.png"]}
    turned = answered(
        {"type": "image", "index": 1}, {"type": "image", "index": 0}, text("?"), **own
    )
    within = answered("One:\n<image>\nand:\n<image>\nalike?\n", **own)
    ends = answered("<image>\nalike?\n<image>", **own)
    rows = prepared(section(folders, written(tmp_path, turned, within, ends)))
    whole = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    said_by = [
        whole.decode(rows.tokens(np.array([n]))[0][0]).replace("<|image_pad|>", "")
        for n in range(3)
    ]
    pixels = rows.collate(np.array([0]))["image_grid_thw"]
    assert pixels.tolist() == rows.collate(np.array([1]))["image_grid_thw"].tolist()[::-1]
    mark = "<|vision_start|><|vision_end|>"
    assert f"One:\n{mark}\nand:\n{mark}\nalike?\n" in said_by[1]
    assert f"user\n{mark}alike?{mark}<|im_end|>" in said_by[2]


def test_a_turned_picture_is_as_wide_as_it_stands(folders: Path, tmp_path: Path) -> None:
    """A TIFF whose orientation Pillow follows when it opens the file, and a JPEG whose it does not."""
    upright = picture(0).resize((28, 84))
    upright.save(tmp_path / "up.png")
    exif = upright.getexif()
    exif[0x0112] = 6
    for name in ("t.tiff", "t.jpg"):
        upright.transpose(2).save(tmp_path / name, exif=exif)
    path = written(
        tmp_path, *(answered("which?", images=[name]) for name in ("t.tiff", "t.jpg", "up.png"))
    )
    rows = prepared(section(folders, path, "llava_next"))
    processor, _ = FAMILIES["llava_next"]()
    for number, name in enumerate(("t.tiff", "t.jpg", "up.png")):
        image = transformers.image_utils.load_image(str(tmp_path / name))
        wanted = processor(images=[[image]], return_tensors="np")
        batch = rows.collate(np.array([number]))
        assert batch["image_sizes"].tolist() == wanted["image_sizes"].tolist() == [[84, 28]]
        assert np.array_equal(batch["pixel_values"], wanted["pixel_values"])
        (replaced,) = processor(
            text=["<image>"], images=[[image]], return_text_replacement_offsets=True
        )["text_replacement_offsets"][0]
        assert (batch["input_ids"] == 259).sum() == replaced["replacement"].count("<image>")


@pytest.mark.parametrize("style", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_templates_that_take_texts_for_some_messages(
    folders: Path, style: str, tmp_path: Path
) -> None:
    """A list of parts is not printed as Python would."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}{% for p in m.content %}"
        "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{% else %}" + style + "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    picture(0).save(tmp_path / "0.png")
    path = written(tmp_path, answered("which?", images=["0.png"]))
    rows = prepared(section(folders, path, chat_template=str(template)))
    targets = rows.collate(np.array([0]))["targets"][0]
    whole = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    assert whole.decode(targets[targets >= 0]) == "red<|im_end|>"


def test_another_tokenizer_is_not_skipped_row_by_row(folders: Path) -> None:
    data = section(folders, folders / "chats.jsonl", "llava", tokenizer=str(folders / "gemma3"), on_bad_row="skip")  # fmt: skip
    with pytest.raises(DataError, match="its own tokenizer makes"):
        prepared(data)


def test_a_replaced_file_is_noticed(folders: Path, tmp_path: Path) -> None:
    """By its size and time; files that are gone are kept."""
    picture(0).save(tmp_path / "0.png")
    data = section(folders, written(tmp_path, answered("which?", images=["0.png"])))
    first = prepared(data).manifest.fingerprint
    picture(1).save(tmp_path / "0.png")
    assert prepared(data).manifest.fingerprint != first
    assert prepared(data).array("file", np.array([0]))[0].tobytes() == png(1)
    (tmp_path / "0.png").unlink()
    assert prepared(data).array("file", np.array([0]))[0].tobytes() == png(1)


def test_chats_within_other_columns(folders: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    row = answered({"type": "image", "image": "0.png"}, text("which?"))
    path = written(tmp_path, {"chat": row})
    rows = prepared(section(folders, path, image_field=None, messages_field="chat.messages"))
    assert rows.array("file", np.array([0]))[0].tobytes() == png(0)


def test_an_export_has_the_options_and_the_template(folders: Path, tmp_path: Path) -> None:
    """What a chat was trained with, not what the processor's folder says."""
    options = {"size": {"longest_edge": 784, "shortest_edge": 784}}
    for family, file in (
        ("qwen2_5_vl", "preprocessor_config.json"),
        ("llava", "processor_config.json"),
    ):
        target = tmp_path / family
        target.mkdir()
        data = section(folders, folders / "chats.jsonl", family, image={"processor": str(folders / family), "options": options})  # fmt: skip
        save_processor(data, target)
        config = json.loads((target / file).read_text())
        assert config.get("image_processor", config)["size"] == options["size"]
        save_template(str(plain(folders)), target)
        assert "eos_token" in (target / "chat_template.jinja").read_text()


def test_a_model_that_looks_for_another_token(folders: Path, tmp_path: Path) -> None:
    """It would fail at its first image."""
    wrong = tmp_path / "wrong"
    shutil.copytree(folders / "llava", wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(
        json.dumps({**config, "image_token_id": 100, "image_token_index": 100})
    )
    own = str(wrong)
    recipe = validate(tiny_recipe(
        model={"source": "folder", "path": own, "factory": None, "config": {}},
        data={"source": "files", "name": None, "path": str(folders / "chats.jsonl"), "task": "sft", "image_field": "images",
              "image": {"processor": own}, "tokenizer": own, "sequence_length": 99, "samples": None},
    ), "r")  # fmt: skip
    with pytest.raises(PlanError) as error:
        prepare_data(recipe)
    assert heard("Nearest: data.image.processor, the folder of this model", str(error.value))


def test_rows_are_shown_with_their_images(folders: Path) -> None:
    shown = show(section(folders, folders / "chats.jsonl"), None, 2)
    rows = list(shown.rows)
    assert rows[1].pieces[0][0].count("<|image_pad|>") == 4
    assert rows[1].pieces[1] == ("green<|im_end|>", True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fewer places": (answered("<image>which?", images=["0.png", "0.png"]), "2 images, and 1 places for them"),
    "more places": (answered("<image><image>which?", images=["0.png"]), "1 images, and 2 places for them"),
    "no image for a part": (answered({"type": "image"}, text("which?")), "0 images, and 1 places for them"),
    "no such file": (answered("which?", images=["none.png"]), "No such file"),
    "no image": (answered("which?", images=["rows-0.jsonl"]), "no image that can be read"),
    "half an image": (answered("which?", images=["half.png"]), "no image that can be read"),
    "bad base64": (answered("which?", images=["data:image/png;base64,%"]), "no image that can be read"),
    "a part that is not followed": (answered({"type": "image", "base64": "AAAA"}, text("which?")), "base64: 'AAAA', which is not followed"),
    "numbers that do not fit": (answered({"type": "image", "index": 1}, text("which?"), images=["0.png", "0.png"]), "parts with the index 1"),
    "no text": (answered(text("so"), {"type": "text", "text": None}, images=["0.png"]), "a part of type text holds None"),
    "the assistant's": ({"messages": [said("user", "draw"), said("assistant", {"type": "image", "image": "0.png"}, text("so"))]},
                        "message 2 (assistant): an image"),
    "a private letter": (answered("which \ue0ff?", images=["0.png"]), "private letter"),
    "a video": (answered({"type": "video", "video": "0.png"}, text("which?")), "is no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(folders: Path, tmp_path: Path, name: str) -> None:
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "half.png").write_bytes(png(0)[:900])
    row, words = WRONG[name]
    with pytest.raises(DataError) as error:
        prepared(section(folders, written(tmp_path, row)))
    assert "line 1" in str(error.value)
    assert words in str(error.value)


def test_images_of_the_web_are_not_fetched(folders: Path, tmp_path: Path) -> None:
    path = written(tmp_path, answered("which?", images=["https://x/0.png"]))
    with pytest.raises(DataError) as error:
        prepared(section(folders, path))
    assert heard("addresses are not fetched. Nearest: download the files", str(error.value))


def test_what_a_part_says_beside_its_image(folders: Path, tmp_path: Path) -> None:
    path = written(tmp_path, answered({"type": "image", "base64": "AAAA"}, text("which?")))
    with pytest.raises(DataError) as error:
        prepared(section(folders, path))
    heard("which is not followed. Nearest: image, the path of its file", str(error.value))


def test_a_column_of_another_name_is_noticed(folders: Path, tmp_path: Path) -> None:
    """Else <image> would be trained as text, or chats without their images."""
    picture(0).save(tmp_path / "0.png")
    path = written(tmp_path, answered("<image>which?", images=["0.png"]))
    for field in ("image", None):
        with pytest.raises(DataError) as error:
            prepared(section(folders, path, image_field=field))
        assert heard("Nearest: the column with its images", str(error.value))
    path = written(tmp_path, answered("which?", images=["0.png"]))
    with pytest.raises(DataError) as error:
        prepared(section(folders, path, image_field="image"))
    assert heard("no training row has an image", str(error.value))


def test_rows_that_have_no_place(folders: Path, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "which?", "completion": "red", "images": []})
    with pytest.raises(DataError) as error:
        prepared(section(folders, path))
    assert heard("Nearest: a column messages", str(error.value))


def test_chats_of_a_model_of_text_refuse_images(folders: Path, tmp_path: Path) -> None:
    path = written(tmp_path, answered({"type": "image", "image": "0.png"}, text("which?")))
    data = Data(source="files", path=str(path), task="sft", tokenizer=str(folders / "llava"), sequence_length=64)  # fmt: skip
    with pytest.raises(DataError) as error:
        prepared(data)
    assert heard("an image is no text. Nearest: data.image", str(error.value))


def test_a_processor_of_other_words(folders: Path) -> None:
    """Its tokenizer must be the one that rows are tokenised with, and it must read texts."""
    data = section(folders, folders / "chats.jsonl", "llava", tokenizer=str(folders / "gemma3"))
    with pytest.raises(DataError) as error:
        prepared(data)
    assert heard("Nearest: data.tokenizer, the processor's folder", str(error.value))
    alone = folders / "alone"
    transformers.ViTImageProcessor().save_pretrained(alone)
    with pytest.raises(DataError) as error:
        prepared(
            section(folders, folders / "chats.jsonl", "llava", image={"processor": str(alone)})
        )
    assert "state no processor_class" in str(error.value)
    with pytest.raises(DataError) as error:
        prepared(section(folders, folders / "chats.jsonl", image={"processor": str(folders)}))
    assert heard("Nearest: the folder of the model that reads the images", str(error.value))
    with pytest.raises(DataError) as error:
        prepared(section(folders, folders / "chats.jsonl", chat_template_options={}, chat_template=str(plain(folders))))  # fmt: skip
    assert heard("Nearest: the processor's own data.chat_template", str(error.value))


def plain(folder: Path) -> Path:
    """A template that loses the images."""
    path = folder / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    return path


def test_options_of_the_processor_are_part_of_the_data(folders: Path) -> None:
    """They change the tokens, and the pixels of the same tokens."""
    path = folders / "chats.jsonl"
    small = section(folders, path, image={"processor": str(folders / "qwen2_5_vl"), "options": {"size": {"longest_edge": 784, "shortest_edge": 784}}})  # fmt: skip
    usual = section(folders, path)
    found = [prepared(data) for data in (small, usual)]
    assert found[0].manifest.fingerprint != found[1].manifest.fingerprint
    assert found[0].collate(np.array([1]))["pixel_values"].shape == (4, 1176)
    assert found[1].collate(np.array([1]))["pixel_values"].shape == (16, 1176)
    assert processor_digests(small) != processor_digests(usual)
    for options, words in (
        ({"size": 3}, "it refuses"),
        ({"max_pixles": 784}, "Nearest: max_pixels"),
        ({"images": []}, "the rows give it. Nearest: leave it out"),
    ):
        with pytest.raises(DataError) as error:
            prepared(section(folders, path, image={"processor": str(folders / "qwen2_5_vl"), "options": options}))  # fmt: skip
        assert words in str(error.value)
    assert heard("the rows give it. Nearest: leave it out", str(error.value))


def test_an_option_that_the_processor_lacks(folders: Path) -> None:
    own = {"processor": str(folders / "qwen2_5_vl"), "options": {"max_pixles": 784}}
    with pytest.raises(DataError) as error:
        prepared(section(folders, folders / "chats.jsonl", image=own))
    assert heard(" has no such option. Nearest: max_pixels", str(error.value))
