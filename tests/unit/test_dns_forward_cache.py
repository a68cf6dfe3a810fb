"""What the cache keeps, for how long, and who makes room."""

import gc
import tracemalloc

import pytest

from vipd.dns.forward import wire
from vipd.dns.forward.cache import Cache
from vipd.dns.forward.question import Question, Reply, failure, key_of
from vipd.dns.forward.settings import CacheSettings
from vipd.dns.forward.static import denial
from vipd.dns.names import wire as name_of

KB = 1 << 10
LIMIT = 512 * KB


def positive(name: bytes, ttl: int = 300, records: int = 1) -> Reply:
    answers = tuple(
        wire.record(wire.A, ttl, bytes((10, 0, n >> 8, n & 255))) for n in range(records)
    )
    return Reply(wire.NOERROR, wire.reply(name, wire.A, answers=answers), ttl)


def negative(name: bytes, ttl: int = 30) -> Reply:
    message = denial(name, wire.A, wire.NXDOMAIN, name, ttl)
    return Reply(wire.NXDOMAIN, message, ttl, is_denial=True)


def key(name: bytes) -> bytes:
    return key_of(name, wire.A, False, False)


def named(number: int, domain: str = "example.com") -> bytes:
    return name_of(f"w{number}.{domain}")


def filled(cache: Cache, count: int, domain: str = "example.com", now: float = 0.0) -> None:
    for number in range(count):
        name = named(number, domain)
        cache.put(key(name), positive(name), now)


def there(cache: Cache, count: int, domain: str = "example.com") -> int:
    """How many of them are there, without their being used."""
    return sum(key(named(n, domain)) in cache._entries for n in range(count))


def test_it_never_takes_more_than_its_bytes() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    for number in range(5000):
        name = named(number)
        records = number % 40
        cache.put(key(name), positive(name, records=records), 0.0)
        cache.put(key(named(number, "no")), negative(named(number, "no")), 0.0)
        assert cache.held_bytes <= LIMIT
    assert cache.held_bytes > LIMIT * 0.9
    assert cache.success.evicted > 0
    assert cache.denial.evicted > 0
    assert len(cache.success) + len(cache.denial) == len(cache)


def test_the_bytes_are_what_python_needs() -> None:
    """Measured, so that a limit in a setting is a limit in memory."""
    cache = Cache(CacheSettings(most_bytes=64 << 20))
    filled(cache, 10)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0], cache.held_bytes
        filled(cache, 4000, "other.example")
        for number in range(0, 4000, 2):
            assert cache.fresh(key(named(number, "other.example")), 0.0)
        gc.collect()
        needed = tracemalloc.get_traced_memory()[0] - before[0]
    finally:
        tracemalloc.stop()
    # The allocator loses something, which nobody can see from here.
    assert 0.75 < needed / (cache.held_bytes - before[1]) < 1.0


def test_who_is_asked_for_once_does_not_push_out_who_is_asked_for_again() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    filled(cache, 100)
    for number in range(50):
        assert cache.fresh(key(named(number)), 0.0)
    filled(cache, 10_000, "scan.example")
    assert there(cache, 50) == 50
    assert there(cache, 100) == 50


def test_denials_do_not_push_out_what_exists() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    filled(cache, 300)
    before = there(cache, 300)
    for _ in range(3):
        for number in range(3000):
            name = named(number, "no.example")
            cache.put(key(name), negative(name), 0.0)
            cache.fresh(key(name), 0.0)
    assert there(cache, 300) == before
    assert cache.denial.bytes <= LIMIT * 0.25


def test_of_those_in_use_the_longest_unused_goes_first() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    total = 3000
    for number in range(total):
        name = named(number)
        cache.put(key(name), positive(name), 0.0)
        assert cache.fresh(key(name), 0.0)
        assert cache.fresh(key(named(0)), 0.0)
    assert there(cache, 1) == 1
    assert key(named(total - 1)) in cache._entries
    assert key(named(1)) not in cache._entries


def test_among_the_established_use_counts_and_not_age() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    filled(cache, 300)
    for number in range(300):
        assert cache.fresh(key(named(number)), 0.0)
    assert cache.fresh(key(named(0)), 0.0)  # the oldest, and used again: now the last to go
    filled(cache, 300, "later.example")
    for number in range(300):
        cache.fresh(key(named(number, "later.example")), 0.0)
    filled(cache, 10_000, "scan.example")
    assert 0 < there(cache, 300) < 300
    assert there(cache, 1) == 1
    assert key(named(1)) not in cache._entries


def test_an_entry_that_is_too_large_for_its_share_is_not_kept() -> None:
    cache = Cache(CacheSettings(most_bytes=64 * KB))
    name = named(1)
    cache.put(key(name), positive(name, records=1000), 0.0)
    assert len(cache) == 0
    assert cache.held_bytes == 0


