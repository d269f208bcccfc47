"""What docker-compose.yml names is there: commands, settings, files, volumes, services. No Docker runs it here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from stoker.address import Address
from stoker.cli import app
from stoker.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "stoker"}


def test_the_services_are_these_and_what_is_not_always_wanted_has_a_profile() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert profiles == {
        "redis": [],
        "flower": [],
        "gateway": ["gateway"],
        "cpu-worker": ["cpu-worker"],
        "prometheus": ["metrics"],
        "grafana": ["metrics"],
    }
    assert set(re.findall(r"--profile (\S+)", TEXT)) == {"cpu-worker", "gateway", "metrics"}


def test_every_port_is_bound_to_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", OURS)
def test_a_command_of_ours_can_be_given_and_its_settings_exist(name: str) -> None:
    group: Any = typer.main.get_command(app)
    first, *rest = OURS[name]["command"]
    command = group.commands[first]
    command.make_context(first, rest)  # parses, and runs nothing
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    assert set(OURS[name]["environment"]) <= known
    address = Address.parse(filled(OURS[name]["environment"]["STOKER_URL"]))
    assert address.shown == "redis://:***@redis:6379/0"
    assert "redis" in SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_volume_configuration_and_service_that_is_named_is_there(name: str) -> None:
    service = SERVICES[name]
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"], source
    assert {config["source"] for config in service.get("configs", [])} <= COMPOSE["configs"].keys()
    assert set(service.get("depends_on", [])) <= SERVICES.keys()
    if service.get("build"):
        assert (ROOT / service["build"] / "Dockerfile").is_file()


def test_no_volume_or_configuration_is_left_over() -> None:
    sources = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= sources
    used = {config["source"] for service in SERVICES.values() for config in service.get("configs", [])}
    assert used == COMPOSE["configs"].keys()


def test_the_gateway_can_be_given_a_key_by_the_command_of_the_head() -> None:
    """It listens on every address of its container, and serves nobody without one."""
    (line,) = re.findall(r"--profile gateway run --rm gateway (\S+ \S+ \S+)", TEXT)
    words = line.split()
    group: Any = typer.main.get_command(app)
    keys = group.commands[words[0]]
    keys.commands[words[1]].make_context(words[1], ["team"])
    assert "--address=0.0.0.0" in SERVICES["gateway"]["command"]
    assert 'ENTRYPOINT ["stoker"]' in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_each_password_must_be_made_and_stands_in_no_command() -> None:
    names = set(re.findall(r"\$\{([A-Z_]+)", TEXT.replace("$$", "")))
    assert names == {"BROKER_PASSWORD", "GRAFANA_PASSWORD"}
    assert all(rest.startswith(":?") for rest in re.findall(r"(?<!\$)\$\{[A-Z_]+_PASSWORD(.{2})", TEXT))
    head = TEXT.partition("name: stoker")[0]
    assert all(name.partition("_")[0] in head for name in names)
    for service in SERVICES.values():
        assert not re.search(r"(?<!\$)\$\{", str(service.get("command"))), "a command line can be read by all"
        assert not re.search(r"(?<!\$)\$\{", str(service.get("healthcheck")))
    assert "/.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_broker_starts_with_a_password_that_its_command_line_does_not_hold(tmp_path: Path) -> None:
    """The command runs as a shell of the image would run it, with a program in the place of the server."""
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "$@"\ncat "$1"\nls -l "$1" | cut -c 1-10\n')
    server.chmod(0o755)
    command = [word.replace("$$", "$") for word in SERVICES["redis"]["command"]]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "REDISCLI_AUTH": "s3cret"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    words, *rest = done.stdout.splitlines()
    assert rest == ["requirepass s3cret", "-rw-------"]
    assert "s3cret" not in words
    for wanted in ("--appendonly yes", "--maxmemory-policy noeviction", "--dir /data"):
        assert wanted in words


def test_prometheus_is_given_what_its_own_file_says_of_the_monitor_except_where_it_is() -> None:
    ours = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    here = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])
    assert here["scrape_configs"][0]["static_configs"] == [{"targets": ["flower:5555"]}]
    assert "--host=flower" in SERVICES["flower"]["command"], "the monitor answers to no other name"
    assert here["scrape_configs"][1]["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert {"--host=gateway", "--port=8000"} <= set(SERVICES["gateway"]["command"])
    for job, other in zip(here["scrape_configs"], ours["scrape_configs"], strict=True):
        job["static_configs"] = other["static_configs"]
    assert here == ours
    (source,) = yaml.safe_load(COMPOSE["configs"]["grafana-datasource"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(COMPOSE["configs"]["grafana-dashboards"]["content"])["providers"]
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert any(path.startswith(provider["options"]["path"]) and path.endswith(".json") for path in mounted)


def filled(text: str) -> str:
    return re.sub(r"\$\{[A-Z_]+:\?[^}]*\}", "a1b2", text)
