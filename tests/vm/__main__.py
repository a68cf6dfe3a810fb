"""Run pytest, or any command, in a virtual machine with Debian's kernel and this tree.

python -m tests.vm pytest -- tests/netns/test_services.py -k ipvs
python -m tests.vm shell -- 'modprobe ip_vs && ipvsadm -Ln'
"""

import argparse
import sys
from pathlib import Path

from tests.vm.kernel import MissingError
from tests.vm.machine import Limits, available, pytest_command, run


def main() -> int:
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("pytest", "shell"))
    parser.add_argument("--deadline", type=float, default=default.deadline, metavar="SECONDS")
    parser.add_argument("--silence", type=float, default=default.silence, metavar="SECONDS")
    parser.add_argument("--cpus", type=int, default=default.cpus)
    parser.add_argument("--memory", type=int, default=default.megabytes, metavar="MEGABYTES")
    parser.add_argument("--results", type=Path, help="folder that the machine sees as /run/vm")
    parser.epilog = "After -- come pytest's arguments, or the words of a shell command."
    own, arguments = _parted(sys.argv[1:])
    told = parser.parse_args(own)
    limits = default._replace(
        deadline=told.deadline, silence=told.silence, cpus=told.cpus, megabytes=told.memory
    )
    try:
        kernel = available()
        if told.what == "pytest":
            command = pytest_command(kernel, *arguments)
        else:
            command = ["/bin/sh", "-c", " ".join(arguments)]
        return run(kernel, command, told.results, limits)
    except MissingError as failure:
        print(f"vm: {failure}", file=sys.stderr)
        return 125


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what stands after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