def test_a_smaller_limit_counts_at_once() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    filled(cache, 1000)
    for number in range(1000):
        cache.fresh(key(named(number)), 0.0)
    cache.configure(CacheSettings(most_bytes=LIMIT // 4))
    assert cache.held_bytes <= LIMIT // 4
    assert len(cache) > 0
    cache.configure(CacheSettings(most_bytes=0))
    assert (len(cache), cache.held_bytes) == (0, 0)
    cache.put(key(named(1)), positive(named(1)), 0.0)
    assert len(cache) == 0


def test_an_entry_that_is_renewed_keeps_its_place() -> None:
    cache = Cache(CacheSettings(most_bytes=LIMIT))
    name = named(1)
    cache.put(key(name), positive(name), 0.0)
    cache.fresh(key(name), 0.0)
    cache.put(key(name), positive(name, ttl=20), 400.0)
    filled(cache, 10_000, "scan.example", now=400.0)
    assert cache.fresh(key(name), 419.0)
    assert cache.fresh(key(name), 420.0) is None


def test_ttls_are_lowered_by_whole_seconds_and_never_below_nothing() -> None:
    cache = Cache(CacheSettings())
    name = named(1)
    cache.put(key(name), positive(name, ttl=3, records=2), 10.9)
    for now, ttl in ((10.95, 3), (11.0, 2), (11.99, 2), (12.5, 1), (13.8, 0)):
        entry = cache.fresh(key(name), now)
        assert entry
        message = entry.got(now).message
        offsets = [one.fixed_at + 4 for one in wire.records(message)]
        assert [int.from_bytes(message[at : at + 4], "big") for at in offsets] == [ttl, ttl]
    assert cache.fresh(key(name), 13.95) is None


def test_failures_double_their_time_and_begin_anew_after_a_while() -> None:
    cache = Cache(CacheSettings(most_failure_ttl=5))
    name = named(1)
    now, seen = 0.0, []
    for _ in range(5):
        cache.put(key(name), failure(Question(name, wire.A), None, 1), now)
        entry = cache._entries[key(name)]
        seen.append(entry.ttl)
        now = entry.expires
    assert seen == [1, 2, 4, 5, 5]
    cache.put(key(name), failure(Question(name, wire.A), None, 1), now + 100)
    assert cache._entries[key(name)].ttl == 1


def test_a_failure_that_is_nobodys_is_not_kept_and_forgets_nothing() -> None:
    cache = Cache(CacheSettings())
    name = named(1)
    cache.put(key(name), failure(Question(name, wire.A), None, 0), 0.0)
    assert len(cache) == 0


def test_what_may_not_be_kept_replaces_what_was() -> None:
    cache = Cache(CacheSettings())
    name = named(1)
    cache.put(key(name), positive(name), 0.0)
    cache.put(key(name), positive(name)._replace(ttl=0), 1.0)
    assert len(cache) == 0


def test_only_positive_replies_are_stale_and_not_for_ever() -> None:
    cache = Cache(CacheSettings(stale_seconds=100))
    name, other = named(1), named(2)
    cache.put(key(name), positive(name, ttl=10), 0.0)
    cache.put(key(other), negative(other, ttl=10), 0.0)
    assert cache.stale(key(name), 9.0) is None
    assert cache.stale(key(name), 10.0)
    assert cache.stale(key(name), 109.0)
    assert cache.stale(key(name), 110.0) is None
    assert cache.stale(key(other), 11.0) is None


def test_a_stale_reply_has_its_own_ttl_and_a_failure_leaves_it_there() -> None:
    cache = Cache(CacheSettings())
    name = named(1)
    cache.put(key(name), positive(name, ttl=10), 0.0)
    cache.put(key(name), failure(Question(name, wire.A), 22, 1), 20.0)
    entry = cache.stale(key(name), 21.0)
    assert entry
    assert entry.recheck == 50.0
    got = entry.stale(30)
    assert got.extended_error == 3
    (record,) = wire.records(got.message)
    assert got.message[record.fixed_at + 4 : record.fixed_at + 8] == (30).to_bytes(4, "big")


def test_domains_are_forgotten_with_all_below_and_nothing_else() -> None:
    cache = Cache(CacheSettings())
    texts = ("corp.example", "a.corp.example", "notcorp.example", "corp.example.org", "example")
    for text in texts:
        name = name_of(text)
        cache.put(key(name), positive(name), 0.0)
    cache.drop_below([name_of("corp.example")])
    kept = [text for text in texts if cache.fresh(key(name_of(text)), 1.0)]
    assert kept == ["notcorp.example", "corp.example.org", "example"]
    assert cache.held_bytes == sum(one.size for one in cache._entries.values())


@pytest.mark.parametrize("bits", [(False, True), (True, False), (True, True)])
def test_keys_tell_questions_apart(bits: tuple[bool, bool]) -> None:
    name = named(1)
    keys = {key_of(name, t, *b) for t in (1, 257, 256) for b in ((False, False), bits)}
    assert len(keys) == 6
