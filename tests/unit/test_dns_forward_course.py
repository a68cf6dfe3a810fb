"""Whom a question is sent to and when, and what is learned of upstreams: with a clock by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from vipd.dns.forward import wire
from vipd.dns.forward.attempt import Attempt, Steps
from vipd.dns.forward.course import Course
from vipd.dns.forward.group import Group
from vipd.dns.forward.question import Question, Reply
from vipd.dns.forward.reading import Unwanted
from vipd.dns.forward.settings import ForwardSettings, Policy
from vipd.dns.forward.standing import FOLDED_BEFORE_PLAIN, PLAIN_SECONDS, Standing
from vipd.dns.forward.upstream import Upstream

QUESTION = Question(b"\x03www\x00", wire.A)
GOOD = Reply(wire.NOERROR, b"a message", 60)
TRUNCATED = Reply(wire.NOERROR, is_truncated=True)
FIRST, LEAST, MOST, ALL = 0.4, 0.05, 2.0, 4.0


def no_lots(_: int) -> int:
    """Lots that are neither the first nor the last."""
    return 1


class Played:
    """A course, and what it wants; upstreams are called by their numbers, from 0."""

    def __init__(self, upstreams: int = 2, policy: Policy = Policy.IN_ORDER, **more: Any) -> None:
        self.settings = ForwardSettings(policy=policy, **more)
        self.standings = [
            Standing(Upstream(f"192.0.2.{n}", tcp=n in more.get("tcp", ())), self.settings, b"")
            for n in range(upstreams)
        ]
        self.group = Group(self.standings, policy)
        self.now = 100.0
        self.open: list[Attempt] = []
        self.new()

    def new(self) -> None:
        """Begin another question."""
        self.course = Course(QUESTION, self.group, self.settings, no_lots)

    def number(self, attempt: Attempt) -> int:
        return self.standings.index(attempt.standing)

    def begin(self) -> list[str]:
        return self._took(self.course.begin(self.now))

    def at_due(self) -> list[str]:
        """Let time pass until something is due, and return what begins then."""
        self.now = self.course.due
        return self._took(self.course.wake(self.now))

    def heard(self, reply: Reply, attempt: int = -1, after: float = 0.0) -> list[str]:
        self.now += after
        return self._took(self.course.heard(self.open[attempt], reply, self.now))

    def unwanted(self, why: Unwanted, attempt: int = -1) -> list[str]:
        return self._took(self.course.unwanted(self.open[attempt], why, self.now))

    def broken(self, attempt: int = -1, *, its_fault: bool = True) -> list[str]:
        return self._took(self.course.broken(self.open[attempt], self.now, its_fault=its_fault))

    def _took(self, steps: Steps) -> list[str]:
        for one in steps.close:
            if one in self.open:
                self.open.remove(one)
        self.open += steps.begin
        return [
            str(self.number(one))
            + " tcp" * one.tcp
            + " plain" * (not one.edns)
            + " trial" * one.is_trial
            for one in steps.begin
        ]

    def result(self) -> tuple[int, int | None, int]:
        found = self.course.result
        assert found is not None
        return found.rcode, found.extended_error, found.ttl


def test_the_first_that_answers_ends_it() -> None:
    one = Played()
    assert (one.begin(), one.course.is_over) == (["0"], False)
    assert one.heard(GOOD, after=0.02) == []
    assert (one.course.result, one.course.is_over) == (GOOD, True)
    assert one.open == []
    assert [standing.in_flight for standing in one.standings] == [0, 0]


def test_time_outs_bring_in_the_next_and_then_the_first_again_for_twice_as_long() -> None:
    one = Played()
    one.begin()
    due = []
    for expected in (["1"], ["0"], ["1"]):
        due.append(one.course.due - 100)
        assert one.at_due() == expected
        assert [standing.in_flight for standing in one.standings].count(0) == 0
    # The second round waits twice the time-out, which itself has doubled.
    assert due == [pytest.approx(0.4), pytest.approx(0.8), pytest.approx(2.4)]
    assert one.course.result is None
    assert one.at_due() == []
    assert one.now == 104.0
    assert one.result() == (wire.SERVFAIL, wire.EDE_UNREACHABLE, 1)
    assert one.course.is_over
    assert [standing.in_flight for standing in one.standings] == [0, 0]


def test_a_late_reply_is_as_good_as_any() -> None:
    one = Played()
    one.begin()
    one.at_due()
    assert one.heard(GOOD, attempt=0, after=0.1) == []
    assert one.course.result == GOOD
    assert one.open == []
    assert one.standings[0].failures == 0
    assert one.standings[0].smoothed == pytest.approx(0.5)


def test_a_question_counts_once_and_holds_two_sockets_of_an_upstream() -> None:
    """Other questions have the places that its further attempts would take."""
    one = Played(1, questions_of_upstream=1, question_seconds=30.0, first_timeout_seconds=0.1)
    assert one.begin() == ["0"]
    first = one.open[0]
    for count in (2, 2, 2, 2, 2):
        assert one.at_due() == ["0"], "it may be asked again, full as it is"
        assert len(one.open) == count
        assert one.standings[0].in_flight == 1
    assert first not in one.open
    # Of two, the late one is still as good as any.
    assert one.heard(GOOD, attempt=0) == []
    assert one.course.result == GOOD
    assert (one.open, one.standings[0].in_flight) == ([], 0)


def test_what_is_there_and_being_read_is_not_late() -> None:
    one = Played(2)
    one.begin()
    one.course.came(one.open[0])
    assert one.course.due == 104.0
    assert one.heard(GOOD, after=1.5) == []
    assert (one.course.result, one.standings[0].failures) == (GOOD, 0)
    # It may be nothing after all.
    one.new()
    one.begin()
    one.course.came(one.open[0])
    assert one.unwanted(Unwanted.MALFORMED) == ["0 tcp"]
    assert one.broken() == []
    assert one.at_due() == ["1"]
    assert one.now < 105.5


def test_of_several_upstreams_each_has_a_late_one() -> None:
    one = Played(2, question_seconds=30.0, first_timeout_seconds=0.1)
    one.begin()
    for _ in range(5):
        one.at_due()
        assert [standing.in_flight for standing in one.standings] == [1, 1]
    assert sorted(map(one.number, one.open)) == [0, 0, 1, 1]
    one.heard(TRUNCATED)
    assert [standing.in_flight for standing in one.standings] == [1, 1]
    one.heard(GOOD)
    assert [standing.in_flight for standing in one.standings] == [0, 0]


def test_attempts_are_bounded() -> None:
    one = Played(1, attempts=3, question_seconds=30.0, most_timeout_seconds=1.0)
    sent = len(one.begin())
    while one.course.result is None:
        sent += len(one.at_due())
    assert sent == 3
    assert one.now == 130.0


@pytest.mark.parametrize(
    "reply", [Reply(wire.SERVFAIL), Reply(wire.REFUSED), Reply(0, is_lame=True)]
)
def test_a_useless_reply_brings_in_the_next_at_once(reply: Reply) -> None:
    one = Played()
    one.begin()
    assert one.heard(reply) == ["1"]
    assert one.heard(reply) == []
    assert one.result() == (wire.SERVFAIL, wire.EDE_UNREACHABLE, 1)
    # SERVFAIL is the name's fault.
    assert one.standings[0].failures == (reply.rcode != wire.SERVFAIL)


def test_a_useless_reply_behind_time_does_not_bring_in_a_third() -> None:
    one = Played(3)
    one.begin()
    assert one.at_due() == ["1"]
    assert one.heard(Reply(wire.SERVFAIL), attempt=0) == []
    assert one.heard(Reply(wire.SERVFAIL)) == ["2"]


def test_the_reason_of_an_upstream_is_told() -> None:
    one = Played(1)
    one.begin()
    one.heard(Reply(wire.SERVFAIL, extended_error=6))
    assert one.result() == (wire.SERVFAIL, 6, 1)


def test_errors_of_the_network_bring_in_the_next_and_end_it_at_once() -> None:
    one = Played()
    one.begin()
    assert one.broken() == ["1"]
    assert one.broken() == []
    assert one.result() == (wire.SERVFAIL, wire.EDE_NETWORK, 1)
    assert [standing.failures for standing in one.standings] == [1, 1]


def test_what_is_not_the_upstreams_fault_is_not_held_against_it_nor_the_name() -> None:
    one = Played(1)
    one.begin()
    one.broken(its_fault=False)
    assert one.result() == (wire.SERVFAIL, wire.EDE_NETWORK, 0)
    assert one.standings[0].failures == 0


def test_one_that_was_refused_and_one_that_is_silent_is_no_error_of_the_network() -> None:
    one = Played(question_seconds=0.3)
    one.begin()
    one.broken()
    one.at_due()
    assert one.result() == (wire.SERVFAIL, wire.EDE_UNREACHABLE, 1)


def test_nobody_to_ask_is_a_failure_at_once() -> None:
    one = Played(0)
    assert one.begin() == []
    assert one.result() == (wire.SERVFAIL, wire.EDE_UNREACHABLE, 1)
    assert one.course.is_over


def test_a_truncated_reply_goes_to_tcp_even_when_no_attempt_is_left() -> None:
    one = Played(1, attempts=1)
    one.begin()
    assert one.heard(TRUNCATED) == ["0 tcp"]
    assert len(one.open) == 1
    one.heard(GOOD)
    assert one.course.result == GOOD


def test_tcp_takes_its_time() -> None:
    one = Played()
    one.begin()
    one.heard(TRUNCATED, after=0.1)
    # 0.1 + 4 x 0.05, three times.
    assert one.course.due - one.now == pytest.approx(0.9)
    assert one.at_due() == ["1"]


def test_what_is_not_the_reply_does_not_end_the_wait() -> None:
    one = Played(1)
    one.begin()
    assert one.unwanted(Unwanted.ID) == one.unwanted(Unwanted.QUESTION) == []
    assert one.unwanted(Unwanted.ID) == ["0 tcp"]
    # Once is enough, and the socket stays open.
    assert one.unwanted(Unwanted.ID, attempt=0) == []
    assert len(one.open) == 2
    one.heard(GOOD, attempt=0)
    assert one.course.is_over


@pytest.mark.parametrize(
    "why", [Unwanted.SPELLING, Unwanted.COOKIE, Unwanted.MALFORMED, Unwanted.LARGE]
)
def test_what_is_nearly_the_reply_goes_to_tcp_at_once(why: Unwanted) -> None:
    one = Played(1)
    one.begin()
    assert one.unwanted(why) == ["0 tcp"]
    assert one.unwanted(why) == []  # over TCP it is a failure
    assert one.open != []
    one.at_due()
    assert one.course.result is None


def test_a_wrong_reply_over_tcp_brings_in_the_next() -> None:
    one = Played()
    one.begin()
    one.heard(TRUNCATED)
    assert one.unwanted(Unwanted.MALFORMED) == ["1"]


@pytest.mark.parametrize("rcode", [wire.FORMERR, wire.NOTIMP, wire.BADVERS])
def test_one_that_does_not_know_edns_is_asked_without(rcode: int) -> None:
    one = Played(1)
    one.begin()
    assert one.heard(Reply(rcode)) == ["0 plain"]
    assert one.standings[0].knows_edns(one.now)
    one.heard(GOOD)
    assert not one.standings[0].knows_edns(one.now)
    assert one.standings[0].knows_edns(one.now + PLAIN_SECONDS)


def test_one_that_says_formerr_to_everything_is_given_up() -> None:
    one = Played(1)
    one.begin()
    assert one.heard(Reply(wire.FORMERR)) == ["0 plain"]
    assert one.heard(Reply(wire.FORMERR)) == []
    assert one.result()[0] == wire.SERVFAIL
    assert one.standings[0].knows_edns(one.now)


def test_bad_cookies_without_end_come_to_an_end() -> None:
    one = Played(1)
    one.begin()
    bad = Reply(wire.BADCOOKIE, server_cookie=b"new")
    assert one.heard(bad) == ["0"]
    assert one.heard(bad) == ["0 tcp"]
    assert one.heard(bad) == []
    assert one.result()[0] == wire.SERVFAIL


def test_the_server_s_cookie_is_kept_and_forgotten_over_tcp() -> None:
    one = Played(1)
    one.begin()
    one.heard(GOOD._replace(server_cookie=b"fresh"))
    assert one.standings[0].server_cookie == b"fresh"
    one.new()
    one.begin()
    one.heard(GOOD)
    assert one.standings[0].server_cookie == b"fresh"
    one.new()
    one.begin()
    one.heard(TRUNCATED)
    one.heard(GOOD)
    assert one.standings[0].server_cookie == b""


# What is learned


def down(one: Played, number: int = 0) -> None:
    """Have an upstream go down."""
    for _ in range(one.settings.failures_before_down):
        one.standings[number].failed(one.now)
    assert one.standings[number].is_down


def test_one_that_is_down_is_asked_last() -> None:
    one = Played(3)
    down(one)
    one.new()
    assert one.begin() == ["1"]
    assert one.broken() == ["2"]
    assert one.broken() == ["0"]


def test_one_that_was_down_is_tried_beside_another_and_is_back_with_one_success() -> None:
    one = Played()
    down(one)
    one.now += 1.0
    one.new()
    assert one.begin() == ["1", "0 trial"]
    # While it is on trial, others are left in peace.
    second = Course(QUESTION, one.group, one.settings, no_lots)
    assert len(second.begin(one.now).begin) == 1
    one.heard(GOOD, attempt=0)
    assert (one.course.result, one.course.is_over) == (GOOD, False)
    assert [one.number(attempt) for attempt in one.open] == [0]
    one.heard(GOOD)
    assert one.open == []
    assert not one.standings[0].is_down


def test_the_trial_may_win() -> None:
    one = Played()
    down(one)
    one.now += 1.0
    one.new()
    one.begin()
    one.heard(GOOD, attempt=1)
    assert one.course.result == GOOD
    assert one.course.is_over


def test_a_trial_that_fails_makes_the_next_wait_longer() -> None:
    one = Played()
    down(one)
    waits = []
    for _ in range(6):
        begun = one.now
        while not one.standings[0].trial_is_due(one.now):
            one.now += 0.125
        waits.append(one.now - begun)
        one.new()
        assert one.begin() == ["1", "0 trial"]
        one.heard(GOOD, attempt=0)
        one.at_due()
        assert one.course.is_over
    assert waits == pytest.approx([1, 2, 4, 8, 10, 10])


def test_all_down_are_asked_all_the_same() -> None:
    one = Played()
    down(one, 0)
    down(one, 1)
    assert one.group.all_down
    one.new()
    assert one.begin() == ["0"]
    assert one.broken() == ["1"]


def test_time_outs_follow_round_trips() -> None:
    standing = Played(1).standings[0]
    assert standing.timeout == FIRST
    standing.answered(0.1)
    assert standing.timeout == pytest.approx(0.1 + 4 * 0.05)
    for _ in range(50):
        standing.answered(0.001)
    assert standing.timeout == LEAST
    for _ in range(10):
        standing.answered(5.0)
    assert standing.timeout == MOST


def test_time_outs_double_while_it_is_silent() -> None:
    standing = Played(1).standings[0]
    seen = []
    for _ in range(4):
        standing.late(0.0)
        seen.append(standing.timeout)
    assert seen == [0.8, 1.6, 2.0, 2.0]
    standing.alive()
    assert standing.timeout == FIRST


def test_spelling_is_given_up_after_three_in_a_row_and_tried_again() -> None:
    standing = Played(1).standings[0]
    for _ in range(FOLDED_BEFORE_PLAIN - 1):
        standing.spelling_lost(0.0)
    standing.spelling_kept()
    standing.spelling_lost(0.0)
    assert standing.gives_back_spelling(0.0)
    for _ in range(FOLDED_BEFORE_PLAIN):
        standing.spelling_lost(0.0)
    assert not standing.gives_back_spelling(PLAIN_SECONDS - 1)
    assert standing.gives_back_spelling(PLAIN_SECONDS)


def order(policy: Policy, bits: Callable[[int], int], *times: float | None) -> list[int]:
    """Whom a group asks, by number; None is one that never answered."""
    one = Played(len(times), policy)
    for standing, seconds in zip(one.standings, times, strict=True):
        if seconds is not None:
            standing.answered(seconds)
    return [one.standings.index(standing) for standing in one.group.order(bits)]


def test_the_fastest_are_asked_first() -> None:
    never_explore = {5: 1, 32: 0}.__getitem__
    assert order(Policy.FASTEST, never_explore, 0.3, 0.02, 0.1) == [1, 2, 0]
    assert order(Policy.FASTEST, never_explore, 0.3, None, 0.1) == [1, 2, 0]
    # Those who are about as fast share it.
    last = {5: 1, 32: (1 << 32) - 1}.__getitem__
    assert order(Policy.FASTEST, last, 0.03, 0.02, 0.1) == [0, 1, 2]
    # Now and then it is anybody.
    explore = {5: 0, 32: (1 << 32) - 1}.__getitem__
    assert order(Policy.FASTEST, explore, 0.3, 0.02, 0.1) == [0, 1, 2]


def test_in_order_and_at_random() -> None:
    assert order(Policy.IN_ORDER, no_lots, 0.3, 0.02, 0.1) == [0, 1, 2]
    assert order(Policy.RANDOM, lambda _: (1 << 32) - 1, 0.3, 0.02, 0.1) == [2, 1, 0]


def test_those_that_loop_or_are_full_are_left_out() -> None:
    one = Played(3, questions_of_upstream=2)
    one.standings[0].looping = True
    one.standings[1].in_flight = 2
    one.new()
    assert one.begin() == ["2"]
    assert not one.group.is_full
    one.standings[2].in_flight = 2
    assert one.group.is_full
