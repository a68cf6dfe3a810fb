"""The guided tour: vipd in the lab, shown with real requests. `vipd lab demo`, `make run`.

Lives here: the frame around the steps (lab_tour.py): lab and daemon up, every step, play, and
everything away again. Must not: know what the steps show.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from vipd.bench.lab import DEFAULT_PREFIX, Lab
from vipd.bench.lab_daemon import Daemon
from vipd.bench.lab_errors import LabError
from vipd.bench.lab_show import Screen, milliseconds
from vipd.bench.lab_tour import STEPS, WEB, Stage


def run(prefix: str = DEFAULT_PREFIX, *, examples: Path | None = None) -> bool:
    """Give the whole tour; return whether every step did what it said.

    Raise LabError where the lab or the daemon does not come up, or the lab is in use. The lab and
    the daemon are gone afterwards in any case, also after Ctrl-C (KeyboardInterrupt) and SIGTERM.
    """
    option = "" if prefix == DEFAULT_PREFIX else f" --prefix {prefix}"
    screen = Screen(f"vipd lab{option}")
    source = examples or find_examples()
    lab = Lab(prefix)
    _refuse_used(lab)
    with ExitStack() as stack:
        stack.enter_context(_terminated_in_order())
        stack.callback(lab.down)
        stack.callback(screen.note, "tearing down")
        start = time.monotonic()
        lab.up()
        screen.note(f"the lab is up after {milliseconds(time.monotonic() - start)}")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vipd-demo-")))
        manifests = directory / "manifests"
        shutil.copytree(source, manifests)
        daemon = Daemon(lab, manifests, directory)
        stack.callback(daemon.stop)
        synced = daemon.start()
        screen.note(f"vipd runs on the node, synced after {milliseconds(synced)}:")
        screen.note("  vipd " + " ".join(daemon.arguments))
        failures = _tour(Stage(lab, manifests, daemon.socket), screen)
        screen.verdict(failures)
        if failures:
            screen.note(f"the daemon's last words:\n{daemon.log_tail()}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            _play(screen, daemon, manifests)
    return not failures


def _tour(stage: Stage, screen: Screen) -> list[str]:
    """Show every step, also after one that failed; return what was not as it should be."""
    failures = []
    for number, step in enumerate(STEPS, 1):
        title = (step.__doc__ or step.__name__).partition("\n")[0]
        screen.title(f"{number}/{len(STEPS)} {title}")
        try:
            shown = step(stage)
        except OSError as failure:
            # A request that got no answer where the step needs one.
            screen.failure(f"a request failed: {failure!r}")
            failures.append(f"{title} {failure!r}")
            continue
        screen.show(shown)
        failures += [f"{title} Not so: {claim}." for claim, holds in shown.claims if not holds]
    return failures


def _play(screen: Screen, daemon: Daemon, manifests: Path) -> None:
    """Leave everything running until Enter or Ctrl-C."""
    screen.note("\nEverything stays up for you to play with, in another terminal:")
    for command in (
        f"vipd status --socket {daemon.socket}",
        f"vipd services --socket {daemon.socket}",
        f"{screen.program} exec client-1 curl -s http://{WEB[0]}/",
        f"{screen.program} exec node nft list table ip vipd",
        f"$EDITOR {manifests}/web.yaml",
    ):
        screen.note(f"  {command}")
    try:
        input("Enter or Ctrl-C ends it. ")
    except (KeyboardInterrupt, EOFError):
        screen.note("")


def _refuse_used(lab: Lab) -> None:
    """Raise LabError where something besides echo servers runs in the lab: it is somebody's."""
    for host in lab.status():
        if len(host.processes) > int(host.serving):
            raise LabError(
                f"lab {lab.prefix} is in use ({host.name} runs process {host.processes[0]}): "
                f"`vipd lab down` ends it, --prefix NAME takes another lab"
            )


def find_examples() -> Path:
    """The folder examples/ of the checkout; raise LabError where there is none."""
    # resolve() follows the link tree of an editable install back to the checkout.
    for start in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (start / "examples" / "web.yaml").is_file():
            return start / "examples"
    raise LabError("examples/web.yaml was not found: run the demo in a checkout of vipd")


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, leave) for number in signals]
    try:
        yield
    finally:
        for number, action in zip(signals, before, strict=True):
            signal.signal(number, action)
