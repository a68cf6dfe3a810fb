"""The course of one question: whom it is sent to, when somebody else is tried, what ends it.

Lives here: the decisions, as a state machine. Pure: it is told what happened and when, and says
what to begin and what to close. Must not: send, wait (fetch.py), or read messages (reading.py).

What is sent is an `Attempt`; it stays open when another begins, so a late reply is as good as any:
of each upstream the last late one. The times between grow, so who answers at all answers that one.
- Nothing within the upstream's time-out: the next upstream is asked too.
- An error, or a reply that is of no use: the next upstream is asked at once.
- A truncated reply, one with another spelling, or several that are not the reply: the same upstream
  over TCP.
- An upstream that was down for long enough is asked beside the first, so nobody waits for it.
"""

from vipd.dns.forward import wire
from vipd.dns.forward.attempt import Attempt, Steps
from vipd.dns.forward.group import Group
from vipd.dns.forward.question import Question, Reply, failure
from vipd.dns.forward.reading import Unwanted
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.standing import Standing

UNWANTED_BEFORE_TCP = 3
"""Datagrams that are not the reply, until the question is taken where they cannot be forged."""
FAILURE_TTL = 1
"""Seconds for which a failure counts (RFC 9520: at least 1); cache.py makes more of it."""
_NO_EDNS = frozenset({wire.FORMERR, wire.NOTIMP, wire.BADVERS})
_UNLIKELY_FORGED = frozenset(
    {Unwanted.SPELLING, Unwanted.COOKIE, Unwanted.MALFORMED, Unwanted.LARGE}
)
"""These have the right id and question: it was the upstream, or it has to be known at once."""
MOST_AGAIN = 3
"""Ways in which one upstream is asked: without EDNS, with its cookie, over TCP."""
MOST_LATE = 1
"""Attempts at one upstream that are late and open beside the last one: each has a socket."""
_TCP_TIMES = 3
"""A reply over TCP takes a handshake more, and whoever truncates has more to say."""


