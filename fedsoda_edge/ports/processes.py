"""Know other processes of this machine: whether one still runs, who listens on a port, how one was called."""

from __future__ import annotations

import psutil

from fedsoda_edge.units import one_line


def started_at(pid: int) -> float | None:
    """Return when a process started, seconds since 1970; None: there is none, so its number may be another one's soon."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def listener_on(port: int) -> int | None:
    """Find the process that listens on this port; None: it is another user's, or there is none."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):  # some systems tell this to their administrator alone
        return None
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.pid and one.laddr and one.laddr.port == port:
            return one.pid
    return None


def command_of(pid: int) -> str:
    """Return the first words of a process's command, as a part of one line."""
    try:
        return one_line(" ".join(psutil.Process(pid).cmdline()[:4]), 120) or "a process"
    except psutil.Error:
        return "a process"
