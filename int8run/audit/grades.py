"""What was found in a file, and the grade that follows; all judgements are data of `grades.yaml`.

`file_audit` adds findings and asks for the grade. Nothing here knows a tensor.
"""

import fnmatch
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

GRADES_FILE = Path(__file__).with_name("grades.yaml")
REPRODUCED, SOUND, UNPROVEN = "A", "B", "U"  # of files without a finding


@dataclass(frozen=True)
class FindingKind:
    """One thing that can be wrong with a file.

    Args:
        grade: the best that a file with it can have.
        title: in one line.
        advice: what it means, or what to do.
    """

    grade: str
    title: str
    advice: str


@dataclass(frozen=True)
class Limits:
    """From where on something is a finding; `grades.yaml` has the numbers and what each means."""

    min_correlation: float
    max_other_share: float
    max_gain_error: float
    max_row_gain_error: float
    min_low_rank_share: float
    max_excess_db: float
    max_cut_off_share: float
    max_unused_share: float
    max_tie_share: float
    max_float_error: float
    min_sqnr_db: Mapping[str, float]


@dataclass(frozen=True)
class GradeTable:
    """All of `grades.yaml`.

    Args:
        grades: letter -> meaning, the best first.
        findings: what can be found, by code.
        limits: from where on it is.
        computed_tensors: patterns of tensors that a file may leave out or have.
        explained_by_damage: codes of findings that damage looks like, too.
    """

    grades: Mapping[str, str]
    findings: Mapping[str, FindingKind]
    limits: Limits
    computed_tensors: Sequence[str]
    explained_by_damage: Collection[str]

    def is_computed(self, key: str) -> bool:
        """Whether models compute a tensor themselves, so that it need not be in a file."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.computed_tensors)

    def find_worst(self, grades: Iterable[str], best: str) -> str:
        """The worst of some grades, or `best` where all are better than it.

        Args:
            grades: letters.
            best: what is returned at best.
        """
        order = list(self.grades)
        return max([*grades, best], key=order.index)

    def is_below(self, grade: str, least: str) -> bool:
        """Whether a grade is worse than another."""
        order = list(self.grades)
        return order.index(grade) > order.index(least)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file.

    Args:
        code: in `grades.yaml`.
        names: of layers or tensors that it is about, each once; empty: the file as a whole.
        detail: in words, with the numbers of this file.
        out_of: how many could have been about.
    """

    code: str
    names: tuple[str, ...] = ()
    detail: str = ""
    out_of: int = 0

    @property
    def kind(self) -> FindingKind:
        """Its grade and words."""
        return load_grades().findings[self.code]


@functools.cache
def load_grades() -> GradeTable:
    """What `grades.yaml` says."""
    data = yaml.safe_load(GRADES_FILE.read_text(encoding="utf-8"))
    kinds = {code: FindingKind(**fields) for code, fields in data["findings"].items()}
    return GradeTable(
        grades=data["grades"],
        findings=kinds,
        limits=Limits(**data["limits"]),
        computed_tensors=data["computed_tensors"],
        explained_by_damage=data["explained_by_damage"],
    )


def choose_grade(findings: Collection[Finding], *, has_base: bool, is_reproduced: bool) -> str:
    """The one grade of a file.

    Args:
        findings: all of it.
        has_base: whether its numbers were compared with those of a base.
        is_reproduced: whether all quantized layers were the recipe's to the bit.
    """
    best = UNPROVEN
    if has_base:
        best = REPRODUCED if is_reproduced else SOUND
    return load_grades().find_worst((finding.kind.grade for finding in findings), best)
