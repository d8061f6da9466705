"""The way to a hub is decided once: which proxy, which path, which certificates, and no secret in any sentence."""

from __future__ import annotations

import ssl
import urllib.request
from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.network.route import Proxy, Route, sparing
from fedsoda_edge.network.tls import Trust

P = "http://proxy:3128"
PLAIN = Trust(insecure_http=True)


def via(url: str, **environment: str) -> str:
    """What people are told of the proxy for an address."""
    return Route.to(url, environment, PLAIN).via


@pytest.mark.parametrize(
    ("environment", "of_http", "of_https"),
    [
        ({}, "none for http://", "none for https://"),
        ({"http_proxy": P}, "http://proxy:3128 (http_proxy)", "none for https:// (http_proxy is for http:// alone)"),
        ({"HTTPS_PROXY": P}, "none for http:// (HTTPS_PROXY is for https:// alone)", "http://proxy:3128 (HTTPS_PROXY)"),
        ({"all_proxy": P}, "http://proxy:3128 (all_proxy)", "http://proxy:3128 (all_proxy)"),
        ({"ALL_PROXY": P, "https_proxy": "http://b"}, "http://proxy:3128 (ALL_PROXY)", "http://b:80 (https_proxy)"),
        ({"http_proxy": "", "HTTP_PROXY": P}, "none for http://", "none for https://"),
        ({"http_proxy": "proxy:3128"}, "http://proxy:3128 (http_proxy)", None),
        ({"http_proxy": "10.0.0.1"}, "http://10.0.0.1:80 (http_proxy)", None),
        ({"http_proxy": " 'http://proxy:3128/' "}, "http://proxy:3128 (http_proxy)", None),
        ({"http_proxy": "HTTPS://proxy"}, "https://proxy:443 (http_proxy)", None),
        ({"http_proxy": "http://[fd00::1]:3128"}, "http://[fd00::1]:3128 (http_proxy)", None),
        ({"all_proxy": "socks5://proxy"}, "socks5h://proxy:1080 (all_proxy)", "socks5h://proxy:1080 (all_proxy)"),
        ({"all_proxy": "socks5h://proxy:9"}, "socks5h://proxy:9 (all_proxy)", None),
        ({"ALL_PROXY": "socks://127.0.0.1:7891/"}, "socks5h://127.0.0.1:7891 (ALL_PROXY)", None),
        ({"http_proxy": "http://me:s3cret@proxy:3128"}, "http://proxy:3128 (http_proxy)", None),
        ({"http_proxy": P, "no_proxy": "*"}, "none: no_proxy has '*'", None),
        ({"http_proxy": P, "NO_PROXY": "x, .hub.org"}, "none: no_proxy has '.hub.org'", None),
    ],
)
def test_the_proxy_is_that_of_the_scheme_else_of_all_and_is_named_with_its_variable(
    environment: dict[str, str], of_http: str, of_https: str | None
) -> None:
    assert via("http://a.hub.org:8470", **environment) == of_http
    assert of_https is None or via("https://a.hub.org", **environment) == of_https


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "is_spared"),
    [
        ("hub.org", "hub.org", 80, True),
        ("hub.org", "a.hub.org", 80, True),
        ("hub.org", "nothub.org", 80, False),
        ("hub.org", "hub.org.evil", 80, False),
        (".hub.org", "a.hub.org", 80, True),
        (".hub.org", "hub.org", 80, True),
        ("*.hub.org", "a.b.hub.org", 80, True),
        ("HUB.org", "Hub.ORG.", 80, True),
        ("hub.org:8470", "hub.org", 8470, True),
        ("hub.org:8470", "hub.org", 80, False),
        ("a b,hub.org  c", "hub.org", 80, True),
        ("10.0.0.0/8", "10.9.8.7", 80, True),
        ("10.0.0.0/8", "11.0.0.1", 80, False),
        ("10.0.0.5", "10.0.0.5", 80, True),
        ("10.0.0.5", "110.0.0.5", 80, False),
        ("10.0.0.5:8470", "10.0.0.5", 8470, True),
        ("0.0.0.5", "10.0.0.5", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]", "::1", 80, True),
        ("[::1]:8470", "::1", 8470, True),
        ("[::1]:8470", "::1", 80, False),
        ("fe80::/10", "fe80::1%eth0", 80, True),
        ("fd07:b51a:cc66:f0::/64", "hub.org", 80, False),
        ("127.0.0.0/8", "::ffff:127.0.0.1", 80, True),
        ("localhost,127.0.0.1,::1,.local", "printer.local", 80, True),
        ("", "hub.org", 80, False),
        (",,", "hub.org", 80, False),
        (".", "hub.org", 80, False),
        ("*", "10.0.0.5", 80, True),
    ],
)
def test_no_proxy_spares_names_suffixes_addresses_networks_and_ports(
    no_proxy: str, host: str, port: int, is_spared: bool
) -> None:
    assert bool(sparing(host, port, no_proxy)) == is_spared


