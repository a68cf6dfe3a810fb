"""Structured logs to standard error: an event and key=value pairs, one line each.

Lives here: the one configuration of structlog. Must not: be imported by pure modules.
"""

import sys

import structlog


def configure(form: str = "text") -> None:
    """Configure logging: `form` is ``text`` (logfmt, readable) or ``json``."""
    render: structlog.typing.Processor
    if form == "json":
        render = structlog.processors.JSONRenderer()
    else:
        render = structlog.processors.LogfmtRenderer(
            key_order=["timestamp", "level", "event"], bool_as_flag=False
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def form() -> str:
    """Return the form that is in use, which that of every worker is, too."""
    *_, last = structlog.get_config()["processors"]
    return "json" if isinstance(last, structlog.processors.JSONRenderer) else "text"
