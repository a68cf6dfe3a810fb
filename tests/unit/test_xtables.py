"""The iptables tools with fakes in their place: variants, the lock, what an error means."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vipd.backends import xtables
from vipd.backends.xtables import RejectedAt, Variant, Xtables, failure
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult, Unsupported
from vipd.proxy.names import Family

Fake = Callable[..., Xtables]
HELD = "Another app is currently holding the xtables lock. Stopped waiting after 5s."


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Return a maker of tools that are shell scripts; names that are not given are not there."""

    def make(variant: Variant | None = Variant.NFT, **bodies: str) -> Xtables:
        for name, body in bodies.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/bash\nDIR={tmp_path}\n{body}\n")
            path.chmod(0o755)

        def find(name: str) -> str | None:
            path = tmp_path / name
            return str(path) if path.exists() else None

        return Xtables(variant, find_program=find)

    return make


@pytest.mark.parametrize(
    ("code", "said", "error", "line"),
    [
        (4, HELD, Busy, None),
        (2, "iptables-restore v1.8.9 (legacy): Port `99999' not valid\nError occurred at line: 2",
         RejectedAt, 2),
        (1, "iptables-restore: line 3 failed", RejectedAt, 3),
        (4, "iptables-nft-restore v1.8.9 (nf_tables): \nline 2: RULE_APPEND failed (Invalid "
         "argument): rule in chain VIPD-A", RejectedAt, 2),
        (4, "iptables-nft-restore: \nline 2: RULE_APPEND failed (Device or resource busy): rule",
         Busy, None),
        (2, "iptables-restore v1.8.9 (legacy): Couldn't load target `VIPD-X':No such file or "
         "directory\n\nError occurred at line: 2", OutOfStep, None),
        (2, "iptables-restore v1.8.9 (nf_tables): Chain 'VIPD-X' does not exist\nError occurred at "
         "line: 3", OutOfStep, None),
        (2, "Couldn't load match `recent':No such file or directory", Unsupported, None),
        (3, "iptables v1.8.9 (legacy): can't initialize iptables table `nat': Permission denied "
         "(you must be root)", Unsupported, None),
        (3, "iptables-restore: unable to initialize table 'nat'", Unsupported, None),
        (2, "iptables-restore v1.8.9 (legacy): Set VIPD-SERVED-4 doesn't exist.\nError occurred at "
         "line: 2", OutOfStep, None),
        (-9, "", UnknownResult, None),
        (-11, "", RejectedAt, 0),
    ],
)  # fmt: skip
def test_what_the_tool_says_decides_the_error(
    code: int, said: str, error: type[DataplaneError], line: int | None
) -> None:
    found = failure(code, "iptables-restore", said, "*nat\n-A VIPD-A -j ACCEPT\nCOMMIT\n")
    assert type(found) is error
    if isinstance(found, RejectedAt):
        assert found.line == line


def test_a_rule_to_delete_that_is_not_there_means_that_somebody_changed_something() -> None:
    text = "*nat\n-D PREROUTING -j VIPD-SERVICES\nCOMMIT\n"
    said = "iptables-restore: line 2 failed: Bad rule (does a matching rule exist in that chain?)."
    assert type(failure(1, "iptables-restore", said, text)) is OutOfStep


def test_a_refusal_names_the_rule() -> None:
    text = "*nat\n-A VIPD-A -j NONSENSE\nCOMMIT\n"
    error = failure(2, "restore", "restore: line 2 failed", text)
    assert isinstance(error, Rejected)
    assert "-A VIPD-A -j NONSENSE" in str(error)


async def test_text_reaches_the_tool_whole(fake: Fake, tmp_path: Path) -> None:
    tools = fake(iptables_nft_restore='echo "$@" > $DIR/arguments; cat > $DIR/text')
    text = "*nat\n" + "-A VIPD-A -j RETURN\n" * 50_000 + "COMMIT\n"
    await tools.restore(Family.IPV4, text)
    assert (tmp_path / "text").read_text() == text
    assert (tmp_path / "arguments").read_text() == "--noflush\n"


