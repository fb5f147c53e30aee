"""alpha / rank of the modules of a file, from every place where a writer puts it.

Places are the `.alpha` tensors of the modules, and what `int8run.lora.written_settings` reads outside of the
tensors. They must agree: a LoRA that is scaled wrongly looks like a LoRA, and no measure shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.name_patterns import NamePatterns
from int8run.lora.written_settings import (
    ALPHA_KEYS,
    RANK_KEYS,
    RSLORA_KEY,
    Place,
    Settings,
    WrittenSettings,
)
from int8run.utils.plurals import count_noun

# of PEFT's LoraConfig, LoHaConfig and LoKrConfig
PEFT_DEFAULT_ALPHA = 8
PEFT_DEFAULT_RANK = 8
# any of them says that a place holds such a config, whose other settings have PEFT's defaults
PEFT_KEYS = frozenset({"peft_type", RSLORA_KEY, *ALPHA_KEYS, *RANK_KEYS})
# two scales are the same up to what a bfloat16 alpha loses
RELATIVE_TOLERANCE = 0.005
CANNOT_TELL = "which one is meant cannot be told: ask its author, and remove the other from the file"


@dataclass(frozen=True)
class ModuleNames:
    """The names that a pattern may mean a module by.

    Args:
        name: without the prefixes of wrappers and component.
        full_name: as the file has it.
    """

    name: str
    full_name: str

    @property
    def spellings(self) -> list[str]:
        """Both, and the second without PEFT's own wrapper."""
        without_wrapper = self.full_name.removeprefix("base_model.model.")
        return list(dict.fromkeys([self.name, without_wrapper, self.full_name]))


@dataclass(frozen=True)
class ScaleClaim:
    """What one place says about the scale of a module.

    Args:
        place: its name.
        scales: alpha / rank; two where the place gives another rank than the tensors have.
        stated_rank: the rank that it gives; None: it gives none.
    """

    place: str
    scales: tuple[float, ...]
    stated_rank: float | None = None


