"""Images: where rows come from, what is refused, and that pixels follow from the sample's seed alone."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as Pillow
from pyarrow import parquet
from transformers import ConvNextImageProcessor, ViTImageProcessor

from advice import heard
from data.made_images import CLASSES, picture, write_classes
from drumline.data.images import pipeline
from drumline.data.prepare import prepare
from drumline.data.rand_augment import OPERATIONS
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.errors import DataError
from drumline.plan.order import draw_seeds
from drumline.recipe.data_section import Data
from drumline.recipe.image_section import Image


def section(path: Path | str, **keys: Any) -> Data:
    base = {"source": "files", "path": str(path), "task": "classification", "image_field": "image", "image": {"size": 24}}  # fmt: skip
    return Data.model_validate({**base, **keys})


def rows_of(data: Data, part: str = "train", project: str | None = None) -> Rows:
    return Rows(prepare(data, project), part, find_task(data, project))


def collated(rows: Rows, epoch: int = 0) -> dict[str, Any]:
    indices = np.arange(len(rows))
    return rows.collate(indices, draw_seeds(3, indices + epoch * len(rows)))


def test_a_folder_of_classes(tmp_path: Path) -> None:
    """Classes are numbered by name; an evaluation set that lacks one has the same numbers."""
    train = write_classes(tmp_path / "train", 4)
    val = write_classes(tmp_path / "val", 2, ("dogs", "owls"))
    data = section(train, evaluation={"source": "files", "path": str(val)})
    rows = rows_of(data)
    assert rows.manifest.class_names == list(CLASSES)
    assert rows.manifest.feature_shape == [3, 24, 24]
    assert (rows.manifest.classes, len(rows)) == (3, 12)
    assert collated(rows)["targets"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    other = rows_of(data, "evaluation-evaluation")
    assert collated(other)["targets"].tolist() == [1, 1, 2, 2]


def test_a_class_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    """By name, with the set."""
    train = write_classes(tmp_path / "train", 2, ("cats", "dogs"))
    val = write_classes(tmp_path / "val", 2, ("owls",))
    with pytest.raises(
        DataError, match=r"data.evaluation: .*'owls' is none of the classes cats, dogs"
    ):
        prepare(section(train, evaluation={"source": "files", "path": str(val)}), None)


def file_of(image: Pillow.Image, kind: str) -> bytes:
    raw = io.BytesIO()
    image.save(raw, format=kind)
    return raw.getvalue()


def test_tables_and_parquet_name_the_same_images(tmp_path: Path) -> None:
    """Paths are relative to the table; Parquet has the bytes, as the hub's files do; classes by number or name."""
    folder = write_classes(tmp_path / "pictures", 3)
    files = sorted(folder.rglob("*.*"))
    names = [str(path.relative_to(tmp_path)) for path in files]
    labels = [CLASSES.index(path.parent.name) for path in files]
    table = tmp_path / "rows.csv"
    table.write_text("image,label\n" + "".join(f"{n},{label}\n" for n, label in zip(names, labels, strict=True)))  # fmt: skip
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"image": n, "label": CLASSES[label]}) + "\n" for n, label in zip(names, labels, strict=True)))  # fmt: skip
    stored = pa.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
            "label": labels,
        }
    )
    parquet.write_table(stored, tmp_path / "rows.parquet")
    whole = collated(rows_of(section(folder)))
    for path, more in (
        (table, {}),
        (lines, {"label_names": list(CLASSES)}),
        (tmp_path / "rows.parquet", {}),
    ):
        found = collated(rows_of(section(path, **more)))
        assert np.array_equal(found["features"], whole["features"]), path
        assert np.array_equal(found["targets"], whole["targets"]), path


