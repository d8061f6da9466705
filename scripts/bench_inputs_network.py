"""Cases of the network: what proxies, portals, cuts and strangers do, through the real commands and real sockets."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from bench_inputs_case import Case, Ended, command
from small_network import Answers, Front, SmallHub, SmallProxy, answer

PROXY_VARIABLES = [
    name for lower in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (lower, lower.upper())
]
ROWS = "".join(json.dumps({"prompt": f"say {n}", "completion": "yes"}) + "\n" for n in range(8))
PORTAL = b"<!DOCTYPE html><html><body>Welcome to the hotel</body></html>"
HUB_HERE = "hub.internal"  # a name that no resolver has


@cache
def bundle() -> Path:
    """Make the bundle of the scripted hub, once for all cases."""
    directory = Path(tempfile.mkdtemp(prefix="fedsoda-network-cases-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made = directory / "bundle"
    subprocess.run([sys.executable, "-m", "fedsoda_edge.testing", str(made)], check=True, capture_output=True)
    return made


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    for name in PROXY_VARIABLES:  # an empty one counts too: lower case before upper case
        os.environ.pop(name, None)
    return {"FEDSODA_TOKEN": "good", "FEDSODA_HOME": str(home / "fedsoda-home"), **more}


def edge(home: Path, *arguments: str, **environment: str) -> Ended:
    """Run fedsoda-edge with a good token and no proxy but those of `environment`."""
    return command("fedsoda_edge", *arguments, home=home, environment=_environment(home, environment), seconds=90)


def _join_of(home: Path, url: str) -> list[str]:
    (home / "rows.jsonl").write_text(ROWS)
    return ["join", url, "--data", str(home / "rows.jsonl"), "--device", "cpu"]


@contextlib.contextmanager
def joining(home: Path, url: str) -> Iterator[subprocess.Popen[str]]:
    """Begin a join whose events are lines on stdout."""
    with subprocess.Popen(
        [sys.executable, "-m", "fedsoda_edge", *_join_of(home, url), "--jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | _environment(home, {}),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def when(process: subprocess.Popen[str], event: str) -> None:
    """Wait until the join says this event."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{") and json.loads(line)["event"] == event:
            return
    raise AssertionError(f"{event} was never said")


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of the join."""
    out, _ = process.communicate(timeout=60)
    return Ended(process.returncode, out, "")


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """A port that nobody listens at, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# --- waits and retries -----------------------------------------------------------------------------------------------


def revoked_in_a_round(home: Path) -> str:
    """The connection is lost in a round, and the token was revoked meanwhile."""
    with SmallHub(bundle(), rounds=200) as hub, joining(home, f"http://127.0.0.1:{hub.port}") as process:
        when(process, "offer")
        hub.revoked = True
        hub.hang_up()
        return ended(process).lacks(5, "the token of clinic-7 was revoked")


def between_in_a_round(status: str) -> Callable[[Path], str]:
    """The connection is lost in a round, and something between answers the next greetings."""

    def wrong(home: Path) -> str:
        greetings = 0

        def trouble(head: str) -> bytes | None:
            nonlocal greetings
            greetings += "/v1/session" in head
            return answer(status, b"<html>no</html>") if "/v1/session" in head and 1 < greetings < 4 else None

        with (
            SmallHub(bundle(), rounds=4) as hub,
            Front(hub.port, trouble) as front,
            joining(home, f"http://127.0.0.1:{front.port}") as process,
        ):
            when(process, "offer")
            hub.hang_up()
            found = ended(process).lacks(0, "something between")
            return found or ("" if greetings >= 4 else "it did not try again")

    return wrong


def files(trouble_of: Callable[[int], bytes | None], words: str) -> Callable[[Path], str]:
    """Return a case: the nth request for a file meets trouble, and the join ends well."""

    def wrong(home: Path) -> str:
        count = 0

        def trouble(head: str) -> bytes | None:
            nonlocal count
            if "/v1/blobs/" not in head:
                return None
            count += 1
            return trouble_of(count)

        with SmallHub(bundle()) as hub, Front(hub.port, trouble) as front:
            found = edge(home, *_join_of(home, f"http://127.0.0.1:{front.port}"))
            return found.lacks(0, *([words] if words else [])) or ("" if hub.updates else "no update was handed in")

    return wrong