class PlaceScale:
    """How one place scales the modules of one component.

    Args:
        place: where the settings stand.
        settings: of the component.

    Raises:
        LoraError: for a number that is none, or a pattern that is not read.
    """

    def __init__(self, place: Place, settings: Settings):
        self.place = place.name
        self.is_peft = place.is_peft
        self.uses_default_alpha = False
        self.alpha = self.read_one(settings, ALPHA_KEYS)
        self.rank = self.read_one(settings, RANK_KEYS)
        if self.is_peft and self.alpha is None and not PEFT_KEYS.isdisjoint(settings):
            self.alpha, self.uses_default_alpha = PEFT_DEFAULT_ALPHA, True
        self.is_rank_stabilized = bool(settings.get(RSLORA_KEY))
        self.alphas = self.read_patterns(settings, "alpha_pattern")
        self.ranks = self.read_patterns(settings, "rank_pattern")

    def read_one(self, settings: Settings, keys: Sequence[str]) -> float | None:
        """The number under one of several spellings; None: none is there.

        Raises:
            LoraError: when two spellings have different numbers.
        """
        found = {key: self.check_number(key, settings[key]) for key in keys if settings.get(key) is not None}
        if len(set(found.values())) > 1:
            spelled = " and ".join(f"{key} {value:g}" for key, value in found.items())
            raise LoraError(f"cannot be scaled: {self.place} has {spelled}; {CANNOT_TELL}")
        return next(iter(found.values()), None)

    def check_number(self, key: str, value: Any) -> float:
        """A number as it stands in a place.

        Raises:
            LoraError: when it is none.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= 1e30:
            raise LoraError(
                f"cannot be scaled: {key} of {self.place} is {str(value)[:40]!r}, which is not a number that "
                "a LoRA is scaled with"
            )
        if key not in ALPHA_KEYS and value <= 0:
            raise LoraError(f"cannot be scaled: {key} of {self.place} is {value}; a rank is 1 or more")
        return float(value)

    def read_patterns(self, settings: Settings, key: str) -> NamePatterns:
        """The numbers of single modules, by patterns of their names.

        Raises:
            LoraError: for a number that is none, or a pattern that is not read.
        """
        values = settings.get(key)
        numbers = {}
        if isinstance(values, dict):
            number_key = "lora_alpha" if key == "alpha_pattern" else "r"
            for pattern, value in values.items():
                numbers[pattern] = self.check_number(number_key, value)
        return NamePatterns(numbers, f"cannot be scaled: {key} of {self.place}")

    def make_claim(self, names: ModuleNames, rank: int | None) -> ScaleClaim | None:
        """What the place says about a module; None: nothing.

        Args:
            names: of the module.
            rank: of its tensors; None: they have none, as two whole factors of a LoKr.
        """
        alpha = find_number(self.alphas, names, default=self.alpha)
        stated_rank = find_number(self.ranks, names, default=self.rank)
        if alpha is None:
            return None
        if not self.is_peft:
            has_no_rank = rank is None  # LyCORIS does not scale those
            is_rank = alpha == 0  # kohya's word for alpha = rank
            if has_no_rank or is_rank:
                return ScaleClaim(self.place, (1.0,))

        own_rank = rank or stated_rank or PEFT_DEFAULT_RANK
        scales = [self.divide(alpha, own_rank)]
        if stated_rank and stated_rank != own_rank:
            scales.insert(0, self.divide(alpha, stated_rank))
        return ScaleClaim(self.place, tuple(scales), stated_rank)

    def divide(self, alpha: float, rank: float) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank

    def list_warnings(self) -> list[str]:
        """What of the settings did not reach any module."""
        warnings = []
        if self.uses_default_alpha:
            warnings.append(f"{self.place} has no alpha; PEFT's default of {PEFT_DEFAULT_ALPHA} is used")
        for key, patterns in (("alpha_pattern", self.alphas), ("rank_pattern", self.ranks)):
            unused = patterns.unused
            if unused:
                entries = count_noun(len(unused), "entry")
                warnings.append(
                    f"{key} of {self.place} has {entries} without a module in the file "
                    f"(first: {unused[0][:80]!r})"
                )
        return warnings


def find_number(patterns: NamePatterns, names: ModuleNames, default: float | None) -> float | None:
    """The number of the first pattern that fits a module; the default where none does."""
    found = patterns.find(names.spellings)
    if found is None:
        return default
    assert isinstance(found, float | int)
    return found


class Scales:
    """alpha / rank of every module of a file.

    Args:
        written: what stands outside of the tensors.
    """

    def __init__(self, written: WrittenSettings):
        self.places = written.places
        self.by_component: dict[str, list[PlaceScale]] = {}
        self.has_alpha_tensors = False
        self.num_without_alpha = 0
        self.outside: dict[tuple[str, str], float] = {}  # scales that are not in the tensors

    def get_scale(self, component: str, names: ModuleNames, alpha: Tensor | None, rank: int | None) -> float:
        """alpha / rank of a module; 1 where no place says anything.

        Args:
            component: `denoiser`, `text_encoder`, ...
            names: of the module.
            alpha: its `.alpha` tensor; 0 means rank, as in kohya's files.
            rank: of its tensors; None: they have none, as two whole factors of a LoKr, which PEFT scales and
                LyCORIS does not.

        Raises:
            LoraError: for an alpha that is not a number, or places that do not agree.
        """
        claims = []
        if alpha is not None:
            self.has_alpha_tensors = True
            claims.append(ScaleClaim("its alpha tensor", (compute_own_scale(alpha, rank),)))
        for place_scale in self.get_place_scales(component):
            claim = place_scale.make_claim(names, rank)
            if claim is not None:
                claims.append(claim)
        if not claims:
            if rank is not None:
                self.num_without_alpha += 1
            return 1.0
        scale = find_common_scale(claims, rank)
        if alpha is None and scale != 1:
            self.outside[component, names.name] = scale
        return scale

    def get_place_scales(self, component: str) -> list[PlaceScale]:
        """What the places say about a component."""
        if component not in self.by_component:
            self.by_component[component] = [
                PlaceScale(place, place.get_settings(component)) for place in self.places
            ]
        return self.by_component[component]

    def list_warnings(self) -> list[str]:
        """What of the settings did not reach any module."""
        warnings = []
        for place_scales in self.by_component.values():
            for place_scale in place_scales:
                warnings += place_scale.list_warnings()
        return list(dict.fromkeys(warnings))


def read_alpha(alpha: Tensor) -> float:
    """The number in an `.alpha` tensor.

    Raises:
        LoraError: when it is not one number.
    """
    if alpha.numel() != 1:
        raise LoraError(f"has an alpha of shape {list(alpha.shape)}; it is one number, the file is broken")
    return float(alpha)


def compute_own_scale(alpha: Tensor, rank: int | None) -> float:
    """alpha / rank as the tensors of a module say; an alpha of 0 means rank.

    Raises:
        LoraError: when alpha is not one number.
    """
    number = read_alpha(alpha)
    return 1.0 if rank is None else (number or rank) / rank


def find_common_scale(claims: Sequence[ScaleClaim], rank: int | None) -> float:
    """The one scale that all places agree on.

    Raises:
        LoraError: when they do not, naming the places and their scales.
    """
    first, *others = claims
    common = list(first.scales)
    for claim in others:
        common = [scale for scale in common if is_claimed(scale, claim)]
        if not common:
            raise LoraError(
                f"cannot be scaled: alpha / rank is {first.scales[-1]:g} by {first.place} and "
                f"{claim.scales[-1]:g} by {claim.place}; {CANNOT_TELL}"
            )
    if len(common) > 1:
        raise LoraError(
            f"cannot be scaled: {first.place} says rank {first.stated_rank:g}, its tensors have rank {rank}; "
            f"alpha / rank is {common[0]:g} or {common[1]:g}, and {CANNOT_TELL}"
        )
    return common[0]


def is_claimed(scale: float, claim: ScaleClaim) -> bool:
    """Whether a place allows a scale."""
    return any(math.isclose(scale, other, rel_tol=RELATIVE_TOLERANCE) for other in claim.scales)
