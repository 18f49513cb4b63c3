"""Builtin data: the Python standard library's source, and small synthetic rows of each kind."""

import io
import platform
import sysconfig
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from drumline.data.source_row import SourceRow
from drumline.errors import DataError

BLOCK_CHARACTERS = 1 << 22
"""Longer texts are read and tokenised in blocks of about this many characters, so memory stays flat."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def label(name: str) -> str:
    """Prefix of the fingerprint; for `python-stdlib` it contains the Python version."""
    if name == "python-stdlib":
        return f"{platform.python_implementation().lower()}-{platform.python_version()}"
    return name


def documents(name: str, options: dict[str, Any]) -> Iterator[SourceRow]:
    """The rows of a builtin source, with a field text, or features and label."""
    if name not in BUILTIN:
        raise DataError(f"data.name: {name!r} is not builtin. Known: {', '.join(BUILTIN)}")
    try:
        yield from BUILTIN[name](**options)
    except (TypeError, ValueError) as error:
        raise DataError(f"data.options: {options} do not suit {name}: {error}") from None


def python_stdlib(max_files: int | None = None) -> Iterator[SourceRow]:
    """The text of the installed Python's standard library, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    for path in files[:max_files]:
        where = str(path.relative_to(root))
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from text_blocks(io.StringIO(text, newline=""), where)


def text_blocks(file: IO[str], where: str) -> Iterator[SourceRow]:
    """One document in blocks, of which the last one ends it; they are cut where a line ends.

    Nothing for an empty file.
    """
    rest, is_empty = "", True
    while piece := file.read(BLOCK_CHARACTERS):
        rest, is_empty = rest + piece, False
        if len(piece) < BLOCK_CHARACTERS:
            break
        cut = rest.rfind("\n") + 1 or len(rest)
        yield SourceRow({"text": rest[:cut]}, where, ends=False)
        rest = rest[cut:]
    if not is_empty:
        yield SourceRow({"text": rest}, where)


def synthetic_classification(
    rows: int = 12_500, features: int = 32, classes: int = 10
) -> Iterator[SourceRow]:
    """Gaussian clouds, two per class, from a fixed seed: features, float32 [features], and label."""
    rng = np.random.Generator(np.random.Philox(20_26))
    centres = rng.normal(0.0, 1.2, size=(2 * classes, features))
    for start in range(0, rows, 1000):
        count = min(1000, rows - start)
        cloud = rng.integers(0, 2 * classes, size=count)
        values = (centres[cloud] + rng.normal(size=(count, features))).astype(np.float32)
        for number, (value, which) in enumerate(
            zip(values, cloud % classes, strict=True), start + 1
        ):
            yield SourceRow({"features": value, "label": int(which)}, f"row {number:,}")


_ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant", "elk", "pig")
_COLOURS = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")


def synthetic_chats(rows: int = 400) -> Iterator[SourceRow]:
    """Conversations of one to three questions about sums, animals and colours: a field messages."""
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_26, number]))
        messages = [{"role": "system", "content": "Answer in one sentence."}] if number % 3 else []
        for _ in range(1 + number % 3):
            one, other = (int(n) for n in rng.integers(0, 20, size=2))
            animal, colour = rng.choice(_ANIMALS), rng.choice(_COLOURS)
            asked, answer = (
                (f"What is {one} + {other}?", f"It is {one + other}."),
                (f"My {animal} is {colour}. What is it?", f"It is a {colour} {animal}."),
            )[int(rng.integers(0, 2))]
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
        yield SourceRow({"messages": messages}, f"row {number + 1:,}")


_THINGS = ("film", "book", "meal", "room", "phone", "train", "song", "chair", "lamp", "coat")
_PRAISE = ("lovely", "brilliant", "splendid", "excellent", "wonderful", "charming")
_COMPLAINT = ("dreadful", "boring", "awful", "broken", "terrible", "dirty")
_NEUTRAL = ("new", "old", "large", "small", "usual", "third")


def synthetic_reviews(rows: int = 2000) -> Iterator[SourceRow]:
    """One or two sentences about things.

    Fields: text; label, 1 for praise and 0 for complaint; stars, from 1.0 to 5.0; aspects: 0
    for praise, 1 for complaint, 2 if it is strong.
    """
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_27, number]))
        kind = int(rng.integers(0, 2))
        thing, other = rng.choice(_THINGS, size=2, replace=False)
        words = _PRAISE if kind else _COMPLAINT
        word = rng.choice(words)
        stars = 3.0 * kind + 1.0 + words.index(word) % 3 / 2
        text = f"The {rng.choice(_NEUTRAL)} {thing} was {word}."
        if rng.integers(0, 2):
            text += f" I saw the {rng.choice(_NEUTRAL)} {other} first."
        aspects = [0 if kind else 1, *([2] if words.index(word) % 3 == 2 else [])]
        fields = {"text": text, "label": kind, "stars": stars, "aspects": aspects}
        yield SourceRow(fields, f"row {number + 1:,}")


_POLITE = ("Certainly", "Of course", "Gladly")
_RUDE = ("Why should I care", "Go away", "Who knows")


