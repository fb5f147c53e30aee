"""What people chose in blind comparisons: read from the files that they saved, checked, and counted.

`tasks.report` hands over the files, `html_page` shows the count. The files come from other people: nothing in
them is believed before it fits the page.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.report.blind_pairs import BlindComparison, BlindSample
from int8run.utils.plurals import count_noun
from int8run.utils.text import make_visible
from int8run.utils.untrusted_json import parse_untrusted_json

FORMAT_KEY = "int8run_votes"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 20_000_000
MAX_SHOWN_LENGTH = 120  # of what a file says, in an error
LEFT, RIGHT, EQUAL = "left", "right", "equal"
LEVEL = 0.95  # of the interval of a win rate


@dataclass(frozen=True)
class Vote:
    """One choice.

    Args:
        sample: number of the sample on the page.
        left, right: the contenders, by their keys.
        choice: `left`, `right` or `equal`.
    """

    sample: int
    left: str
    right: str
    choice: str

    @property
    def winner(self) -> str | None:
        """The contender that was better; None where none was."""
        winners = {LEFT: self.left, RIGHT: self.right}
        return winners.get(self.choice)


@dataclass(frozen=True)
class VoteFile:
    """The votes that one person saved.

    Args:
        path: of the file.
        session: random, of the page that they voted on; two files of one session hold the same votes.
        votes: of all pairs.
    """

    path: Path
    session: str
    votes: Sequence[Vote]


@dataclass(frozen=True)
class Tally:
    """How two contenders did against each other.

    Args:
        first, second: their names.
        first_wins, second_wins: how often each was better.
        ties: how often no difference was seen; they are not in the win rate.
        num_voters: people who voted on this pair.
    """

    first: str
    second: str
    first_wins: int
    second_wins: int
    ties: int
    num_voters: int

    @property
    def num_decided(self) -> int:
        """Votes for one of the two."""
        return self.first_wins + self.second_wins

    @property
    def win_rate(self) -> float | None:
        """Share of the decided votes that the second one won; None without one."""
        return self.second_wins / self.num_decided if self.num_decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's interval of the win rate; None without a decided vote."""
        if not self.num_decided:
            return None
        return compute_wilson_interval(self.second_wins, self.num_decided)

    def describe(self) -> str:
        """The count in one sentence."""
        counts = (
            f"{self.second} was better {count_noun(self.second_wins, 'time')}, {self.first} "
            f"{count_noun(self.first_wins, 'time')}, no difference {count_noun(self.ties, 'time')}"
        )
        interval = self.interval
        if self.win_rate is None or interval is None:
            return f"{counts}; without a decided vote there is no win rate"
        low, high = interval
        return (
            f"{counts}; win rate {100 * self.win_rate:.0f} % of the decided votes "
            f"({100 * LEVEL:.0f} % interval {100 * low:.0f}–{100 * high:.0f} %)"
        )


