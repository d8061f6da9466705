"""Make the ways of [notify] from the settings, with the webhook's secret."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fedsoda_edge.ports.disk import write_once
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving.hook_command import HookCommand
from fedsoda_hub.serving.notify import Way
from fedsoda_hub.serving.webhook import Webhook, read_secret
from fedsoda_hub.settings.run import RunSettings


def ways_of(settings: RunSettings, directory: RunDirectory, now: Callable[[], float]) -> list[Way]:
    """Make the ways that [notify] names; none: nothing is told.

    Args:
        now: seconds since 1970.

    Raises:
        UsageProblem: the webhook's secret cannot be used.
        DiskFull: the disk has no space left for a new secret.
    """
    notify, found = settings.notify, list[Way]()
    if notify.command:
        found.append(HookCommand(tuple(notify.command), settings.directory, notify.timeout_seconds))
    if notify.webhook is not None:
        path = directory.webhook_secret if notify.secret is None else settings.directory / notify.secret
        if notify.secret is None and not path.exists():
            write_once(path, secrets.token_urlsafe(32).encode() + b"\n", 0o600)
        found.append(Webhook(notify.webhook, read_secret(path), now, notify.timeout_seconds))
    return found