class Course:
    """One question. After `begin`, call `wake` whenever `due` has come, until `is_over`."""

    def __init__(
        self, question: Question, group: Group, settings: ForwardSettings, bits: wire.RandomBits
    ) -> None:
        self.question = question
        self.result: Reply | None = None
        """Set once. What is open afterwards are trials of upstreams that were down."""
        self._group = group
        self._settings = settings
        self._order = group.order(bits)
        self._at = 0
        self._left = settings.attempts
        self._open: list[Attempt] = []
        self._useless: Reply | None = None
        """The last reply that was of no use."""
        self._hopeless: set[Standing] = set()
        """Who said that it will not, or cannot be reached: not asked twice."""
        self._only_errors = True
        """Whether all that came back were errors of the network."""
        self._is_short = False
        """Whether it was this node that had no socket or port."""
        self._ends = 0.0
        self._steps = Steps([], [])

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.result is not None and not self._open

    @property
    def due(self) -> float:
        """When to call `wake`. It may have passed."""
        times = [one.due for one in self._open if not one.is_late]
        if self.result is None:
            times.append(self._ends)
        return min(times, default=self._ends)

    # What happens

    def begin(self, now: float) -> Steps:
        """Ask the first upstream."""
        self._ends = now + self._settings.question_seconds
        trial = self._group.on_trial(now)
        self._next(now)
        if trial is not None and self._open and self._open[0].standing is not trial:
            trial.on_trial(now)
            self._send(trial, now, trial=True)
        elif trial is not None and self._open:
            trial.on_trial(now)
        return self._done()

    def wake(self, now: float) -> Steps:
        """Do what is due."""
        for one in tuple(self._open):
            if not one.is_late and now >= one.due:
                one.is_late = True
                one.standing.late(now)
                if one.is_trial or self.result is not None:
                    self._close(one)
                else:
                    self._only_errors = False
                    self._next(now)
        if now >= self._ends and self.result is None:
            self._give_up()
        return self._done()

    def heard(self, attempt: Attempt, reply: Reply, now: float) -> Steps:
        """Take the reply to an attempt."""
        if attempt not in self._open:
            return self._done()
        self._only_errors = False
        standing = attempt.standing
        if reply.server_cookie or attempt.tcp:  # without one over TCP, where none is insisted on
            standing.server_cookie = reply.server_cookie
        if not attempt.tcp:
            standing.spelling_kept()
        if reply.is_final:
            self._finished(attempt, reply, now)
        elif attempt.again >= MOST_AGAIN:
            self._of_no_use(attempt, reply, now)
        elif reply.is_truncated and not attempt.tcp:
            standing.answered(now - attempt.started)
            self._again(attempt, now, tcp=True, edns=attempt.edns)
        elif reply.rcode == wire.BADCOOKIE and not attempt.tcp:
            # Our server cookie was too old; the reply has brought a new one.
            self._again(attempt, now, tcp=attempt.again > 0, edns=attempt.edns)
        elif reply.rcode in _NO_EDNS and attempt.edns:
            self._again(attempt, now, tcp=attempt.tcp, edns=False)
        else:
            self._of_no_use(attempt, reply, now)
        return self._done()

    def came(self, attempt: Attempt) -> Steps:
        """Take it that what seems to be the reply is there, and takes a while to be read.

        It is not late meanwhile: nobody else would be heard sooner.
        """
        attempt.due = self._ends
        return self._done()

    def unwanted(self, attempt: Attempt, why: Unwanted, now: float) -> Steps:
        """Take something that came and is not the reply. The reply may still come."""
        if attempt not in self._open:
            return self._done()
        self._only_errors = False
        attempt.unwanted += 1
        if attempt.due >= self._ends:  # it came, and was nothing
            attempt.due = now + attempt.standing.timeout
        if why is Unwanted.SPELLING:
            attempt.standing.spelling_lost(now)
        if attempt.tcp:
            # There is no one else on this connection; what comes now is not better.
            self._failed(attempt, now)
        elif attempt.again == 0 and (
            why in _UNLIKELY_FORGED or attempt.unwanted >= UNWANTED_BEFORE_TCP
        ):
            attempt.again = 1
            begun = self._send(
                attempt.standing, now, tcp=True, edns=attempt.edns, trial=attempt.is_trial
            )
            begun.why = why
        return self._done()

    def broken(self, attempt: Attempt, now: float, *, its_fault: bool = True) -> Steps:
        """Take it that the upstream cannot be reached, or that there is no socket to reach it."""
        if attempt in self._open:
            if attempt.why is Unwanted.SPELLING and its_fault:
                # It has no TCP to make sure, and names in lower case are all that it can do.
                attempt.standing.lower_case(now)
                self._again(attempt, now, tcp=False, edns=attempt.edns)
                return self._done()
            self._is_short = self._is_short or not its_fault
            self._hopeless.add(attempt.standing)
            self._failed(attempt, now, its_fault=its_fault)
        return self._done()

    # What follows

    def _finished(self, attempt: Attempt, reply: Reply, now: float) -> None:
        standing = attempt.standing
        if attempt.tcp and not standing.upstream.tcp:
            standing.alive()
        else:
            standing.answered(now - attempt.started)
        if not attempt.edns and standing.knows_edns(now):
            standing.without_edns(now)
        self._close(attempt)
        if self.result is None:
            self._end(reply)

    def _of_no_use(self, attempt: Attempt, reply: Reply, now: float) -> None:
        self._useless = reply
        if reply.rcode == wire.SERVFAIL:
            attempt.standing.alive()  # it could not find out: that is the name's fault
            self._hopeless.add(attempt.standing)
            self._close(attempt)
            self._next_if_nobody_answers(now)
        else:
            self._hopeless.add(attempt.standing)
            self._failed(attempt, now)

    def _failed(self, attempt: Attempt, now: float, *, its_fault: bool = True) -> None:
        if its_fault:
            attempt.standing.failed(now)
        self._close(attempt)
        self._next_if_nobody_answers(now)

    def _next_if_nobody_answers(self, now: float) -> None:
        """Ask the next, unless somebody is being asked whose time is not over."""
        if all(one.is_late or one.is_trial for one in self._open if one.is_open):
            self._next(now)

    def _again(self, attempt: Attempt, now: float, *, tcp: bool, edns: bool) -> None:
        """Ask the same upstream in another way, instead of this attempt."""
        self._close(attempt)
        begun = self._send(attempt.standing, now, tcp=tcp, edns=edns, trial=attempt.is_trial)
        begun.again = attempt.again + 1

    def _next(self, now: float) -> None:
        """Ask the next of the order; after the last, the first again."""
        if self.result is not None:
            return
        for _ in range(len(self._order)):
            standing = self._order[self._at % len(self._order)]
            self._at += 1
            has_room = not standing.is_full or bool(self._open_at(standing))
            if standing not in self._hopeless and self._left > 0 and has_room:
                self._send(standing, now)
                return

    def _send(
        self,
        standing: Standing,
        now: float,
        *,
        tcp: bool = False,
        edns: bool = True,
        trial: bool = False,
    ) -> Attempt:
        made = Attempt(standing, tcp=tcp, edns=edns, trial=trial)
        # Each round has twice as long as the one before: what is lost may be too much as it is.
        rounds = max(0, self._at - 1) // max(1, len(self._order))
        seconds = standing.timeout * (_TCP_TIMES if made.tcp else 1) * 2**rounds
        made.started = now
        made.due = now + min(seconds, self._settings.most_timeout_seconds)
        self._left -= 1
        beside = self._open_at(standing)
        if not beside:
            standing.in_flight += 1
        for one in [late for late in beside if late.is_late][:-MOST_LATE]:
            self._close(one)
        self._open.append(made)
        self._steps.begin.append(made)
        return made

    def _close(self, attempt: Attempt) -> None:
        if attempt.is_open:
            attempt.is_open = False
            if not self._open_at(attempt.standing):
                attempt.standing.in_flight -= 1
            self._steps.close.append(attempt)

    def _open_at(self, standing: Standing) -> list[Attempt]:
        return [one for one in self._open if one.is_open and one.standing is standing]

    def _end(self, reply: Reply) -> None:
        self.result = reply
        for one in self._open:
            if not one.is_trial:
                self._close(one)

    def _give_up(self) -> None:
        tried = self._left < self._settings.attempts
        silent = any(one.is_open for one in self._open)
        only_errors = tried and self._only_errors and not silent
        error = wire.EDE_NETWORK if only_errors else wire.EDE_UNREACHABLE
        if self._useless is not None and self._useless.extended_error is not None:
            error = self._useless.extended_error
        # What is this node's own trouble says nothing of the name.
        is_short = self._is_short or any(one.is_full for one in self._group.members)
        self._end(failure(self.question, error, 0 if is_short else FAILURE_TTL))

    def _done(self) -> Steps:
        self._open = [one for one in self._open if one.is_open]
        if self.result is None and not any(not one.is_trial for one in self._open):
            self._give_up()
            self._open = [one for one in self._open if one.is_open]
        steps, self._steps = self._steps, Steps([], [])
        # What was begun and closed at once is nobody's business.
        return Steps([one for one in steps.begin if one.is_open], steps.close)
