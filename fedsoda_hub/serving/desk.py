"""Put together what the page of the hub's owner is made of. Routes are `page.py`'s."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedsoda_edge.ports import Clock
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.serving.actions import Actions
from fedsoda_hub.serving.broadcast import Broadcast
from fedsoda_hub.serving.decisions import Inbox
from fedsoda_hub.serving.downloads import Downloads
from fedsoda_hub.serving.feed import ConnectedEdges, Feed
from fedsoda_hub.serving.monitoring import Monitoring
from fedsoda_hub.serving.sign_in import SignIn, own_names
from fedsoda_hub.serving.tls import is_behind_proxy
from fedsoda_hub.settings.run import RunSettings


@dataclass(frozen=True)
class Desk:
    """The owner's page without its routes."""

    settings: RunSettings
    directory: RunDirectory
    sign_in: SignIn
    feed: Feed
    actions: Actions
    downloads: Downloads

    @property
    def cookie(self) -> str:
        """The name of the session's cookie, of this run alone: browsers keep those of all ports of a host together."""
        return f"fedsoda-{hashlib.sha256(str(self.directory.path).encode()).hexdigest()[:12]}"

    def close(self) -> None:
        """End the streams of open pages."""
        self.feed.close()


def desk_of(
    settings: RunSettings,
    machine: RoundMachine,
    ledger: Ledger,
    roster: ConnectedEdges,
    monitoring: Monitoring,
    inbox: Inbox,
    broadcast: Broadcast,
    clock: Clock,
) -> Desk:
    """Make the owner's page of a run that is served, and let it hear what happens."""
    public = settings.listen.public_url
    names = frozenset[str]() if is_behind_proxy(settings) else own_names(settings.listen.host, public)
    origins = frozenset() if public is None else frozenset({"{0.scheme}://{0.netloc}".format(urlsplit(public))})
    feed = Feed(monitoring, machine, ledger, roster, time.monotonic, clock.wall)  # people look in their own time
    broadcast.begin(feed.heard)
    return Desk(
        settings,
        RunDirectory(settings.run_dir),
        SignIn(clock.monotonic, names, origins),
        feed,
        Actions(settings, inbox.put_nowait, feed.touch, clock.wall),
        Downloads(settings),
    )
