"""What must come of every input, however it was damaged: refused in one line by an error of int8run's, or
read as an independent reader reads it.

An input is made from a seed and its number alone, so that one that fails can be made again.
"""

import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzzing.checkpoint_inputs import check_denoiser, check_encoder
from fuzzing.gguf_inputs import check_gguf
from fuzzing.lora_inputs import check_lora
from fuzzing.prompt_inputs import check_prompts
from fuzzing.shard_inputs import check_shards
from fuzzing.yaml_inputs import check_yaml

from int8run.errors import Int8RunError

REFUSED, RIGHT, CRASH, SILENT = "refused", "right", "crash", "silent"
# makes an input in a folder and reads it; returns whether something was read
Check = Callable[[Random, Path], bool]


@dataclass(frozen=True)
class Reader:
    """One of int8run's readers.

    Args:
        check: makes an input, reads it, and compares.
        share: of 1,000 inputs, how many it gets.
    """

    check: Check
    share: int


READERS = {
    "denoiser": Reader(check_denoiser, 280),
    "shards": Reader(check_shards, 50),
    "gguf": Reader(check_gguf, 100),
    "lora": Reader(check_lora, 330),
    "text_encoder": Reader(check_encoder, 60),
    "prompts": Reader(check_prompts, 150),
    "yaml": Reader(check_yaml, 30),
}


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Args:
        kind: `refused`, `right`, `crash` or `silent`.
        detail: of what must not be: the message, and where it came from.
        cpu_s: time of the processor, for measurements by hand.
    """

    kind: str
    detail: str = ""
    cpu_s: float = 0.0


def try_input(name: str, seed: int, number: int, folder: Path) -> Outcome:
    """Make one input, and read it.

    Args:
        name: of the reader.
        seed: of the run.
        number: of the input.
        folder: to write into; what the reader's earlier inputs left there is replaced.
    """
    chance = Random(f"{name} {seed} {number}")
    own_folder = folder / name
    own_folder.mkdir(exist_ok=True)
    started = time.process_time()
    kind, detail = judge(READERS[name].check, chance, own_folder)
    return Outcome(kind, detail, time.process_time() - started)


def judge(check: Check, chance: Random, folder: Path) -> tuple[str, str]:
    """The outcome of one input, and what is to be said about it."""
    try:
        is_read = check(chance, folder)
    except Int8RunError as error:
        message = str(error)
        if not message.strip() or "\n" in message:
            return CRASH, f"not one line: {message[:500]!r}"
        return REFUSED, ""
    except AssertionError as error:
        return SILENT, f"{error}\n{traceback.format_exc(limit=-4)}"
    except Exception:  # noqa: BLE001 # this is what is looked for
        return CRASH, traceback.format_exc(limit=-8)
    return (RIGHT, "") if is_read else (REFUSED, "")


def try_inputs(name: str, seed: int, numbers: range, folder: Path) -> tuple[Counter[str], list[str]]:
    """Try many inputs.

    Returns:
        How many had each outcome, and what must not be: a line with the way to make it again, and the rest.
    """
    counts, faults = Counter[str](), []
    for number in numbers:
        outcome = try_input(name, seed, number, folder)
        counts[outcome.kind] += 1
        if outcome.detail:
            faults.append(f"{name}, seed {seed}, input {number}: {outcome.kind}: {outcome.detail}")
    return counts, faults
