"""Read what came instead of a hub's answer: say who sent it, and whether trying again may help.

A hub refuses in JSON with a "reason". Whatever else comes with a status is of something between: a proxy, a firewall, a
network's sign-in page, a server in front of the hub. Which way the request went is `route.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

import msgspec

from fedsoda_edge.errors import HubUnreachable, RefusedByHub
from fedsoda_edge.network.route import Route

OUR_PATHS = re.compile(r"/(v1/session|v1/proof|v1/blobs/[0-9a-f]*|healthz)/?$")
PAGE = re.compile(rb"\s*(<!doctype|<html|<\?xml)", re.IGNORECASE)


class Identity(msgspec.Struct):
    """The answer of a hub to /healthz. hub: what it is; protocol: the version that it speaks."""

    hub: str
    protocol: int


class HubReason(msgspec.Struct):
    """The answer of a hub that refuses a request."""

    reason: str


def is_hub(body: bytes) -> bool:
    """Tell whether an answer to /healthz is that of a hub, and not of whatever else answers with 200."""
    try:
        return msgspec.json.decode(body, type=Identity).hub == "fedsoda"
    except msgspec.DecodeError:
        return False


def reason_of(body: bytes) -> str:
    """Return the reason of a hub's refusal; "": the answer is not a hub's."""
    try:
        return msgspec.json.decode(body, type=HubReason).reason
    except msgspec.DecodeError:
        return ""


def refused(
    route: Route, status: int, headers: Mapping[str, str], body: bytes, asked: str = ""
) -> HubUnreachable | RefusedByHub:
    """Return the error for an answer that is not the one asked for.

    Args:
        asked: the URL that was asked for, which a redirect may be relative to; "": the hub's.
    """
    url = route.url
    if reason := reason_of(body):
        if status in (401, 403):
            return RefusedByHub(f"the hub {url} refused: {reason}")
        return HubUnreachable(f"{url} answers HTTP {status}: {reason}; try again later, or ask the hub's owner", "HTTP")
    if 300 <= status < 400 and (location := headers.get("location")):
        return _redirected(route, urljoin(asked or f"{url}/", location))
    if status == 407:
        return wants_password(route)
    if status == 200 and (PAGE.match(body) or headers.get("content-type", "").startswith("text/html")):
        return no_hub(route, "HTTP 200 with a page of HTML")
    if status in (401, 403, 429) or (status >= 500 and status != 501):
        return HubUnreachable(
            f"{url} answers HTTP {status}, and not the hub itself but something between: {between(route)}; "
            "try again later, or ask its owner",
            "HTTP",
        )
    return HubUnreachable(
        f"{url} answers HTTP {status}, which no hub does; check the address, and the proxy if there is one", "HTTP"
    )


def between(route: Route) -> str:
    """Return the words for what may stand between this device and the hub."""
    if route.proxy is not None:
        return f"the proxy {route.proxy}, or a server in front of the hub"
    return "a server in front of the hub, or a firewall"


def _redirected(route: Route, target: str) -> HubUnreachable:
    parts = urlsplit(re.sub(r"^ws(s?)://", r"http\1://", target))
    host = parts.netloc.rpartition("@")[2]
    if found := OUR_PATHS.search(parts.path):
        there = f"{parts.scheme}://{host}{parts.path[: found.start()]}"
        return HubUnreachable(f"{route.url} redirects to {there}: join there", "HTTP")
    return HubUnreachable(
        f"{route.url} redirects to {parts.scheme}://{host}{parts.path}, where no hub is; if this network has a sign-in "
        "page, sign in, else check the address",
        "HTTP",
    )


def no_hub(route: Route, what: str) -> HubUnreachable:
    """Return the error for a page that came with status 200."""
    return HubUnreachable(
        f"HTTP: {route.url} answers, but not as a hub does ({what}); if this network has a sign-in page, sign in, else "
        "check address and port",
        "HTTP",
    )


def no_websockets(route: Route, why: str) -> HubUnreachable:
    """Return the error for a hub whose plain answers come and whose websocket does not open."""
    return HubUnreachable(
        f"a hub answers at {route.url}, but websockets are not let through ({why}); something between must pass the "
        f"headers Upgrade and Connection on (nginx: proxy_http_version 1.1 and two proxy_set_header): {between(route)}",
        "HTTP",
    )


def wants_password(route: Route) -> HubUnreachable:
    """Return the error for a proxy that does not know who asks."""
    variable = route.proxy.variable if route.proxy is not None else "http_proxy"
    return HubUnreachable(
        f"the proxy {route.proxy or 'between'} asks for user and password (HTTP 407); write them into {variable}, as in "
        "http://user:password@host:port",
        "proxy",
    )


def no_connection(route: Route, why: str) -> HubUnreachable:
    """Return the error for a proxy that answers and does not connect to the hub."""
    if found := re.search(r"\b407\b", why):
        return wants_password(route)
    if found := re.search(r"\b([45]\d\d)\b", why):
        why = f"HTTP {found[1]}"
    return HubUnreachable(
        f"the proxy {route.proxy} does not connect to {route.host}:{route.port} ({why}); ask its owner to let CONNECT to "
        f"this port through, or add {route.host} to no_proxy if it can be reached without",
        "proxy",
    )