@pytest.mark.parametrize(
    "no_proxy", ["hub.org", ".hub.org", "hub.org:8470", "hub.org:1", "*", "org", "ub.org", "", "10.0.0.5"]
)
@pytest.mark.parametrize("host", ["hub.org", "a.hub.org", "10.0.0.5", "nothub.org"])
def test_names_are_spared_as_the_standard_library_spares_them(no_proxy: str, host: str) -> None:
    theirs = urllib.request.proxy_bypass_environment(f"{host}:8470", {"no": no_proxy})  # type: ignore[attr-defined]
    assert bool(sparing(host, 8470, no_proxy)) == bool(theirs)


@pytest.mark.parametrize("no_proxy", ["::1,fe80::/10", "[::1]", "10.0.0.0/8,,*.x", "http://x", "[", "a:b:c"])
def test_no_form_of_no_proxy_breaks_anything(no_proxy: str) -> None:
    assert via("http://hub.org", http_proxy=P, no_proxy=no_proxy) == "http://proxy:3128 (http_proxy)"


def test_a_password_reaches_the_proxy_however_it_is_written_and_nobody_else() -> None:
    for written in ("p%40ss%23w%3Ard", "p@ss#w:rd"):
        [proxy] = {
            Route.to(url, {"all_proxy": f"http://me:{written}@proxy:1"}, PLAIN).proxy
            for url in ("http://h", "https://h")
        }
        assert proxy is not None
        assert proxy.url == "http://me:p%40ss%23w%3Ard@proxy:1"
        assert "ss" not in f"{proxy} {proxy!r}"
    assert Proxy("v", "http", "h", 1).url == "http://h:1"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("http://", "is not the address"),
        ("ftp://proxy", "is not the address"),
        ("http://proxy:port", "is not the address"),
        ("http://proxy:99999", "is not the address"),
        ("http://proxy/pac", "is not the address"),
        ("http://a b:1", "is not the address"),
        ("socks4://proxy:1080", "SOCKS 4 cannot be used"),
        ("http://me:s3cret@proxy:port", "is not the address"),
    ],
)
def test_what_is_no_proxy_is_refused_with_its_variable_and_without_its_password(value: str, why: str) -> None:
    with pytest.raises(UsageProblem, match=why) as refused:
        Route.to("http://hub", {"http_proxy": value})
    assert str(refused.value).startswith("http_proxy ")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "http", "websocket"),
    [
        ("https://hub.org/fl/triage/", "https://hub.org/fl/triage", "wss://hub.org/fl/triage/v1/session"),
        ("http://hub.org:8470", "http://hub.org:8470", "ws://hub.org:8470/v1/session"),
        (" HTTP://hub.org/ ", "http://hub.org", "ws://hub.org/v1/session"),
        ("hub.org:8470/x", "https://hub.org:8470/x", "wss://hub.org:8470/x/v1/session"),
        ("127.0.0.1:8470/x", "http://127.0.0.1:8470/x", "ws://127.0.0.1:8470/x/v1/session"),
        ("localhost:8470", "http://localhost:8470", "ws://localhost:8470/v1/session"),
        ("[::1]:8470", "http://[::1]:8470", "ws://[::1]:8470/v1/session"),
        ("http://[::1]:8470", "http://[::1]:8470", "ws://[::1]:8470/v1/session"),
        ("https://hub.org/a b", "https://hub.org/a%20b", "wss://hub.org/a%20b/v1/session"),
    ],
)
def test_a_path_below_the_host_is_kept(url: str, http: str, websocket: str) -> None:
    found = Route.to(url, {}, PLAIN)
    assert (found.url, found.websocket_url) == (http, websocket)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hub?token=s3cret", "was given with a query or fragment"),
        ("http://hub/x#s3cret", "was given with a query or fragment"),
        ("http://me:s3cret@hub", "was given with a user or password"),
        ("me:s3cret@hub:8470", "was given with a user or password"),
        ("http://me:s3/cret@hub", "was given with a user or password"),
        ("http://me:s3cret#@hub", "is not the address of a hub"),
        ("ws://hub", "is not the address of a hub"),
        ("http://hub one", "is not the address of a hub"),
    ],
)
def test_what_a_hub_has_not_is_refused_and_no_secret_is_told(url: str, why: str) -> None:
    with pytest.raises(UsageProblem, match=why) as refused:
        Route.to(url, {})
    assert "s3" not in str(refused.value)
    assert refused.value.exit_status == 2


