"""Which trials are worth having: the Pareto front of cost and quality, and the winner for a budget."""

import math
from collections.abc import Sequence

from int8run.search.measurement import SECONDS
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
        The trial (None where none finished), and whether it meets the quality. Of those whose cost cannot be
        told from the cheapest one's the best one wins.
    """
    finished = select_finished(trials)
    if not finished:
        return None, False
    tied = find_cheapest(finished, minimise, quality_db)
    if tied:
        return max(tied, key=lambda trial: (get_quality(trial), -get_cost(trial, minimise))), True
    return max(finished, key=lambda trial: (get_quality(trial), -get_cost(trial, minimise))), False


def find_cheapest(finished: Sequence[Trial], minimise: str, quality_db: float) -> list[Trial]:
    """The cheapest trial that meets a quality, and those that cannot be told from it; none may meet it."""
    meeting = [trial for trial in finished if get_quality(trial) >= quality_db]
    if not meeting:
        return []
    cheapest = min(meeting, key=lambda trial: get_cost(trial, minimise))
    return select_tied(meeting, cheapest, minimise)


def select_tied(trials: Sequence[Trial], cheapest: Trial, minimise: str) -> list[Trial]:
    """The trials whose cost cannot be told from that of the cheapest one.

    Half of the width of a difference's interval is the root of the squares of both halves; the times of two
    trials are independent.

    Args:
        trials: finished ones, the cheapest among them.
        cheapest: of them.
        minimise: the cost; bytes are exact.
    """
    assert cheapest.measured is not None
    if minimise != SECONDS:
        return [trial for trial in trials if get_cost(trial, minimise) == get_cost(cheapest, minimise)]
    above_cheapest = cheapest.measured.seconds_high - cheapest.measured.seconds
    tied = []
    for trial in trials:
        assert trial.measured is not None
        difference = trial.measured.seconds - cheapest.measured.seconds
        below_trial = trial.measured.seconds - trial.measured.seconds_low
        if difference <= math.hypot(above_cheapest, below_trial):
            tied.append(trial)
    return tied


def get_cost(trial: Trial, minimise: str) -> float:
    """The cost of a finished trial."""
    assert trial.measured is not None
    return trial.measured.get_cost(minimise)


def get_quality(trial: Trial) -> float:
    """The mean PSNR of a finished trial, in dB."""
    assert trial.measured is not None
    return trial.measured.quality_db