def deep_colours() -> bytes:
    """A PNG with 16 bits in each of three channels, which Pillow does not write."""
    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    found = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        found += struct.pack(">I", len(body)) + kind + body
        found += struct.pack(">I", zlib.crc32(kind + body))
    return found


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (file_of(picture(1, 0), "JPEG")[:-300], "no image that can be read"),
        (file_of(picture(1, 0), "PNG")[:-40], "no image that can be read"),
        (b"text", "no image that can be read"),
        (b"", "no image that can be read"),
        (file_of(Pillow.fromarray(np.zeros((9, 9), dtype=np.uint16)), "PNG"), "with more than 8 bits a channel"),
        (deep_colours(), "with more than 8 bits a channel"),
    ],
    ids=["cut jpeg", "cut png", "text", "empty", "16 bits", "3 x 16 bits"],
)  # fmt: skip
def test_what_is_no_image_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    """Before anything starts, with the file; a row like this can be skipped."""
    folder = write_classes(tmp_path / "train", 3)
    bad = folder / "cats" / "zzz.png"
    bad.write_bytes(raw)
    if raw:
        with pytest.raises(DataError, match=words) as caught:
            prepare(section(folder), None)
        assert str(bad) in str(caught.value)
        rows = rows_of(section(folder, on_bad_row="skip"))
        assert (len(rows), rows.manifest.skipped) == (9, 1)
    else:
        with pytest.raises(DataError, match=r"zzz.png is empty \(0 bytes\)"):
            prepare(section(folder), None)


def test_deep_images_can_be_saved_anew(tmp_path: Path) -> None:
    """With 8 bits, as the message says."""
    folder = write_classes(tmp_path / "train", 2)
    deep = folder / "cats" / "deep.png"
    Pillow.fromarray(np.full((30, 30), 40_000, dtype=np.uint16)).save(deep)
    with pytest.raises(DataError) as caught:
        prepare(section(folder), None)
    heard("which converting would clip. Nearest: save it with 8 bits a channel", str(caught.value))
    Pillow.fromarray(np.full((30, 30), 156, dtype=np.uint8)).save(deep)
    assert len(rows_of(section(folder))) == 7


def test_an_image_outside_of_classes_is_refused(tmp_path: Path) -> None:
    """And is a row once it lies in a folder."""
    folder = write_classes(tmp_path / "train", 2)
    picture(3, 1).save(folder / "alone.png")
    with pytest.raises(DataError) as caught:
        prepare(section(folder), None)
    heard("lies in no folder of a class", str(caught.value))
    (folder / "alone.png").rename(folder / "dogs" / "alone.png")
    assert len(rows_of(section(folder))) == 7


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 0}, "no column 'image'; this row has: label"),
        ({"image": "gone.png", "label": 0}, "gone.png: No such file"),
        ({"image": 5, "label": 0}, "int 5 is no file of an image"),
    ],
    ids=str,
)
def test_a_row_without_an_image_is_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    """With line and path."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"line 1: .*{words}"):
        prepare(section(path), None)


EVERYTHING = {
    "size": [20, 28],
    "scale": [0.3, 1.0],
    "jitter": 0.4,
    "erase": 0.5,
    "rand_augment": {"operations": 3},
}


def test_pixels_follow_from_the_seed(tmp_path: Path) -> None:
    """One by one or together the same; another epoch's are others; evaluation draws nothing."""
    folder = write_classes(tmp_path / "train", 5)
    data = section(folder, image=EVERYTHING, evaluation={"source": "files", "path": str(folder)})
    rows = rows_of(data)
    whole = collated(rows)
    assert whole["features"].shape == (15, 3, 20, 28)
    seeds = draw_seeds(3, np.arange(15))
    for place in range(15):
        one = rows.collate(np.array([place]), seeds[place : place + 1])
        assert np.array_equal(one["features"][0], whole["features"][place])
    assert (
        np.abs(collated(rows, epoch=1)["features"] - whole["features"]).max(axis=(1, 2, 3)) > 0.1
    ).all()
    still = rows_of(data, "evaluation-evaluation")
    assert np.array_equal(collated(still)["features"], collated(still, epoch=1)["features"])


def test_a_processor_without_a_size_needs_one(tmp_path: Path) -> None:
    """Stated beside it, as the message says."""
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5]}'
    )
    with pytest.raises(DataError) as caught:
        pipeline(Image.model_validate({"processor": str(tmp_path)}), None)
    heard("states no size. Nearest: data.image.size=224", str(caught.value))
    made = pipeline(Image.model_validate({"processor": str(tmp_path), "size": 224}), None)
    assert made.shape == [3, 224, 224]
    assert made.mean.ravel().tolist() == [0.5] * 3