# --- plain HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8470",
        "http://127.8.9.1:8470",
        "http://localhost:8470",
        "http://LOCALHOST",
        "http://[::1]:8470",
        "http://[::ffff:127.0.0.1]:8470",
        "http://0.0.0.0:8470",
    ],
)
def test_plain_http_may_stay_on_this_machine(url: str) -> None:
    assert Route.to(url, {}).scheme == "http"
    assert Route.to(url, {"http_proxy": "http://127.0.0.1:3128"}).scheme == "http"
    assert Route.to(url, {"http_proxy": P, "no_proxy": "*"}).scheme == "http"
    with pytest.raises(UsageProblem, match=r"would leave this machine as plain HTTP through the proxy .*to no_proxy"):
        Route.to(url, {"http_proxy": P})


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.5:8470",
        "http://hub.org",
        "http://localhost.hub.org",
        "http://127.0.0.1.hub.org",
        "http://128.0.0.1",
        "http://[fe80::1]:8470",
        "http://[::ffff:10.0.0.5]",
        "http://hub",
    ],
)
@pytest.mark.parametrize("environment", [{}, {"http_proxy": "http://127.0.0.1:3128"}])
def test_plain_http_to_another_machine_is_refused_with_what_it_would_show(
    url: str, environment: dict[str, str]
) -> None:
    with pytest.raises(UsageProblem) as refused:
        Route.to(url, environment)
    said = str(refused.value)
    assert said.startswith(f"{url} is plain HTTP to another machine")
    assert "could read this device's token and its updates, and change what the hub sends; write https://" in said
    assert "allow it with insecure_http" in said
    assert ("through the proxy http://127.0.0.1:3128" in said) == bool(environment)
    assert Route.to(url, environment, PLAIN).url == url


def test_a_pin_needs_tls_also_on_this_machine() -> None:
    pinned = Trust(bytes(32), insecure_http=True)
    assert Route.to("127.0.0.1:8470", {}, pinned).url == "https://127.0.0.1:8470"
    with pytest.raises(
        UsageProblem, match=r"plain HTTP, which shows no key, but the key sha256/AAAAAAAAAAAA… is pinned"
    ):
        Route.to("http://127.0.0.1:8470", {}, pinned)


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_certificates_that_cannot_be_read_are_named_with_their_variable(name: str, tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.pem", tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for path in (missing, broken):
        with pytest.raises(UsageProblem, match=f"{name} names '{path}', from which no certificates can be read"):
            _ = Route.to("https://hub", {name: str(path)}).tls
    plain = Route.to("http://hub", {name: str(missing)}, PLAIN)
    assert (plain.tls, plain.tls_of_proxy) == (None, None)


def test_without_variables_the_system_is_trusted_and_something_is() -> None:
    context = Route.to("https://hub", {}).tls
    assert context is not None
    assert context.verify_mode == ssl.CERT_REQUIRED
    paths = ssl.get_default_verify_paths()
    assert context.cert_store_stats()["x509_ca"] or any(Path(paths.capath or ".").iterdir())
