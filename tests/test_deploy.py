"""The files in scripts/deploy: what runs as root, what an image and a manifest must say, and a hub behind the proxies' examples.

Building images is left to hands (docs/operations.md, o16-containers): it takes a base image and minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import shlex
import shutil
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fedsoda_edge.cli.commands
import fedsoda_hub.cli.commands
from fedsoda_edge.network.hub_transport import HubTransport
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode, encode
from fedsoda_hub.settings.run import read_settings
from tests.conftest import ROOT
from tests.edge.network.test_hub_transport import DATA, DIGEST, HELLO, SmallHub, fetched, listening
from tests.edge.network.test_nginx import NGINX, nginx
from tests.on_port import runs_on_port

yaml: Any = pytest.importorskip("yaml")
DEPLOY = ROOT / "scripts" / "deploy"
CADDY = shutil.which("caddy")
PROGRAMS = {"fedsoda-edge": fedsoda_edge.cli.commands.app, "fedsoda-hub": fedsoda_hub.cli.commands.app}
USER = "10001"


def parses(program: str, words: list[str]) -> bool:
    """Whether the program takes this command line; nothing of it is done."""
    command: Any = typer.main.get_command(PROGRAMS[program])
    for place, word in enumerate(words):
        if not hasattr(command, "commands"):
            command.make_context(program, words[place:])
            return True
        command = command.commands[word]
    return hasattr(command, "commands") or not words


# --- the image -------------------------------------------------------------------------------------------------------


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Containerfile, with those of the stages of ours that it begins from."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        found[name].append((word, rest.strip()))
    return found


@pytest.mark.parametrize("target", ["edge", "hub"])
def test_an_image_has_no_root_a_volume_for_its_home_and_a_health_check(target: str) -> None:
    says = dict(stages()[target])  # the last of each kind is in force
    every = stages()[target]
    assert says["USER"] == f"{USER}:{USER}"
    assert says["VOLUME"] == "/var/lib/fedsoda"
    assert says["ENTRYPOINT"] == f'["fedsoda-{target}"]'
    check = says["HEALTHCHECK"].partition(" CMD ")[2]
    program, *words = shlex.split(check.partition("|")[0])
    assert parses(program, words)
    command = yaml.safe_load(says["CMD"])
    assert command == ["--help"] or parses(f"fedsoda-{target}", command)
    assert ("ENV", f"FEDSODA_IMAGE=fedsoda-{target}") in every or any(
        word == "ENV" and f"FEDSODA_IMAGE=fedsoda-{target}" in rest for word, rest in every
    )
    assert not any(word == "ADD" for word, _ in every)
    installs = [rest for one in stages().values() for word, rest in one if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("--constraint /release/constraints.txt" in one for one in installs)


# --- compose and Kubernetes ------------------------------------------------------------------------------------------


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return found


def test_compose_has_a_hub_and_two_edges_that_their_programs_take() -> None:
    assert {"hub", "edge-1", "edge-2"} <= set(services())
    for name, service in services().items():
        assert parses(service["image"], service["command"]), name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        for other in service.get("depends_on", ()):
            assert other in services()
        places = {volume.split(":")[1] for volume in service["volumes"]}
        assert "/var/lib/fedsoda" in places, f"{name} would write where nothing stays"
        paths = [word for word in service["command"] if word.startswith("/")]
        assert all(any(path.startswith(place) for place in places) for path in paths), name


def test_each_edge_of_compose_has_a_home_and_a_link_of_its_own() -> None:
    edges = [service for name, service in services().items() if name.startswith("edge-")]
    homes = [volume for service in edges for volume in service["volumes"] if volume.endswith(":/var/lib/fedsoda")]
    links = [service["command"][service["command"].index("--link-file") + 1] for service in edges]
    made = [one["command"][-1] for name, one in services().items() if name.startswith("invite-")]
    assert len({*homes}) == len({*links}) == len(edges) == 2
    assert sorted(links) == sorted(made)


def test_the_manifest_runs_one_confined_hub_whose_settings_are_read(tmp_path: Path) -> None:
    kinds = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}
    assert set(kinds) == {"ConfigMap", "Service", "StatefulSet"}
    spec = kinds["StatefulSet"]["spec"]
    pod = spec["template"]["spec"]
    [hub] = pod["containers"]
    assert spec["replicas"] == 1
    assert (
        spec["selector"]["matchLabels"]
        == spec["template"]["metadata"]["labels"]
        == kinds["Service"]["spec"]["selector"]
    )
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (int(USER), True)
    assert hub["securityContext"]["readOnlyRootFilesystem"] is True
    assert hub["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert parses(hub["image"], hub["args"])
    mounted = {mount["name"] for mount in hub["volumeMounts"]}
    claimed = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed
    for probe in (hub["readinessProbe"], hub["startupProbe"]):
        assert (probe["httpGet"]["path"], probe["httpGet"]["scheme"]) == ("/healthz", "HTTPS")
    path = tmp_path / "run.toml"
    path.write_text(kinds["ConfigMap"]["data"]["run.toml"])
    (tmp_path / "public.txt").write_text("A text.\n")
    settings = read_settings(path)
    assert settings.listen.port == hub["ports"][0]["containerPort"] == kinds["Service"]["spec"]["ports"][0]["port"]
    assert tomllib.loads(path.read_text())["listen"]["host"] == "0.0.0.0"


# --- proxies, as the examples are written ----------------------------------------------------------------------------


@contextlib.contextmanager
def caddy(directory: Path, text: str) -> Iterator[int]:
    """Run Caddy with the example, on a port and towards a hub of the test; no process of it is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = "{\n\tadmin off\n\tauto_https off\n\tskip_install_trust\n}\n"
    (directory / "Caddyfile").write_text(head + text.replace("example.org {", f"http://127.0.0.1:{port} {{"))
    assert CADDY is not None
    command = [CADDY, "run", "--config", str(directory / "Caddyfile"), "--adapter", "caddyfile"]
    env = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    with runs_on_port(command, port, env):
        yield port


@pytest.mark.slow
@pytest.mark.parametrize(
    "proxy",
    [
        pytest.param("nginx", marks=pytest.mark.skipif(NGINX is None, reason="nginx is not installed")),
        pytest.param("caddy", marks=pytest.mark.skipif(CADDY is None, reason="caddy is not installed")),
    ],
)
def test_behind_the_proxy_of_the_example_conversation_and_download_work(proxy: str, tmp_path: Path) -> None:
    (tmp_path / DIGEST).write_bytes(DATA)
    hub = SmallHub(tmp_path, ms.Refusal(reason="this run is over", fatal=True))
    text = (DEPLOY / {"nginx": "nginx.conf", "caddy": "Caddyfile"}[proxy]).read_text(encoding="utf-8")
    assert text.count("127.0.0.1:8470") == 1

    async def play() -> None:
        async with listening(hub) as inner:
            here = text.replace("127.0.0.1:8470", inner.removeprefix("http://"))
            with (nginx if proxy == "nginx" else caddy)(tmp_path, here) as port:
                edge = HubTransport(f"http://127.0.0.1:{port}/fl/triage/", "good")
                await edge.connect()
                await edge.send(encode(HELLO))
                assert [type(decode(frame)[0]) async for frame in edge.frames()] == [ms.Refusal]
                assert hashlib.sha256(await fetched(edge, 0)).hexdigest() == DIGEST
                assert await fetched(edge, 2_000_001) == DATA[2_000_001:]
                await edge.close()

    asyncio.run(play())
