"""A packet followed through everything: the table, a program and, if asked for, the kernel.

Lives here: the one place that joins explain.py, a compiled program and backends/live.py. Must not:
explain anything itself.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from vipd.backends.registry import AUTO, backend
from vipd.proxy.errors import DataplaneError
from vipd.proxy.explain import Explanation, answering, explain, goes_to_dns
from vipd.proxy.question import Question, asked, own_addresses
from vipd.proxy.remembering import passing_over, remembering
from vipd.proxy.serving import as_served
from vipd.proxy.settings import DataplaneSettings, NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Key, Table


async def follow(
    question: Question,
    snapshot: Snapshot,
    table: Table,
    node: NodeSettings,
    dataplane: DataplaneSettings,
    mode: str,
    program: Any = None,
    driver: object = None,
    rejected: Mapping[Key, DataplaneError] | None = None,
) -> Explanation:
    """Return the answer to a question, for its mode or else for `mode`.

    `program` is what `mode` has loaded, `driver` that of its dataplane, and `rejected` what this
    could not take, each with the reason; None, or a question about another mode, and the program
    is compiled from the table. Raise ConfigError and QuestionError for what cannot be answered.
    """
    told = asked(question, snapshot, table, node)
    wanted = mode if question.mode in ("", AUTO) else question.mode
    compiler = backend(wanted, dataplane).compiler
    if program is None or wanted != mode:
        rejected = None
        program = await asyncio.to_thread(compiler.compile, table.virtual_servers(), table.network)
    dns = goes_to_dns(told.packet, node)  # no rule of a dataplane looks at what is not tracked
    path = () if dns else await asyncio.to_thread(compiler.trace, program, told.packet)
    made = await asyncio.to_thread(
        explain,
        snapshot,
        table,
        node,
        told.packet,
        own=own_addresses(snapshot, node),
        mode=wanted,
        sender=told.sender,
        path=path,
        notes=told.notes,
    )
    server = answering(table, told.packet)
    if server is not None:
        why = (rejected or {}).get(server.key, "")
        made = as_served(made, server, compiler.serving(program, server.key), str(why))
    made = replace(made, differences=tuple(one.what for one in compiler.differences))
    if dns or not question.live:
        return made
    from vipd.backends.live import known

    live = await known(wanted, program, told.packet, driver if wanted == mode else None)
    made = passing_over(replace(made, live=live.lines), live.passed_over)
    return made if live.remembered is None else remembering(made, live.remembered)