@pytest.mark.parametrize("resample", [2, 3])
def test_evaluation_is_what_the_model_s_processor_does(tmp_path: Path, resample: int) -> None:
    """Size, mean, std and interpolation of a preprocessor_config.json, to a grey level or so of 255."""
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.5], resample=resample)  # fmt: skip
    processor.save_pretrained(tmp_path / "model")
    made = pipeline(Image.model_validate({"processor": str(tmp_path / "model")}), None)
    assert made.shape == [3, 24, 24]
    for number in range(6):
        image = picture(number, number % 3)
        found = made.pixels(file_of(image, "PNG"), 0, is_trained=False)
        (wanted,) = processor(image, return_tensors="np")["pixel_values"]
        assert np.abs(found - wanted).max() <= 1.01 / 255 / 0.2


@pytest.mark.parametrize("edge", [56, 384])
def test_convnext_resizes_large_images_otherwise(edge: int, tmp_path: Path) -> None:
    """From 384 pixels on, its processor resizes both sides and cuts nothing off."""
    processor = ConvNextImageProcessor(size={"shortest_edge": edge}, crop_pct=0.875)
    processor.save_pretrained(tmp_path)
    made = pipeline(Image.model_validate({"processor": str(tmp_path)}), None)
    image = picture(1, 1).resize((90, 60))
    (wanted,) = processor(image, return_tensors="np")["pixel_values"]
    found = made.pixels(file_of(image, "PNG"), 0, is_trained=False)
    assert np.abs(found - wanted).max() <= 2.01 / 255 / 0.22


VIT = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}


def made_by(folder: Path, config: dict[str, Any], **stated: Any) -> Any:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return pipeline(Image.model_validate({"processor": str(folder), **stated}), None)


def refused(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        made_by(folder, {**VIT, **config})
    return str(caught.value)


def test_a_processor_that_is_not_followed_is_refused(tmp_path: Path) -> None:
    """Whatever changes pixels in another way; what the recipe states instead is taken."""
    own = "is not followed here. Nearest: data.image.transform, a function of your own"
    heard("is not followed here. Nearest: data.image.transform, a function of your own", refused(tmp_path, {"do_flip_channel_order": True}))  # fmt: skip
    for odd in ({"include_top": True}, {"do_pad": True}, {"do_thumbnail": True}):
        assert own in refused(tmp_path, odd)
    assert made_by(tmp_path, {**VIT, "do_pad": False}).shape == [3, 24, 24]
    for scale in ({"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        heard("and not 1/255. Nearest: data.image.transform, a function of your own", refused(tmp_path, scale))  # fmt: skip
    assert made_by(tmp_path, {**VIT, "rescale_factor": 0.00392156862745098}).height == 24
    heard("is not stated. Nearest: data.image.mean=[0.5]", refused(tmp_path, {"image_mean": None}))
    assert made_by(tmp_path, {**VIT, "image_mean": None}, mean=[0.5]).mean.tolist() == [[[0.5]]] * 3
    heard("leaves images of any size. Nearest: data.image.size=224", refused(tmp_path, {"do_resize": False}))  # fmt: skip
    crop = {"do_center_crop": True, "crop_size": 20}
    heard("size has a height, before a crop. Nearest: data.image.size=224", refused(tmp_path, crop))
    edge = {"size": {"shortest_edge": 30}}
    heard("keeps the shape of each image, and a batch has one size. Nearest: data.image.size=30", refused(tmp_path, edge))  # fmt: skip
    for config, size in ((crop, 224), (edge, 30), ({"do_resize": False}, 224)):
        assert made_by(tmp_path, {**VIT, **config}, size=size).shape == [3, size, size]


def test_a_processor_need_not_normalise(tmp_path: Path) -> None:
    """Pixels are then from 0 to 1."""
    made = made_by(tmp_path, {**VIT, "do_normalize": False})
    image = Pillow.new("RGB", (30, 30), (255, 0, 51))
    pixels = made.pixels(file_of(image, "PNG"), 0, is_trained=False)
    assert pixels[:, 3, 3] == pytest.approx([1.0, 0.0, 0.2])


def test_another_processor_makes_other_data(tmp_path: Path) -> None:
    """What it states is part of the fingerprint, which a resume and a reproduction compare."""
    folder, found = write_classes(tmp_path / "train", 2), []
    for mean in (0.5, 0.6):
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({**VIT, "image_mean": [mean] * 3})
        )
        rows = rows_of(section(folder, image={"processor": str(tmp_path)}))
        found.append((rows.manifest.fingerprint, rows.manifest.rows))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_one_class_is_refused(tmp_path: Path) -> None:
    """A second folder makes two."""
    folder = write_classes(tmp_path / "train", 2)
    others = [one for one in folder.iterdir() if one.name != "cats"]
    for number, other in enumerate(others):
        other.rename(tmp_path / str(number))
    with pytest.raises(DataError) as caught:
        prepare(section(folder), None)
    heard("so nothing can be learnt. Nearest: a folder for each class", str(caught.value))
    (tmp_path / "0").rename(folder / others[0].name)
    assert len(rows_of(section(folder))) == 4


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    """The shorter side becomes `resize`, by default 8 / 7 of the size; crop none keeps all."""
    image = Pillow.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 32, axis=0).repeat(3, axis=2))  # fmt: skip
    stated = {"size": 16, "mean": [0.0], "std": [1.0], "interpolation": "nearest"}
    spans = {}
    for name, more in {"default": {}, "all": {"crop": "none"}, "resize": {"resize": 16}}.items():
        made = pipeline(Image.model_validate({**stated, **more}), None)
        row = made.pixels(file_of(image, "PNG"), 0, is_trained=False)[0, 0] * 255
        spans[name] = float(row[-1] - row[0])
    assert spans["all"] == pytest.approx(240, abs=8)
    assert spans["resize"] == pytest.approx(120, abs=10)
    assert spans["default"] == pytest.approx(107, abs=10)