def short(count: int) -> bytes | None:
    """Answer the third file's request with a body that is short by its own announcement."""
    return answer("200 OK", b"\x08\0\0", Content_Type="application/octet-stream") if count == 3 else None


def reset(count: int) -> bytes | None:
    """Cut the third to fifth request after the head."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\nContent-Type: application/octet-stream\r\n\r\n"
    return head if 3 <= count <= 5 else None


def portal(count: int) -> bytes | None:
    """Answer the third and fourth request with a sign-in page."""
    return answer("200 OK", PORTAL, Content_Type="text/html") if count in (3, 4) else None


def away_in_the_download(home: Path) -> str:
    """The hub is away for three seconds while files are fetched."""
    with SmallHub(bundle()) as hub:
        stop = threading.Event()

        def go_away(head: str) -> bytes | None:
            if head.startswith("GET /v1/blobs/") and not stop.is_set() and len(front.heads) > 3:
                stop.set()
                hub.__exit__()
                threading.Timer(3.0, hub.__enter__).start()
            return None

        with Front(hub.port, go_away) as front:
            found = edge(home, *_join_of(home, f"http://127.0.0.1:{front.port}"))
        return found.lacks(0) or ("" if stop.is_set() and hub.updates else "no update was handed in")


def copied_home(home: Path) -> str:
    """A home is copied, and both join: the later one is refused with words, and comes rarely."""
    first, copy = home / "first", home / "copy"
    first.mkdir()
    with SmallHub(bundle(), rounds=10_000) as hub:
        url = f"http://127.0.0.1:{hub.port}"
        edge(first, "plan", url)  # makes the device's id
        shutil.copytree(first, copy)
        with joining(first, url) as process:
            when(process, "offer")
            before = hub.greetings
            found = edge(copy, *_join_of(copy, url))
            made, stays = hub.greetings - before, process.poll() is None
    if not stays:
        return "the first join was ended"
    return found.lacks(5, "two devices share one identity") or ("" if made < 40 else f"{made} connections")


# --- proxies ---------------------------------------------------------------------------------------------------------


def through(variable: str, form: str, asked: str) -> Callable[[Path], str]:
    """Return a case: a hub whose name only the proxy knows, for `doctor` and `join`."""

    def wrong(home: Path) -> str:
        with SmallHub(bundle()) as hub, SmallProxy(names={HUB_HERE: hub.port}) as proxy:
            url, environment = (
                f"http://{HUB_HERE}",
                {variable: form.format(port=proxy.port), "FEDSODA_INSECURE_HTTP": "1"},
            )
            found = edge(home, "doctor", url, **environment)
            shown = f"127.0.0.1:{proxy.port} ({variable})"
            if problem := found.lacks(0, shown, "a hub answers"):
                return problem
            seen = len(proxy.asked)
            joined = edge(home, *_join_of(home, url), **environment)
            if not any(line.startswith(asked) for line in proxy.asked[seen:]):
                return f"the proxy was asked {proxy.asked[seen:]}"
            return joined.lacks(0)

    return wrong


def not_for_this_scheme(home: Path) -> str:
    """https_proxy alone is not for http://: conversation and files both go directly, and doctor says so."""
    with SmallHub(bundle()) as hub, SmallProxy(refuses=403) as proxy:
        url, environment = f"http://127.0.0.1:{hub.port}", {"https_proxy": f"http://127.0.0.1:{proxy.port}"}
        found = edge(home, "doctor", url, **environment).lacks(0, "https_proxy is for https:// alone")
        found = found or edge(home, *_join_of(home, url), **environment).lacks(0)
        return found or ("" if not proxy.asked else f"the proxy was asked {proxy.asked}")


def spared(no_proxy: str) -> Callable[[Path], str]:
    """Return a case: no_proxy keeps the hub from a dead proxy."""

    def wrong(home: Path) -> str:
        with SmallHub(bundle()) as hub, dead_port() as dead:
            url = f"http://127.0.0.1:{hub.port}"
            environment = {"http_proxy": f"http://127.0.0.1:{dead}", "no_proxy": no_proxy.format(port=hub.port)}
            return edge(home, "doctor", url, **environment).lacks(0, "none: no_proxy has")

    return wrong