def compute_wilson_interval(wins: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share: Wilson, Journal of the American Statistical Association 22, 1927.

    Args:
        wins: of `total`.
        total: at least 1.
        level: of confidence.
    """
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    share = wins / total
    center = share + z**2 / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (center - margin) / scale), min(1.0, (center + margin) / scale)


# -- count ---------------------------------------------------------------------------------------------------


def count_votes(files: Sequence[VoteFile], comparison: BlindComparison) -> list[Tally]:
    """Count the votes of all files, pair by pair.

    Args:
        files: of different sessions.
        comparison: of the page.
    """
    order = {contender.key: place for place, contender in enumerate(comparison.contenders)}
    outcomes: dict[tuple[str, str], Counter[str | None]] = {}
    voters: dict[tuple[str, str], set[str]] = {}
    for file in files:
        for vote in file.votes:
            first, second = sorted((vote.left, vote.right), key=lambda key: order[key])
            outcomes.setdefault((first, second), Counter())[vote.winner] += 1
            voters.setdefault((first, second), set()).add(file.session)

    names = {contender.key: contender.name for contender in comparison.contenders}
    tallies = []
    for pair in sorted(outcomes, key=lambda pair: (order[pair[0]], order[pair[1]])):
        first, second = pair
        outcome = outcomes[pair]
        tally = Tally(
            first=names[first],
            second=names[second],
            first_wins=outcome[first],
            second_wins=outcome[second],
            ties=outcome[None],
            num_voters=len(voters[pair]),
        )
        tallies.append(tally)
    return tallies


def drop_repeated_sessions(files: Sequence[VoteFile]) -> tuple[list[VoteFile], list[str]]:
    """Keep one file of each session: the one with the most votes.

    Returns:
        The files that count, and a line for each that does not.
    """
    kept: dict[str, VoteFile] = {}
    notes = []
    for file in files:
        other = kept.setdefault(file.session, file)
        if other is file:
            continue
        counted, dropped = (other, file) if len(other.votes) >= len(file.votes) else (file, other)
        kept[file.session] = counted
        notes.append(f"{dropped.path} holds votes of the same person as {counted.path}, and is not counted")
    return list(kept.values()), notes


# -- read ----------------------------------------------------------------------------------------------------


def read_vote_file(path: Path, comparison: BlindComparison) -> VoteFile:
    """Read a file that the page's blind comparison saved.

    Args:
        path: of the file.
        comparison: of the page that the votes must be about.

    Raises:
        FileError: it is missing, is no such file, is about another report, or names what the page has not.
    """
    content = read_content(path)
    version = content.get(FORMAT_KEY)
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path} has votes of format {version}; this version of int8run reads format {FORMAT_VERSION}; "
            "save them again from a report of this version"
        )
    if content.get("report") != comparison.report_id:
        title, other_id = (str(content.get(key))[:MAX_SHOWN_LENGTH] for key in ("title", "report"))
        raise FileError(
            f"{path} has votes of another report, {title!r} (id {make_visible(other_id)}), and "
            f"this one has the id {comparison.report_id}; task.path= names the folder with the runs that "
            "were voted on, or leave the file out of task.votes"
        )
    session, entries = content.get("session"), content.get("votes")
    if not isinstance(session, str) or not session or not isinstance(entries, list):
        raise make_damaged_error(path, "it has no session or no list of votes")
    votes = [read_vote(path, entry, comparison) for entry in entries]
    check_no_repeats(path, votes)
    return VoteFile(path, session, votes)


def read_content(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file of votes.

    Raises:
        FileError: it is missing or is no such file.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise make_damaged_error(path, f"it has {size} bytes, more than {MAX_FILE_BYTES}")
        content = parse_untrusted_json(path.read_bytes())
    except OSError as error:
        raise FileError(f"task.votes: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise make_damaged_error(path, f"it {error}") from error
    if not isinstance(content, dict) or FORMAT_KEY not in content:
        raise make_damaged_error(path, f"it has no {FORMAT_KEY}")
    return content


def read_vote(path: Path, entry: object, comparison: BlindComparison) -> Vote:
    """One vote of a file.

    Raises:
        FileError: when it is not about a pair of the page.
    """
    if not isinstance(entry, dict):
        raise make_damaged_error(path, "a vote is no object")
    sample, left, right = entry.get("sample"), entry.get("left"), entry.get("right")
    choice = entry.get("choice")
    if not isinstance(sample, int) or isinstance(sample, bool):
        raise make_unknown_vote_error(path, entry)
    if not isinstance(left, str) or not isinstance(right, str) or not isinstance(choice, str):
        raise make_unknown_vote_error(path, entry)
    keys = {contender.key for contender in comparison.contenders}
    is_known = 0 <= sample < len(comparison.samples) and {left, right} <= keys
    if not is_known or choice not in (LEFT, RIGHT, EQUAL):
        raise make_unknown_vote_error(path, entry)
    vote = Vote(sample, left, right, choice)
    if not is_pair(comparison.samples[vote.sample], vote):
        raise make_damaged_error(path, f"the page has no pair of {left} and {right} of sample {sample}")
    return vote


def is_pair(sample: BlindSample, vote: Vote) -> bool:
    """Whether a vote is about two contenders that have different images of a sample."""
    images = sample.get_pair(vote.left, vote.right)
    return images is not None and images[0] != images[1]


def check_no_repeats(path: Path, votes: Sequence[Vote]) -> None:
    """Raise FileError where one person voted twice on the same pair."""
    seen: set[tuple[int, frozenset[str]]] = set()
    for vote in votes:
        pair = (vote.sample, frozenset((vote.left, vote.right)))
        if pair in seen:
            raise make_damaged_error(
                path, f"it has two votes on {vote.left} and {vote.right} of sample {vote.sample}"
            )
        seen.add(pair)


def make_unknown_vote_error(path: Path, entry: object) -> FileError:
    """The error for a vote on something that the page has not."""
    return make_damaged_error(
        path, f"the vote {str(entry)[:MAX_SHOWN_LENGTH]} is not about images of this report"
    )


def make_damaged_error(path: Path, reason: str) -> FileError:
    """The error for a file that no blind comparison saved like this."""
    return FileError(
        f"task.votes: {path} is no file of votes: {reason}; the button “Save votes” of a report writes one"
    )