def synthetic_preferences(rows: int = 600, labelled: bool = False) -> Iterator[SourceRow]:
    """Questions about sums and colours with a polite, right answer and a rude, wrong one.

    Fields: prompt, chosen and rejected; `labelled`: prompt, completion and label, true if it is polite.
    """
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_28, number]))
        one, other = (int(n) for n in rng.integers(0, 20, size=2))
        animal, colour, wrong = rng.choice(_ANIMALS), *rng.choice(_COLOURS, 2, replace=False)
        asked, right, false = (
            (f"What is {one} + {other}?", f"it is {one + other}.", f"it is {one + other + 1}."),
            (f"My {animal} is {colour}. What is it?", f"it is {colour}.", f"it is {wrong}."),
        )[int(rng.integers(0, 2))]
        good, bad = f" {rng.choice(_POLITE)}, {right}", f" {rng.choice(_RUDE)}, {false}"
        fields: dict[str, Any] = {"prompt": asked, "chosen": good, "rejected": bad}
        if labelled:
            is_good = bool(rng.integers(0, 2))
            answer = good if is_good else bad
            fields = {"prompt": asked, "completion": answer, "label": is_good}
        yield SourceRow(fields, f"row {number + 1:,}")


_FIRST = ("Ann", "Tom", "Eva", "Ben", "Ida", "Max")
_LAST = ("Berg", "Lund", "Hill", "Frost")
_PLACES = ("Oslo", "Rome", "Lima", "Quito")


def synthetic_names(rows: int = 800) -> Iterator[SourceRow]:
    """Sentences about persons and places.

    Fields: words; tags, of O, B-PER, I-PER and B-LOC; prompt, the sentence; completion, its names.
    """
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_29, number]))
        persons = [
            [rng.choice(_FIRST)] + [rng.choice(_LAST)] * int(rng.integers(0, 2)) for _ in "ab"
        ]
        place = str(rng.choice(_PLACES))
        (one, other), seen = persons, str(rng.choice(("met", "saw", "called")))
        words = [str(word) for word in (*one, seen, *other, "in", place, "today")]
        tags = [
            *["B-PER", "I-PER"][: len(one)], "O", *["B-PER", "I-PER"][: len(other)], "O", "B-LOC", "O",
        ]  # fmt: skip
        fields = {
            "words": words,
            "tags": tags,
            "prompt": " ".join(words),
            "completion": f"{' '.join(map(str, one))}; {' '.join(map(str, other))}",
        }
        yield SourceRow(fields, f"row {number + 1:,}")


def synthetic_shapes(rows: int = 900, side: int = 40) -> Iterator[SourceRow]:
    """Pictures of a square, a disc or a cross on noise: image, uint8 [side, side, 3]; label, 0 to 2."""
    places = np.arange(side)
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_30, number]))
        image = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
        radius = int(rng.integers(side // 6, side // 4))
        down, right = (places - int(rng.integers(radius, side - radius)) for _ in "xy")
        far_down, far_right = np.abs(down)[:, None], np.abs(right)[None]
        label = int(rng.integers(0, 3))
        inside = (
            np.maximum(far_down, far_right) <= radius,
            far_down**2 + far_right**2 <= radius**2,
            (np.minimum(far_down, far_right) <= radius // 4) & (np.maximum(far_down, far_right) <= radius),
        )[label]  # fmt: skip
        image[inside] = rng.integers(140, 255, 3, dtype=np.uint8)
        yield SourceRow({"image": image, "label": label}, f"row {number + 1:,}")


_SHAPES = ("square", "disc", "cross")


def synthetic_picture_chats(rows: int = 600) -> Iterator[SourceRow]:
    """Questions about no, one or two pictures of `synthetic_shapes`: fields messages, and images, a list."""
    shapes = synthetic_shapes(2 * rows)
    for number in range(rows):
        seen = [next(shapes).fields for _ in range((1, 2, 1, 1, 0, 1)[number % 6])]
        called = [_SHAPES[one["label"]] for one in seen] or [_SHAPES[number % 3]]
        asked = ("What is it?", "What are they?")[len(seen) - 1] if seen else f"Say {called[0]}."
        messages = [
            {"role": "user", "content": "<image>\n" * len(seen) + asked},
            {"role": "assistant", "content": " and ".join(f"a {one}" for one in called)},
        ]
        fields = {"messages": messages, "images": [one["image"] for one in seen]}
        yield SourceRow(fields, f"row {number + 1:,}")


_TONES = {"low": 220, "middle": 440, "high": 880}


def synthetic_tones(rows: int = 300) -> Iterator[SourceRow]:
    """Tones of three pitches: audio, the bytes of a WAV file; text, their names; label, the first one."""
    names, rate = list(_TONES), 16_000
    for number in range(rows):
        rng = np.random.Generator(np.random.Philox([20_31, number]))
        pitches = [int(n) for n in rng.integers(0, 3, size=int(rng.integers(1, 4)))]
        times = np.arange(rate // 4) / rate
        parts = [
            np.sin(2 * np.pi * _TONES[names[n]] * rng.uniform(0.97, 1.03) * times) for n in pitches
        ]
        sound = 0.4 * np.concatenate(parts)
        sound += 0.02 * rng.standard_normal(len(sound))
        raw = io.BytesIO()
        with wave.open(raw, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((sound * 32767).astype("<i2").tobytes())
        fields = {
            "audio": raw.getvalue(),
            "text": " ".join(names[n] for n in pitches),
            "label": pitches[0],
        }
        yield SourceRow(fields, f"row {number + 1:,}")


BUILTIN: dict[str, Callable[..., Iterator[SourceRow]]] = {
    "python-stdlib": python_stdlib,
    "synthetic-classification": synthetic_classification,
    "synthetic-chats": synthetic_chats,
    "synthetic-reviews": synthetic_reviews,
    "synthetic-preferences": synthetic_preferences,
    "synthetic-names": synthetic_names,
    "synthetic-picture-chats": synthetic_picture_chats,
    "synthetic-shapes": synthetic_shapes,
    "synthetic-tones": synthetic_tones,
}
