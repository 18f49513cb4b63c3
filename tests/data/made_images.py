"""Small pictures whose class is a colour, as files."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cats", "dogs", "owls")


def picture(number: int, colour: int) -> Image.Image:
    """Noise with more of one colour, of a size of its own."""
    rng = np.random.default_rng(number)
    values = rng.integers(0, 120, (36 + number % 9, 40 + number % 5, 3), dtype=np.uint8)
    values[..., colour] += 100
    return Image.fromarray(values)


def write_classes(folder: Path, each: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder for each class, of JPEG and PNG files."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            suffix = "jpg" if number % 2 else "png"
            colour = CLASSES.index(name)
            picture(7 * number + colour, colour).save(folder / name / f"{number:03}.{suffix}")
    return folder
