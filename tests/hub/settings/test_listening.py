"""[listen] and [tls] go together: where edges reach the hub, and who encrypts what travels there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.listening import split_url
from tests.hub.settings.files import SHORT, read


@pytest.mark.parametrize(
    ("listen", "tls", "speaks"),
    [
        ("", "", False),
        ('host = "127.0.0.1"', "", False),
        ('host = "127.8.9.1"', "", False),
        ('host = "::1"', "", False),
        ('host = "localhost"', "", False),
        ('host = "0.0.0.0"', "", True),
        ('host = "::"', "", True),
        ('host = "10.0.0.5"', "", True),
        ('host = "hub.example.org"', "", True),
        ('host = "0.0.0.0"', 'mode = "off"', False),
        ("", 'mode = "on"', True),
        ("", 'certificate = "c.pem"', True),
    ],
)
def test_by_itself_a_hub_speaks_tls_where_it_listens_beyond_its_machine(
    folder: Path, listen: str, tls: str, speaks: bool
) -> None:
    assert read(folder, f"{SHORT}[listen]\n{listen}\n[tls]\n{tls}\n").speaks_tls == speaks


def test_files_are_relative_to_the_run_and_one_may_hold_both(folder: Path) -> None:
    one = read(folder, f'{SHORT}[tls]\ncertificate = "c.pem"\n')
    assert one.own_certificate == (folder / "c.pem", folder / "c.pem")
    two = read(folder, f'{SHORT}[tls]\ncertificate = "c.pem"\nkey = "/etc/k.pem"\n')
    assert two.own_certificate == (folder / "c.pem", Path("/etc/k.pem"))


@pytest.mark.parametrize(
    ("listen", "tls", "words"),
    [
        ("", 'key = "k.pem"', r"\[tls\] key = 'k\.pem' in run\.toml stands without a certificate"),
        (
            "",
            'mode = "off"\ncertificate = "c.pem"',
            r'mode = "off" in run\.toml does not go with certificate = \'c\.pem\'',
        ),
        ("", 'mode = "maybe"', r"\[tls\] mode.*maybe"),
        (
            'host = "0.0.0.0"\npublic_url = "http://hub.org"',
            "",
            r"is plain HTTP, but the hub speaks TLS at 0\.0\.0\.0; write https://hub\.org, or \[tls\] mode",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_ways_out(
    folder: Path, listen: str, tls: str, words: str
) -> None:
    with pytest.raises(UsageProblem, match=words) as refused:
        read(folder, f"{SHORT}[listen]\n{listen}\n[tls]\n{tls}\n")
    assert refused.value.exit_status == 2


@pytest.mark.parametrize(
    ("url", "scheme", "address"),
    [
        ("https://hub.example.org", "https", "hub.example.org"),
        (" HTTPS://hub.example.org:8470/ ", "https", "hub.example.org:8470"),
        ("http://10.0.0.5:8470/fl/triage/", "http", "10.0.0.5:8470/fl/triage"),
        ("https://[fd00::1]:8470", "https", "[fd00::1]:8470"),
    ],
)
def test_an_address_is_taken_as_links_carry_it(url: str, scheme: str, address: str) -> None:
    assert split_url(url, "run.toml") == (scheme, address)


@pytest.mark.parametrize(
    "url",
    [
        "", "hub.example.org", "https://", "https:///fl", "ftp://hub", "https://hub:0", "https://hub:99999", "https://hub:x",
        "https://a b", "https://hub?x=1", "https://hub#x", "https://me:s3cret@hub", "https://[::1", "https://häb.org",
        "https://hub&s=x", "wss://hub",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_its_password(folder: Path, url: str) -> None:
    with pytest.raises(
        UsageProblem, match=r"\[listen\] public_url = .* is not an address of a hub; write https://HOST"
    ) as no:
        read(folder, f'{SHORT}[listen]\npublic_url = "{url}"\n')
    assert "s3cret" not in str(no.value)
