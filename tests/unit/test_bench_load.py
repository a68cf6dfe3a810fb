"""The load's arithmetic: what counts as harm, and sums over hosts."""

import os
import time

from vipd.bench.load_loop import Loop
from vipd.bench.load_work import Count, Failure, Kind, Report, Target, total


def report(seconds: float = 2.0, **counts: Count) -> Report:
    return Report({Kind[kind]: count for kind, count in counts.items()}, [], seconds)


class TestReports:
    def test_hosts_add_up_but_for_time_and_the_slowest(self) -> None:
        one = report(2.0, NEW_TCP=Count(begun=10, answers=9, failed=1, slowest_seconds=0.5))
        two = report(3.0, NEW_TCP=Count(begun=5, answers=5, resent=2, slowest_seconds=0.25))
        together = total([one, two])
        count = together.counts[Kind.NEW_TCP]
        assert count == Count(begun=15, answers=14, failed=1, resent=2, slowest_seconds=0.5)
        assert (together.seconds, together.attempts, together.failed) == (3.0, 15, 1)
        assert together.rate == 14 / 3

    def test_failures_are_told_in_the_order_of_time(self) -> None:
        def failed(at: float) -> Failure:
            return Failure(at, "node", Kind.NEW_TCP, "10.96.0.1:80/tcp", 4242, "refused")

        one, two = Report({}, [failed(1.0), failed(3.0)]), Report({}, [failed(2.0)])
        assert [failure.at for failure in total([one, two]).failures] == [1.0, 2.0, 3.0]
        assert str(failed(1.0)) == "new TCP node:4242 → 10.96.0.1:80/tcp: refused"

    def test_a_udp_flow_that_moves_is_broken_and_one_resent_segment_is_no_harm(self) -> None:
        moved = report(KEPT_UDP=Count(begun=2, answers=9, moved=1))
        assert (moved.broken_udp, moved.harmed) == (1, True)
        resent = report(NEW_TCP=Count(begun=2, answers=2, resent=1))
        assert (resent.resent, resent.harmed) == (1, False)

    def test_idle_and_long_flows_count_as_kept(self) -> None:
        kept = report(
            KEPT_TCP=Count(begun=1),
            DOWNLOAD=Count(begun=1, failed=1),
            IDLE_TCP=Count(begun=1, failed=1),
            IDLE_UDP=Count(begun=1),
        )
        assert (kept.long_tcp, kept.broken_tcp, kept.long_udp, kept.attempts) == (3, 2, 1, 0)

    def test_targets_are_spelled_as_in_a_url(self) -> None:
        assert str(Target("10.96.0.1", 80, "tcp")) == "10.96.0.1:80/tcp"
        assert str(Target("fd00::1", 53, "udp")) == "[fd00::1]:53/udp"


class TestLoop:
    def test_calls_come_in_the_order_of_their_moments(self) -> None:
        loop, seen = Loop(), []
        now = time.monotonic()
        loop.at(now + 0.002, loop.stop)
        loop.at(now + 0.001, lambda: seen.append("second"))
        loop.at(now, lambda: seen.append("first"))
        loop.run()
        assert seen == ["first", "second"]

    def test_what_is_readable_is_told_until_it_is_forgotten(self) -> None:
        loop, seen = Loop(), []
        reading, writing = os.pipe()

        def told() -> None:
            seen.append(os.read(reading, 1))
            if len(seen) == 2:
                loop.forget(reading)
                loop.after(0.0, loop.stop)

        loop.watch_input(reading, told)
        os.write(writing, b"abc")
        loop.run()
        assert seen == [b"a", b"b"]
        for descriptor in (reading, writing):
            os.close(descriptor)
