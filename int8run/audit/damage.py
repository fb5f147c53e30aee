"""Whether the tensors are those that int8run wrote, and what may not be said of a file where they are not.

`file_checks` asks for the hash, `file_audit` leaves out what damage explains. Files of other programs have no
hash, and nothing of them is read here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from int8run.audit.grades import Finding, load_grades
from int8run.audit.layer_audit import LayerAudit
from int8run.checkpoints.data_hash import check_data
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

CHANGED_TENSORS = "changed_tensors"


def check_hash(files: TensorFiles) -> Iterator[Finding]:
    """Whether the tensors are those that int8run wrote; all of them are read again."""
    try:
        check_data(files)
    except FileError as error:
        yield Finding(CHANGED_TENSORS, (), str(error))


def is_all_reproduced(
    layers: Sequence[LayerAudit], changed: Mapping[str, float], float_keys: Collection[str]
) -> bool:
    """Whether every number of a file is known from the base.

    Args:
        layers: audited.
        changed: float tensor -> how far it is from the base's; 0: equal.
        float_keys: the float tensors of the file.
    """
    if not all(layer.is_reproduced for layer in layers if layer.is_quantized):
        return False
    return all(changed.get(key) == 0 for key in float_keys)


def leave_out_damage(findings: Sequence[Finding], layers: Sequence[LayerAudit]) -> list[Finding]:
    """Findings without those that damage explains, where the tensors are not those that int8run wrote.

    A number that flipped on a disk differs from the base as much as one that was trained.

    Args:
        findings: of the file.
        layers: audited; the codes of such findings are replaced in them.
    """
    explained = load_grades().explained_by_damage
    codes = {finding.code for finding in findings}
    if CHANGED_TENSORS not in codes:
        return list(findings)
    for layer in layers:
        layer.codes = list(
            dict.fromkeys(CHANGED_TENSORS if code in explained else code for code in layer.codes)
        )
    names = [name for finding in findings if finding.code in explained for name in finding.names]
    kept = [finding for finding in findings if finding.code not in explained]
    return [add_names(finding, names) if finding.code == CHANGED_TENSORS else finding for finding in kept]


def add_names(finding: Finding, names: Sequence[str]) -> Finding:
    """The finding of damage with what differs from the base, which need not all be damaged.

    Args:
        finding: without it.
        names: of layers and float tensors.
    """
    if not names:
        return finding
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    detail = f"{finding.detail}; what differs from the base by more than rounding: {names[0]}{others}"
    return Finding(finding.code, (), detail)
