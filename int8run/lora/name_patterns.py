"""Patterns of module names in PEFT settings (`alpha_pattern`, `rank_pattern`), matched in linear time.

PEFT reads a pattern as a regular expression that fits the end of a module's name from a dot on
(`peft/utils/other.py::get_pattern_key`). A LoRA file comes from a stranger, and an expression of a few
letters can keep Python's `re` busy for years, so no pattern is compiled. Nearly all are plain names, which
are looked up. The few others are read here: `.`, `\\.`, `\\d`, `\\w`, `[0-9]`, `[^.]`, each with `*`, `+` or
`?` behind it where wanted, `^` at the beginning and `$` at the end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from int8run.errors import LoraError

MAX_EXPRESSION_CHARS = 100
# expressions are tried on every module; plain names are not counted
MAX_EXPRESSIONS = 8
WILDCARD = "."
# spelling -> whether a character is one of these
CHARACTER_CLASSES: Mapping[str, Callable[[str], bool]] = {
    r"\d": str.isdigit,
    "[0-9]": str.isdigit,
    r"\w": lambda char: char.isalnum() or char == "_",
    "[^.]": lambda char: char != ".",
}
ESCAPED_CHARACTERS = {rf"\{char}": char for char in ".-_/"}


@dataclass(frozen=True)
class Step:
    """One character of an expression, or a run of characters.

    Args:
        spelling: a character, `.` for any, or one of `CHARACTER_CLASSES`.
        is_literal: the spelling is the character itself.
        may_be_absent: no character fits as well.
        repeats: any number of characters fits.
    """

    spelling: str
    is_literal: bool
    may_be_absent: bool = False
    repeats: bool = False

    def accepts(self, char: str) -> bool:
        """Whether a character fits."""
        if self.is_literal:
            return char == self.spelling
        return self.spelling == WILDCARD or CHARACTER_CLASSES[self.spelling](char)


@dataclass(frozen=True, eq=False)
class NamePattern:
    """A pattern that fits the end of a name, from its beginning or from a dot on.

    Args:
        steps: what its characters must be, in order.
        is_anchored: it fits whole names only.
        literal: the name that it stands for; None: it is an expression.
    """

    steps: tuple[Step, ...]
    is_anchored: bool
    literal: str | None


class Expressions:
    """Several expressions, matched in one pass over a name.

    All ways through their steps are followed at once, character by character. A position is a bit of a
    number: expression after expression a bit for each step, which is the next one, and a bit behind the last
    step, which stands for a fit.

    Args:
        patterns: the expressions.
    """

    def __init__(self, patterns: Sequence[NamePattern]):
        self.steps_by_bit: dict[int, Step] = {}
        self.ends: list[int] = []  # of each expression the bit behind its last step
        self.starts = self.unanchored_starts = 0
        bit = 1
        for pattern in patterns:
            self.starts |= bit
            if not pattern.is_anchored:
                self.unanchored_starts |= bit
            for step in pattern.steps:
                self.steps_by_bit[bit] = step
                bit <<= 1
            self.ends.append(bit)
            bit <<= 1
        self.absent = self.collect_bits(lambda step: step.may_be_absent)
        self.repeating = self.collect_bits(lambda step: step.repeats)
        self.accepting_by_char: dict[str, int] = {}  # as far as it was asked for

    def find_fitting(self, name: str) -> list[int]:
        """Indices of the expressions that fit a name."""
        if not self.ends:
            return []
        positions = self.skip_absent(self.starts)
        for char in name:
            fitting = positions & self.get_accepting_steps(char)
            following = fitting & self.repeating | (fitting & ~self.repeating) << 1
            if char == ".":
                following |= self.unanchored_starts
            positions = self.skip_absent(following)
        return [index for index, end in enumerate(self.ends) if positions & end]

    def skip_absent(self, positions: int) -> int:
        """The positions, and those behind steps that may be absent."""
        # adding the lowest position of a run of such steps carries through the run to the step behind it;
        # the bit behind the last step is none of them, so no carry reaches the next expression
        absent = self.absent
        return positions | ((positions & absent) + absent ^ absent)

    def get_accepting_steps(self, char: str) -> int:
        """A bit for each step that a character fits."""
        if char not in self.accepting_by_char:
            self.accepting_by_char[char] = self.collect_bits(lambda step: step.accepts(char))
        return self.accepting_by_char[char]

    def collect_bits(self, is_set: Callable[[Step], bool]) -> int:
        """The bits of all steps of which this is true."""
        return sum(bit for bit, step in self.steps_by_bit.items() if is_set(step))


class NamePatterns:
    """A mapping from patterns to values; the first pattern that fits a name counts.

    Args:
        values: pattern -> value.
        setting: where they stand, for messages.

    Raises:
        LoraError: for a pattern that is not read here.
    """

    def __init__(self, values: Mapping[str, object], setting: str):
        self.values = list(values.items())
        self.index_by_name: dict[str, int] = {}
        self.index_by_whole_name: dict[str, int] = {}
        self.expression_indices: list[int] = []
        expressions: list[NamePattern] = []
        for index, (text, _) in enumerate(self.values):
            pattern = parse_pattern(text, setting)
            if pattern.literal is None:
                self.expression_indices.append(index)
                expressions.append(pattern)
            elif pattern.is_anchored:
                self.index_by_whole_name.setdefault(pattern.literal, index)
            else:
                self.index_by_name.setdefault(pattern.literal, index)
        if len(expressions) > MAX_EXPRESSIONS:
            raise LoraError(
                f"{setting} has {len(expressions)} expressions; {MAX_EXPRESSIONS} are read, and any "
                "number of plain names"
            )
        self.expressions = Expressions(expressions)
        self.used: set[int] = set()

    def find(self, names: Iterable[str]) -> object | None:
        """The value of the first pattern that fits one of the names of a module; None: none fits."""
        fitting = [index for name in names for index in self.find_indices(name)]
        if not fitting:
            return None
        self.used.add(min(fitting))
        return self.values[min(fitting)][1]

    def find_indices(self, name: str) -> list[int]:
        """Indices of patterns that fit a name, the first one included."""
        if not self.values:
            return []
        found = [self.expression_indices[number] for number in self.expressions.find_fitting(name)]
        parts = name.split(".")
        ends = {".".join(parts[start:]) for start in range(len(parts))}
        found += [self.index_by_name[end] for end in ends if end in self.index_by_name]
        if name in self.index_by_whole_name:
            found.append(self.index_by_whole_name[name])
        return found

    @property
    def unused(self) -> list[str]:
        """The patterns that decided for no module so far."""
        return [text for index, (text, _) in enumerate(self.values) if index not in self.used]


def parse_pattern(text: str, setting: str) -> NamePattern:
    """Read a pattern.

    Raises:
        LoraError: for an expression that is too long, or has more than the module says.
    """
    steps = parse_steps(text.removeprefix("^").removesuffix("$"))
    if steps is None:
        raise LoraError(
            f"{setting} has the expression {text[:MAX_EXPRESSION_CHARS]!r}; read are names, ends of names, "
            r"and of regular expressions . \. \d \w [0-9] [^.] with * + ?: write the modules' names out"
        )
    is_anchored = text.startswith("^")
    # the dots of a plain name are taken for dots, though PEFT lets them stand for any character
    if not any(step.may_be_absent or step.spelling in CHARACTER_CLASSES for step in steps):
        literal = "".join(step.spelling for step in steps)
        return NamePattern(steps, is_anchored, literal)
    if len(text) > MAX_EXPRESSION_CHARS:
        raise LoraError(
            f"{setting} has an expression of {len(text)} characters, {text[:MAX_EXPRESSION_CHARS]!r}…; "
            f"{MAX_EXPRESSION_CHARS} are read, and names of any length"
        )
    return NamePattern(steps, is_anchored, None)


def parse_steps(text: str) -> tuple[Step, ...] | None:
    """The steps of an expression without its anchors; None: it is not read here."""
    steps: list[Step] = []
    position = 0
    while position < len(text):
        step, position = parse_character(text, position)
        if step is None:
            return None
        quantifier = text[position : position + 1]
        if quantifier == "?":
            steps.append(Step(step.spelling, step.is_literal, may_be_absent=True))
        elif quantifier in ("*", "+"):
            if quantifier == "+":
                steps.append(step)
            steps.append(Step(step.spelling, step.is_literal, may_be_absent=True, repeats=True))
        else:
            steps.append(step)
            continue
        position += 1
    return tuple(steps)


def parse_character(text: str, position: int) -> tuple[Step | None, int]:
    """The step that begins at a position, and the position behind it; None: nothing that is read here."""
    for spelling in CHARACTER_CLASSES:
        if text.startswith(spelling, position):
            return Step(spelling, is_literal=False), position + len(spelling)
    for spelling, char in ESCAPED_CHARACTERS.items():
        if text.startswith(spelling, position):
            return Step(char, is_literal=True), position + len(spelling)
    char = text[position]
    if char == WILDCARD:
        return Step(char, is_literal=False), position + 1
    if char.isalnum() or char in "_-/":
        return Step(char, is_literal=True), position + 1
    return None, position