async def test_a_held_lock_is_waited_for_in_turns(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    tools = fake(
        Variant.LEGACY,
        iptables_legacy_restore=f'echo "$@" >> $DIR/log\n[ $(wc -l < $DIR/log) -ge 3 ] && exit 0\n'
        f'echo "{HELD}" >&2; exit 4',
    )
    await tools.restore(Family.IPV4, "")
    assert (tmp_path / "log").read_text() == f"--noflush -w {xtables.LOCK_SECONDS}\n" * 3


async def test_a_lock_that_stays_held_is_busy(fake: Fake, tmp_path: Path) -> None:
    body = f'echo x >> $DIR/log; echo "{HELD}" >&2; exit 4'
    tools = fake(Variant.LEGACY, iptables_legacy_restore=body)
    with pytest.raises(Busy):
        await tools.restore(Family.IPV4, "")
    assert len((tmp_path / "log").read_text().splitlines()) == xtables.LOCK_RUNS


async def test_without_tools_the_package_is_named(fake: Fake) -> None:
    tools = fake(None)
    for call in (tools.find(), tools.variant()):
        with pytest.raises(Unsupported, match="package iptables"):
            await call
    with pytest.raises(Unsupported, match="ip6tables-nft-restore"):
        await fake(Variant.NFT).restore(Family.IPV6, "")


KUBELET = r"""[[ $* != *mangle* ]] || printf '*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n'"""
RULES = 'echo "*nat"; echo ":VIPD-SERVICES - [0:0]"; echo "-A VIPD-SERVICES -j RETURN"'


@pytest.mark.parametrize(
    ("default", "nft", "legacy", "in_use"),
    [
        ("nf_tables", "true", "true", Variant.NFT),
        ("legacy", "true", "true", Variant.LEGACY),
        ("legacy", RULES, "true", Variant.NFT),
        ("nf_tables", "true", RULES, Variant.LEGACY),
        ("nf_tables", RULES, RULES, Variant.NFT),
        ("legacy", RULES, RULES, Variant.LEGACY),
    ],
)
async def test_the_variant_in_use_holds_rules_or_is_the_hosts(
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    default: str,
    nft: str,
    legacy: str,
    in_use: Variant,
) -> None:
    monkeypatch.setattr(xtables, "loaded", lambda *_: True)
    tools = fake(
        None,
        iptables=f'echo "iptables v1.8.9 ({default})"',
        iptables_nft_save=nft,
        iptables_legacy_save=legacy,
    )
    found = await tools.find()
    assert found.present == (Variant.LEGACY, Variant.NFT)
    assert found.in_use is in_use
    other = legacy if in_use is Variant.NFT else nft
    assert bool(found.leftovers) is (other == RULES)


@pytest.mark.parametrize(
    ("nft", "legacy", "in_use"),
    [
        (KUBELET, RULES, Variant.NFT),
        (RULES, KUBELET, Variant.LEGACY),
        (KUBELET, KUBELET, Variant.NFT),  # from before the host's was changed: no hint
    ],
)
async def test_kubelets_variant_is_the_hosts_whatever_is_in_the_image(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, nft: str, legacy: str, in_use: Variant
) -> None:
    monkeypatch.setattr(xtables, "loaded", lambda *_: True)
    tools = fake(
        None,
        iptables='echo "iptables v1.8.9 (nf_tables)"',
        iptables_nft_save=nft,
        iptables_legacy_save=legacy,
    )
    assert (await tools.find()).in_use is in_use


async def test_a_host_with_one_variant_needs_no_name_for_it(fake: Fake) -> None:
    tools = fake(
        None, iptables='echo "iptables v1.8.10 (nf_tables)"', iptables_save="true",
        iptables_restore="true",
    )  # fmt: skip
    found = await tools.find()
    assert (found.present, found.in_use) == ((Variant.NFT,), Variant.NFT)
    await tools.restore(Family.IPV4, "")


async def test_a_legacy_table_that_nobody_uses_stays_unloaded(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xtables, "loaded", lambda *_: False)
    tools = fake(Variant.LEGACY, iptables_legacy_save="touch $DIR/called")
    assert await tools.save(Family.IPV4, "nat") == ""
    assert not (tmp_path / "called").exists()


async def test_a_tool_that_hangs_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xtables, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UnknownResult, match="did not end"):
        await fake(iptables_nft_restore="exec sleep 1000").restore(Family.IPV4, "")


async def test_a_cancelled_run_is_over_when_it_says_so(fake: Fake, tmp_path: Path) -> None:
    """Else it would write beside whoever comes next."""
    os.mkfifo(tmp_path / "pid")
    run = asyncio.ensure_future(
        fake(iptables_nft_restore='echo $$ > "$DIR/pid"; exec sleep 1000').restore(Family.IPV4, "")
    )
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
