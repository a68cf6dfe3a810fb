"""The channel between daemon and worker: whole messages, descriptors in order, and its end."""

import asyncio
import os
import resource
import socket

import pytest

from vipd.backends.userspace.channel import LARGEST, Channel


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one), Channel(other)


async def test_messages_arrive_whole_and_in_order_however_large() -> None:
    one, other = pair()
    sent = [b"", b"x", os.urandom(5_000_000), b"last"]

    async def send() -> None:
        for message in sent:
            await one.send(message)

    sending = asyncio.create_task(send())
    assert [(await other.receive())[0] for _ in sent] == sent
    await sending
    one.close()
    other.close()


async def test_descriptors_come_with_their_message() -> None:
    one, other = pair()
    files = [os.memfd_create(str(number)) for number in range(253)]
    for number, file in enumerate(files):
        os.write(file, str(number).encode())
    await one.send(b"none")
    await one.send(b"two", files[:2])
    await one.send(b"all", files)
    for wanted in ([], ["0", "1"], [str(number) for number in range(253)]):
        _, given = await other.receive()
        assert [os.pread(file, 9, 0).decode() for file in given] == wanted
        for file in given:
            os.close(file)
    for file in files:
        os.close(file)
    one.close()
    other.close()


async def test_the_end_of_the_other_side_is_told() -> None:
    one, other = pair()
    one.close()
    with pytest.raises(EOFError):
        await other.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        await other.send(b"nobody reads")
    other.close()


async def test_a_length_that_cannot_be_is_the_end() -> None:
    plain, other = socket.socketpair()
    channel = Channel(other)
    plain.send((LARGEST + 1).to_bytes(4, "big") + b"\0")
    with pytest.raises(EOFError):
        await channel.receive()
    plain.close()
    channel.close()


async def test_descriptors_that_are_lost_are_missed_by_their_message_only() -> None:
    one, other = pair()
    file = os.memfd_create("one")
    await one.send(b"three", [file] * 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(file)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        message, given = await other.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (message, len(given)) == (b"three", 1)
    await one.send(b"two", [file] * 2)
    message, more = await other.receive()
    assert (message, len(more)) == (b"two", 2)
    for each in (file, *given, *more):
        os.close(each)
    one.close()
    other.close()
