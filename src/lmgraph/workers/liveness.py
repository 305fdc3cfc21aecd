"""Whether the host at the other end of a connection is still there, however long it thinks.

A host that is cut off (no power, no cable, a pod whose node is gone) closes nothing: without being asked, TCP waits a quarter of an
hour for it, and a worker that thinks cannot be told from one that is gone. It knows socket options (RFC 9293 section 3.8.4, RFC 5482,
tcp(7)) and the errors that they lead to. It knows no HTTP, and how long an answer may take is not its business.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

UNHEARD_S = 10
"""seconds after which a host that acknowledges nothing is given up, while it is asked and while it thinks"""
QUIET_S, PROBE_S = 5, 1
"""seconds of silence until a host is asked whether it is there, and between two such questions"""
OPTIONS = {
    "TCP_USER_TIMEOUT": UNHEARD_S * 1000,  # Linux: what was sent and is not acknowledged, probes too
    "TCP_KEEPIDLE": QUIET_S,
    "TCP_KEEPALIVE": QUIET_S,  # macOS' name of the same
    "TCP_KEEPINTVL": PROBE_S,
    "TCP_KEEPCNT": (UNHEARD_S - QUIET_S) // PROBE_S,
}
GONE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


def watch(connection: Any) -> None:
    """Let the operating system ask whether the other host of a TCP socket (or what asyncio gives for one) is still there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in OPTIONS.items():
        if hasattr(socket, name):  # each system has its own choice of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def gone(error: Exception | None) -> bool:
    """Whether a connection was lost because the other host has not been heard of: another connection to it would fare no better."""
    return isinstance(error, OSError) and error.errno in GONE
