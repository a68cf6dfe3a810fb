"""`python -m vipd.proxy.cli`: the same as the command `vipd`."""

from vipd.proxy.cli.main import main

main()
