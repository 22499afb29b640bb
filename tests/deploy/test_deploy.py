"""The files beside the code agree with it: metric names, ports, variables, packages. Nothing is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.serve import all_settings
from cli.settings import OTHER_VARIABLES
from server.metrics import Metrics

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\b((?:gorgon|vllm)[_:]\w+)")


def exposed_names() -> set[str]:
    names = set()
    for family in Metrics("model").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/gorgon.json").read_text())
    return document


@pytest.mark.parametrize("panel", dashboard()["panels"], ids=lambda panel: panel["title"])
def test_dashboard_asks_for_metrics_that_exist(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        names = set(METRIC.findall(target["expr"]))
        assert names and names <= exposed_names()
        assert target["expr"].count("(") == target["expr"].count(")")


def test_dashboard_shows_tokens_per_step_first() -> None:
    panels = dashboard()["panels"]
    assert panels[0]["title"] == "Tokens per step"
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(DEPLOY))
)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_compose_mounts_exist_and_prometheus_finds_the_server() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), source
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    [job] = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["gorgon:8000"]}]
    datasource = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert datasource["datasources"][0]["uid"] == dashboard()["panels"][0]["datasource"]["uid"]


def test_compose_publishes_on_the_loopback_interface_alone() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_needs_no_key_where_compose_sets_one() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    variables = compose["services"]["gorgon"]["environment"]
    assert "GORGON_OPEN_METRICS=true" in variables
    assert {variable.split("=")[0] for variable in variables} <= {s.variable for s in all_settings()}


def test_image_sets_only_known_variables_and_fits_the_documented_command() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    known = {setting.variable for setting in all_settings()} | OTHER_VARIABLES
    assert set(re.findall(r"GORGON_\w+", dockerfile)) <= known
    assert "GORGON_HOST=0.0.0.0" in dockerfile
    assert "\nUSER gorgon\n" in dockerfile
    assert "docker run --gpus all -p 8000:8000 -v gorgon:/models gorgon" in (ROOT / "README.md").read_text()
    assert "GORGON_HOME=/models" in dockerfile and "VOLUME /models" in dockerfile


def test_image_gets_every_package() -> None:
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{package.split('.')[0]}" for package in packages} <= set(ignore)