def dead_proxy(form: str) -> Callable[[Path], str]:
    """Return a case: nothing listens at the proxy's port."""

    def wrong(home: Path) -> str:
        with SmallHub(bundle()) as hub, dead_port() as dead:
            url, environment = f"http://127.0.0.1:{hub.port}", {"http_proxy": form.format(port=dead)}
            words = (f"127.0.0.1:{dead} (http_proxy) does not answer", "no_proxy")
            return edge(home, "doctor", url, **environment).lacks(3, *words) or edge(
                home, "plan", url, **environment
            ).lacks(3, *words)

    return wrong


def refusing_proxy(status: int, password: str, words: str) -> Callable[[Path], str]:
    """Return a case: the proxy answers CONNECT with a status."""

    def wrong(home: Path) -> str:
        with SmallHub(bundle()) as hub, SmallProxy(refuses=status, password=password) as proxy:
            environment = {"http_proxy": f"http://me:s3cret@127.0.0.1:{proxy.port}"}
            found = edge(home, "plan", f"http://127.0.0.1:{hub.port}", **environment)
            return found.lacks(3, f"127.0.0.1:{proxy.port}", words) or (
                "the password is told" if "s3cret" in found.text else ""
            )

    return wrong


def no_proxy_at_all(value: str, words: str) -> Callable[[Path], str]:
    """Return a case: the variable does not name a proxy that can be used."""
    return lambda home: edge(home, "plan", "http://127.0.0.1:9", http_proxy=value).lacks(2, "http_proxy", words)


# --- addresses -------------------------------------------------------------------------------------------------------


def refused_address(url: str, words: str) -> Callable[[Path], str]:
    """Return a case: an address that is refused with words and without its secret."""

    def wrong(home: Path) -> str:
        found = edge(home, "plan", url)
        return found.lacks(2, words) or ("the secret is told" if "s3cret" in found.text else "")

    return wrong


def below_a_path(home: Path) -> str:
    """A hub below a path of its host."""
    with SmallHub(bundle()) as hub, Front(hub.port, lambda _: None, below="/fl/triage") as front:
        url = f"http://127.0.0.1:{front.port}/fl/triage/"
        return edge(home, "doctor", url).lacks(0, "a hub answers") or edge(home, *_join_of(home, url)).lacks(0)


# --- answers that are no hub's ---------------------------------------------------------------------------------------


def instead_of_a_hub(made: Callable[[str], bytes], words: str) -> Callable[[Path], str]:
    """Return a case: something answers that is no hub; `doctor` fails, and `plan` says what it is."""

    def wrong(home: Path) -> str:
        with Answers(made) as server:
            url = f"http://127.0.0.1:{server.port}"
            return edge(home, "doctor", url).lacks(3, words) or edge(home, "plan", url).lacks(3, words)

    return wrong


def moved(head: str) -> bytes:
    """Redirect to https, as nginx does."""
    return answer("301 Moved", Location=f"https://hub.example.org{head.split(' ')[1]}")


def without_upgrade(home: Path) -> str:
    """A server in front passes requests on without the headers of an upgrade."""
    with SmallHub(bundle()) as hub, Front(hub.port, lambda _: None, drops_upgrade=True) as front:
        return edge(home, "plan", f"http://127.0.0.1:{front.port}").lacks(3, "websockets are not let through")


# --- what strangers may hold -----------------------------------------------------------------------------------------

AT_48 = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from pathlib import Path
from small_network import SmallHub
with SmallHub(Path(sys.argv[1])) as hub:
    print(hub.port, flush=True)
    sys.stdin.read()
