"""Whether the words that a prompt asks for can be read, by `rapidocr`, whose models come with its package."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope
from int8run.metrics.clip import to_pixels
from int8run.metrics.weights import needs_packages

PACKAGES = ("rapidocr", "onnxruntime")
# what a prompt asks for stands in double quotes, straight, curly or angled
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|«([^»]*)»')


@dataclass(frozen=True)
class OcrAccuracy:
    """1 − edit distance / length between each text that a prompt has in double quotes and what is read.

    Letters and digits alone count, in lower case, and the distance is that to the nearest part of what is
    read: other words in an image cost nothing. A text that is there has 1, one that is not at all 0; the mean
    over the texts of a prompt. Prompts that ask for no words have no number. Of a video the key frames are
    read.

    Flow-GRPO (arXiv:2505.05470) compares with all that is read, and agrees where the text is there.
    """

    name: ClassVar[str] = "ocr"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/ocr_accuracy": Metric(
            MORE,
            "how much of the words that prompts ask for can be read",
            label="words read",
            lowest=0,
            highest=1,
        ),
        "float/ocr_accuracy": Metric(MORE, "the same of the float model's images", lowest=0, highest=1),
    }
    needs: ClassVar[Needs] = Needs(packages=PACKAGES, extra="ocr", prompts=True)
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def load(self) -> FrameFunction:
        """Load the models that find and read lines of text, once."""
        with needs_packages(" ".join(PACKAGES), "ocr"):
            import onnxruntime  # noqa: F401 - rapidocr's models need it, and it asks only when it reads
            from rapidocr import RapidOCR
        engine = RapidOCR(params={"Global.log_level": "critical"})

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            asked = list_asked_texts(prompt)
            if not asked:
                return {}
            return {
                "ocr_accuracy": rate_reading(read_text(engine, a), asked),
                "float/ocr_accuracy": rate_reading(read_text(engine, b), asked),
            }

        return measure


def list_asked_texts(prompt: str) -> list[str]:
    """The texts in double quotes, without those that have neither letter nor digit."""
    texts = ["".join(groups) for groups in QUOTED.findall(prompt)]
    return [text for text in texts if keep_letters(text)]


def keep_letters(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    normal = unicodedata.normalize("NFKC", text).lower()
    return "".join(character for character in normal if character.isalnum())


def read_text(engine: Any, image: Tensor) -> str:
    """All lines that are read in an image, joined.

    Args:
        engine: rapidocr's.
        image: [1, 3, H, W] in 0..1.
    """
    bgr = np.ascontiguousarray(to_pixels(image)[..., ::-1])  # as OpenCV has it
    lines = getattr(engine(bgr), "txts", None)
    return " ".join(lines or ())


def rate_reading(found: str, asked: Sequence[str]) -> float:
    """How much of some texts is in what was read, 0 to 1; the mean over the texts.

    Args:
        found: what was read.
        asked: at least one text, each with a letter or digit.
    """
    read = keep_letters(found)
    ratings = []
    for text in asked:
        letters = keep_letters(text)
        ratings.append(1 - compute_nearest_distance(letters, read) / len(letters))
    return sum(ratings) / len(ratings)


def compute_nearest_distance(text: str, read: str) -> int:
    """The least edit distance between a text and any part of another, the empty one included.

    Source: Sellers 1980, the table of Levenshtein's distance whose first row is zero.
    """
    row = [0] * (len(read) + 1)
    for number, letter in enumerate(text, start=1):
        following = [number]
        for column, other in enumerate(read, start=1):
            replaced = row[column - 1] + (letter != other)
            following.append(min(replaced, row[column] + 1, following[-1] + 1))
        row = following
    return min(row)
