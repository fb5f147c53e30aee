"""Votes of blind comparisons: read with distrust, counted pair by pair, with an interval."""

import json

import pytest
from scipy.stats import binomtest

from int8run.errors import FileError
from int8run.report.blind_pairs import BlindComparison, BlindSample, Contender
from int8run.report.votes import (
    compute_wilson_interval,
    count_votes,
    drop_repeated_sessions,
    read_vote_file,
)

SAMPLE = BlindSample("fox", {"#0": "p1", "#1": "p2"}, {"#0": "p0", "#1": "p0"})
EQUAL_SAMPLE = BlindSample("owl", {"#0": "p0", "#1": "p3"}, {"#0": "p0", "#1": "p0"})
COMPARISON = BlindComparison(
    "1234567890abcdef",
    [Contender("float", "float"), Contender("#0", "#0 none"), Contender("#1", "#1 convrot")],
    [SAMPLE, EQUAL_SAMPLE, SAMPLE],
)


def make_vote(choice="left", sample=0, left="float", right="#1"):
    return {"sample": sample, "left": left, "right": right, "choice": choice}


def write_votes(path, votes, session="s", **changes):
    content = {
        "int8run_votes": 1,
        "report": COMPARISON.report_id,
        "title": "a sweep",
        "session": session,
        "votes": votes,
    }
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(("wins", "total"), [(0, 1), (5, 9), (30, 30), (400, 1000)])
def test_the_interval_is_that_of_scipy(wins, total):
    expected = binomtest(wins, total).proportion_ci(0.95, method="wilson")

    assert compute_wilson_interval(wins, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_votes_of_several_people_are_counted_whatever_the_sides(tmp_path):
    anna = [make_vote("left"), make_vote("right", sample=2), make_vote("equal", 1)]
    ben = [make_vote("left", left="#1", right="float"), make_vote("left", 0, "#0", "#1")]
    files = [
        read_vote_file(write_votes(tmp_path / "a.json", anna, "anna"), COMPARISON),
        read_vote_file(write_votes(tmp_path / "b.json", ben, "ben"), COMPARISON),
    ]

    float_tally, run_tally = count_votes(files, COMPARISON)

    assert (float_tally.first, float_tally.second) == ("float", "#1 convrot")
    assert (float_tally.first_wins, float_tally.second_wins, float_tally.ties) == (1, 2, 1)
    assert float_tally.num_voters == 2
    assert float_tally.win_rate == pytest.approx(2 / 3)
    assert (run_tally.first_wins, run_tally.second_wins, run_tally.num_voters) == (1, 0, 1)
    assert "#1 convrot was better 2 times, float 1 time, no difference 1 time" in float_tally.describe()


def test_ties_alone_have_no_win_rate(tmp_path):
    path = write_votes(tmp_path / "a.json", [make_vote("equal")])

    (tally,) = count_votes([read_vote_file(path, COMPARISON)], COMPARISON)

    assert tally.win_rate is None and tally.interval is None
    assert "there is no win rate" in tally.describe()


def test_two_files_of_one_person_count_once(tmp_path):
    early = read_vote_file(write_votes(tmp_path / "early.json", [make_vote()]), COMPARISON)
    late = read_vote_file(write_votes(tmp_path / "late.json", [make_vote(), make_vote(sample=2)]), COMPARISON)

    kept, notes = drop_repeated_sessions([early, late])

    assert kept == [late]
    assert len(notes) == 1 and "early.json" in notes[0]


def test_a_long_title_of_somebody_else_is_shortened(tmp_path):
    path = write_votes(tmp_path / "a.json", [make_vote()], report="\x1b[2J", title="x" * 100_000)

    with pytest.raises(FileError) as error:
        read_vote_file(path, COMPARISON)

    assert len(str(error.value)) < 1000 and r"(id \x1b[2J)" in str(error.value)


def test_votes_of_another_report_are_refused_by_name(tmp_path):
    path = write_votes(tmp_path / "a.json", [make_vote()], report="0" * 16, title="another sweep")

    with pytest.raises(FileError, match=r"a\.json has votes of another report, 'another sweep' \(id 0{16}\)"):
        read_vote_file(path, COMPARISON)


def test_votes_of_another_format_are_refused(tmp_path):
    path = write_votes(tmp_path / "a.json", [make_vote()], int8run_votes=2)

    with pytest.raises(FileError, match="votes of format 2; this version of int8run reads format 1"):
        read_vote_file(path, COMPARISON)


@pytest.mark.parametrize(
    ("vote", "reason"),
    [
        (make_vote("best"), "is not about images of this report"),
        (make_vote(sample=3), "is not about images of this report"),
        (make_vote(sample=True), "is not about images of this report"),
        (make_vote(left="#7"), "is not about images of this report"),
        (make_vote(left=[]), "is not about images of this report"),
        (make_vote(choice=[]), "is not about images of this report"),
        (make_vote(sample=1, right="#0"), "no pair of float and #0 of sample 1"),
        (make_vote(left="#1"), "no pair of #1 and #1"),
        ("left", "a vote is no object"),
    ],
)
def test_a_vote_on_what_the_page_has_not_is_refused(tmp_path, vote, reason):
    path = write_votes(tmp_path / "a.json", [vote])

    with pytest.raises(FileError, match=reason):
        read_vote_file(path, COMPARISON)


def test_a_pair_with_two_votes_of_one_person_is_refused(tmp_path):
    votes = [make_vote("left"), make_vote("left", left="#1", right="float")]

    with pytest.raises(FileError, match="two votes on #1 and float of sample 0"):
        read_vote_file(write_votes(tmp_path / "a.json", votes), COMPARISON)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"int8run_votes": 1', '{"metrics": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)

    with pytest.raises(FileError, match="is no file of votes"):
        read_vote_file(path, COMPARISON)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"task\.votes: .*missing\.json cannot be read"):
        read_vote_file(tmp_path / "missing.json", COMPARISON)
