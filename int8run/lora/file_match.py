"""What of one LoRA file fits a model, and what is said of the rest.

`lora.match` fills a FileMatch and lets it be reported; nothing here looks a module up.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange, is_same
from int8run.lora.key_groups import PLAIN_WEIGHT
from int8run.lora.key_parsing import DENOISER, UNKNOWN_SUFFIX
from int8run.lora.load import LoraFile
from int8run.lora.model_component import ModelComponent
from int8run.lora.unread_types import UnreadType, describe_unread_types, list_unread_types

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class NamedChange:
    """A change of one module, and where in the file it comes from.

    Args:
        name: in the file, which stands for the module.
        change: of the whole module.
        rows: of the module that it changes; None: all.
    """

    name: str
    change: LoraChange
    rows: range | None

    def overlaps(self, other: "NamedChange") -> bool:
        """Whether two changes of one module meet in the weight or in the bias."""
        mine, theirs = self.change, other.change
        meet_in_weight = mine.weight_delta is not None and theirs.weight_delta is not None
        meet_in_bias = mine.bias_delta is not None and theirs.bias_delta is not None
        if not meet_in_weight and not meet_in_bias:
            return False
        if self.rows is None or other.rows is None:
            return True
        return self.rows.start < other.rows.stop and other.rows.start < self.rows.stop

    def is_part_of(self, other: "NamedChange") -> bool:
        """Whether the other one does the same to the rows that this one changes."""
        if self.rows == other.rows:
            return is_same(self.change, other.change)
        if self.rows is None:
            return False
        rows = slice(self.rows.start, self.rows.stop)
        try:
            return is_same(self.change.take_rows(rows), other.change.take_rows(rows))
        except LoraError:  # an adapter that cannot be cut
            return False


@dataclass
class FileMatch:
    """What one file changes in a model.

    Args:
        changes_by_module: (component, module) -> its changes; several: of different rows, or weight and bias.
        unmatched: (key or module name, reason).
        n_matched: modules of the file that are in the model.
        n_copies: changes that are in the file once more under another name.
    """

    changes_by_module: dict[tuple[str, str], list[NamedChange]] = field(default_factory=dict)
    unmatched: list[tuple[str, str]] = field(default_factory=list)
    n_matched: int = 0
    n_copies: int = 0

    @property
    def changes(self) -> Iterator[tuple[str, str, LoraChange]]:
        """Component, module and change of everything that is applied."""
        for (component, module), named_changes in self.changes_by_module.items():
            for named in named_changes:
                yield component, module, named.change

    def add(self, file: LoraFile, component: str, module: str, new: NamedChange) -> None:
        """Add a change of a module; one that the file has under another name already counts once.

        Raises:
            LoraError: when the two names do not hold the same.
        """
        known = self.changes_by_module.setdefault((component, module), [])
        twins = [named for named in known if named.overlaps(new)]
        others = [named for named in known if named not in twins]
        if all(twin.is_part_of(new) for twin in twins):
            # the new one holds all of them, and more where they are only parts of the module
            self.changes_by_module[component, module] = [*others, new]
            self.n_copies += len(twins)
            return
        twin = twins[0]
        if new.is_part_of(twin):
            self.n_copies += 1
            return
        raise LoraError(
            f"{file.title}: {module} is in the file twice, as {twin.name} and {new.name}; "
            "which one is meant cannot be told"
        )


def describe_missing_module(component: str, components: Mapping[str, ModelComponent]) -> str:
    """Why a module of a file's component is not in the model."""
    has_other_text_encoder = component != DENOISER and len(components) > 1
    if component in components or has_other_text_encoder:
        return "no such module"
    return f"the model has no {component}"


def report_unmatched(file: LoraFile, match: FileMatch, *, strict: bool) -> None:
    """Warn about what of a file does not match the model.

    Raises:
        LoraError: when nothing matches, or, when strict, anything does not.
    """
    check_any_match(file, match)
    n_unmatched = len(match.unmatched)
    if not n_unmatched:
        return

    total = match.n_matched + n_unmatched
    counts = Counter(reason for _, reason in match.unmatched)
    share = f"{n_unmatched} of {total} modules and keys do not match the model"
    details = f"{format_reasons(counts)} (first: {match.unmatched[0][0]})"
    unread = list_unread_types(counts)
    if unread:
        details += f"; {describe_unread_types(unread)}"
    if strict:
        raise LoraError(f"{file.title}: {share}: {details}; lora.strict=false applies the rest")
    log.warning("%s: %s and are left out: %s", file.title, share, details)


def check_any_match(file: LoraFile, match: FileMatch) -> None:
    """Check that something of a file is in the model.

    Raises:
        LoraError: when nothing is, with the reasons.
    """
    if match.n_matched:
        return
    counts = Counter(reason for _, reason in match.unmatched)
    details = ""
    if match.unmatched:
        details = f" (first: {match.unmatched[0][0]}): {format_reasons(counts)}"
    raise LoraError(
        f"{file.title}: none of its {len(match.unmatched)} modules and keys is in the model{details}; "
        f"{explain_no_match(counts, list_unread_types(counts))}"
    )


def format_reasons(counts: Mapping[str, int]) -> str:
    """`2 × no such module; 1 × ...`."""
    return "; ".join(f"{count} × {reason}" for reason, count in counts.items())


def explain_no_match(reasons: Collection[str], unread: Sequence[UnreadType]) -> str:
    """Why nothing of a file is applied, and what to do.

    Args:
        reasons: why its keys are not.
        unread: the types that they name.
    """
    if unread:
        return describe_unread_types(unread)
    other_reasons = set(reasons) - {PLAIN_WEIGHT, UNKNOWN_SUFFIX}
    if PLAIN_WEIGHT in reasons and not other_reasons:
        return (
            "the file holds weights of a model, and no LoRA; give it as the model (model.location=FILE) or "
            "the text encoder (clip.path=FILE) if it is one"
        )
    return "the LoRA was made for another architecture, or its adapter type is not supported"