"""


def silent_strangers(home: Path) -> str:
    """Sixty silent connections at 48 descriptors."""
    here = str(Path(__file__).resolve().parent)
    with subprocess.Popen(
        [sys.executable, "-c", AT_48, str(bundle())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))},
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        held = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(60)]
        found = edge(home, "plan", f"http://127.0.0.1:{port}").lacks(0)
        for one in held[-3:]:
            one.settimeout(25)
            with contextlib.suppress(ConnectionError):
                if one.recv(1):
                    found = found or "a silent connection was answered"
        for one in held:
            one.close()
        _, said = process.communicate(timeout=20)
        return found or ("" if "Traceback" not in said and len(said) < 2000 else f"{len(said)} bytes: {said[:300]}")


def loopback(spelling: str) -> Callable[[Path], str]:
    """Return a case: the status is open to loopback on a port for both families."""

    def wrong(_: Path) -> str:
        if not socket.has_dualstack_ipv6():
            return ""
        with SmallHub(bundle(), host="::") as hub:
            request = b"GET /v1/status HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
            with socket.create_connection((spelling, hub.port), 5) as one:
                one.sendall(request)
                line = one.makefile("rb").readline().decode()
            return "" if " 200 " in line else line

    return wrong


def cases(shared: Path) -> list[Case]:
    """List the cases of part D."""
    kinds: dict[str, dict[str, Callable[[Path], str]]] = {
        "a fatal end that not every waiter hears": {
            "401 after token revoke": revoked_in_a_round,
            "403 of something between": between_in_a_round("403 Forbidden"),
            "502 of something between": between_in_a_round("502 Bad Gateway"),
            "503 of something between": between_in_a_round("503 Service Unavailable"),
        },
        "retries that depend on where the break falls": {
            "reset before the first byte": files(reset, "no connection"),
            "hub away for 3 s in the download": away_in_the_download,
        },
        "transport faults taken for integrity faults": {
            "short body": files(short, "ended after 3 of"),
            "a portal's page in the download": files(portal, "not as a hub does"),
            "a portal's page with status 200": instead_of_a_hub(
                lambda _: answer("200 OK", PORTAL, Content_Type="text/html"), "sign in"
            ),
        },
        "a greeting resets the back-off": {"a copied home": copied_home},
        "proxies": {
            "a name that only the proxy knows": through("http_proxy", "http://127.0.0.1:{port}", f"CONNECT {HUB_HERE}"),
            "host:port": through("HTTP_PROXY", "127.0.0.1:{port}", f"CONNECT {HUB_HERE}"),
            "all_proxy=socks5://": through("all_proxy", "socks5://127.0.0.1:{port}", f"SOCKS5 {HUB_HERE}"),
            "all_proxy=socks://": through("ALL_PROXY", "socks://127.0.0.1:{port}/", f"SOCKS5 {HUB_HERE}"),
            "https_proxy alone": not_for_this_scheme,
            "no_proxy with a network and IPv6": spared("localhost,::1,fe80::/10,127.0.0.0/8"),
            "no_proxy with a port": spared("127.0.0.1:{port}"),
            "dead": dead_proxy("http://127.0.0.1:{port}"),
            "dead, without scheme": dead_proxy("127.0.0.1:{port}"),
            "dead, SOCKS": dead_proxy("socks5h://127.0.0.1:{port}"),
            "refuses CONNECT": refusing_proxy(403, "", "HTTP 403"),
            "asks for a password": refusing_proxy(0, "me:other", "HTTP 407"),
            "SOCKS 4": no_proxy_at_all("socks4://127.0.0.1:1", "SOCKS 4"),
            "no address": no_proxy_at_all("http://proxy:port", "is not the address of a proxy"),
        },
        "part of the address ignored": {
            "a path": below_a_path,
            "a query": refused_address("http://127.0.0.1:9/?token=s3cret", "query"),
            "a fragment": refused_address("http://127.0.0.1:9/#s3cret", "fragment"),
            "a password": refused_address("http://user:s3cret@127.0.0.1:9", "user or password"),
        },
        "answers that are no hub's": {
            "without Upgrade": without_upgrade,
            "redirect to https": instead_of_a_hub(moved, "redirects to https://hub.example.org: join there"),
        },
        "what strangers may hold": {"60 silent connections at 48 descriptors": silent_strangers},
        "loopback in other spellings": {
            "::ffff:127.0.0.1": loopback("127.0.0.1"),
            "::1": loopback("::1"),
        },
    }
    return [Case("D", kind, name, wrong) for kind, found in kinds.items() for name, wrong in found.items()]