def test_phone_pictures_stand_upright() -> None:
    """By the orientation in the file, as `datasets` does."""
    image = Pillow.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8).repeat(8, 0).repeat(8, 1))  # fmt: skip
    exif = Pillow.Exif()
    exif[0x0112] = 6
    raw = io.BytesIO()
    image.save(raw, format="PNG", exif=exif)
    made = pipeline(Image.model_validate({"size": 8, "crop": "none", "mean": [0.0], "std": [1.0]}), None)  # fmt: skip
    red = made.pixels(raw.getvalue(), 0, is_trained=False)[0]
    assert red[:3].min() > 0.9
    assert red[-3:].max() < 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_keeps_the_size(name: str) -> None:
    """At full strength in both directions; all but those that this picture is blind to change it."""
    image = picture(4, 1)
    for strength in (-1.0, 1.0):
        found = OPERATIONS[name](image, strength)
        assert found.size == image.size
        if name not in ("identity", "autocontrast"):
            assert np.asarray(found).tobytes() != np.asarray(image).tobytes()


TRANSFORM = """
import random
import numpy as np
import torch


def noise(image, rng, is_trained, strength=1.0):
    values = np.asarray(image.resize((24, 24)), dtype=np.float32).transpose(2, 0, 1) / 255
    if is_trained:
        values = values + strength * (rng.random() + random.random() + np.random.random() + float(torch.rand(())))
    return values


def wrong(image, rng, is_trained):
    return np.zeros((3, 5, 5))
"""


def test_a_transform_of_the_project(tmp_path: Path) -> None:
    """Whatever generator it draws from is seeded by the sample; its shape must be the stated one."""
    (tmp_path / "mine.py").write_text(TRANSFORM)
    folder = write_classes(tmp_path / "train", 2)
    spec = {"size": 24, "transform": "mine:noise", "options": {"strength": 2.0}}
    rows = rows_of(section(folder, image=spec), project=str(tmp_path))
    first, again = collated(rows)["features"], collated(rows)["features"]
    assert np.array_equal(first, again)
    assert len({float(one.mean()) for one in first}) == 6
    wrong = section(folder, image={"size": 24, "transform": "mine:wrong"})
    with pytest.raises(DataError, match=r"mine:wrong made an array of shape \[3, 5, 5\]"):
        collated(rows_of(wrong, project=str(tmp_path)))
