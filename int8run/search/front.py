"""Which trials are worth having: the Pareto front of cost and quality, and the winner for a budget."""

from collections.abc import Sequence

from int8run.search.trials import Trial, select_finished


def find_front(trials: Sequence[Trial], minimise: str) -> list[Trial]:
    """The finished trials that no other beats in cost or quality without being worse in the other one.

    Args:
        trials: of a search.
        minimise: the cost: `seconds` or `bytes`.

    Returns:
        The cheapest first.
    """
    ordered = sorted(
        select_finished(trials), key=lambda trial: (get_cost(trial, minimise), -get_quality(trial))
    )
    front: list[Trial] = []
    for trial in ordered:
        if not front or get_quality(trial) > get_quality(front[-1]):
            front.append(trial)
    return front


def choose_winner(trials: Sequence[Trial], minimise: str, quality_db: float) -> tuple[Trial | None, bool]:
    """The cheapest trial that meets a quality; where none does, the one that is the nearest to it.

    Args:
        trials: of a search.
        minimise: the cost.
        quality_db: the least mean PSNR.

    Returns:
        The trial (None where none finished), and whether it meets the quality. Of equally cheap ones the
        better one wins.
    """
    finished = select_finished(trials)
    if not finished:
        return None, False
    meeting = [trial for trial in finished if get_quality(trial) >= quality_db]
    if meeting:
        return min(meeting, key=lambda trial: (get_cost(trial, minimise), -get_quality(trial))), True
    return max(finished, key=lambda trial: (get_quality(trial), -get_cost(trial, minimise))), False


def get_cost(trial: Trial, minimise: str) -> float:
    """The cost of a finished trial."""
    assert trial.measured is not None
    return trial.measured.get_cost(minimise)


def get_quality(trial: Trial) -> float:
    """The mean PSNR of a finished trial, in dB."""
    assert trial.measured is not None
    return trial.measured.quality_db
