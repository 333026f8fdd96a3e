"""Rules and dashboard: by promtool, and asked of a real Prometheus that scrapes two real, loaded servers."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.monitoring import picture
from tests.deploy.balancing import clients, envoy
from tests.deploy.conftest import CHART, ROOT, RULES, Server, free_ports, get, need, parsed, python, run, running, wait

RULES_TEST = ROOT / "deploy" / "monitoring" / "rules_test.yml"
PICTURE = ROOT / "artifacts" / "fleet" / "dashboard.png"
DASHBOARD = CHART / "files" / "dashboard.json"


def test_promtool_takes_the_rules_and_their_tests() -> None:
    run("promtool", "check", "rules", "--lint-fatal", RULES, check=True)
    run("promtool", "test", "rules", RULES_TEST, check=True)


def never_fired(rules: Path, tests: Path) -> set[str]:
    """Alerts that no case of the tests sees fire."""
    (document,), (cases,) = parsed(rules), parsed(tests)
    alerts = {rule["alert"] for group in document["groups"] for rule in group["rules"] if "alert" in rule}
    fired = {
        case["alertname"]
        for test in cases["tests"]
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    quiet = {
        case["alertname"]
        for test in cases["tests"]
        for case in test.get("alert_rule_test", ())
        if not case.get("exp_alerts")
    }
    return alerts - (fired & quiet)


def test_every_alert_is_seen_firing_and_quiet() -> None:
    assert never_fired(RULES, RULES_TEST) == set()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ssd:error_share:ratio5m > 0.01", "ssd:error_share:ratio5m > 1"),  # a share is never above 1
        ('reason=~"BACKEND|OTHER"', 'reason=~"backend|other"'),
        ("(nv_inference_pending_request_count) > 0", "(nv_inference_pending_requests) > 0"),
        ("expr: up == 0 and", "expr: up == 2 and"),
        ("group_right () ssd:servers:serving) > 0", "group_right () ssd:servers:serving) > 99"),
    ],
)
def test_an_alert_that_can_never_fire_is_caught(tmp_path: Path, right: str, wrong: str) -> None:
    text = RULES.read_text()
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong))
    cases = RULES_TEST.read_text()
    (tmp_path / "rules_test.yml").write_text(re.sub(r"rule_files: .*", "rule_files: [rules.yml]", cases))
    assert run("promtool", "test", "rules", tmp_path / "rules_test.yml").returncode != 0


def test_an_alert_without_a_test_is_caught(tmp_path: Path) -> None:
    more = "\n      - alert: SSDNew\n        expr: up == 2\n"
    (tmp_path / "rules.yml").write_text(RULES.read_text().rstrip() + more)
    assert never_fired(tmp_path / "rules.yml", RULES_TEST) == {"SSDNew"}


def test_the_dashboard_is_what_its_source_makes() -> None:
    made = python(ROOT / "deploy" / "monitoring" / "dashboard.py", check=True).stdout
    assert json.loads(DASHBOARD.read_text()) == json.loads(made)


def expressions() -> dict[str, str]:
    """Every panel's expressions, Grafana's variables filled in as for "All"."""
    board = json.loads(DASHBOARD.read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$job", "ssd").replace("$model", ".*")
        for panel in board["panels"]
        for target in panel["targets"]
    }


class Prometheus:
    """A running Prometheus, asked by its HTTP interface."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[Any]:
        """The samples of an expression now."""
        answer = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        assert answer["status"] == "success", answer
        samples: list[Any] = answer["data"]["result"]
        return samples

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        alerts = json.loads(get(f"{self.url}/api/v1/alerts"))["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def faster(rules: str) -> str:
    """The rules with shorter times, so a test of seconds sees what takes minutes: nothing else changes."""
    rules = re.sub(r"\bfor: \S+", "for: 3s", rules)
    return re.sub(r"\[(1m|5m|15m)\]", "[8s]", rules)


@contextmanager
def prometheus(folder: Path, servers: list[Server]) -> Iterator[Prometheus]:
    """A Prometheus that scrapes servers every second, with the rules of the chart."""
    program = need("prometheus")
    (folder / "rules.yml").write_text(faster(RULES.read_text()))
    targets = [server.metrics for server in servers]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "ssd", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))
    (port,) = free_ports(1)
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(command, folder / "prometheus.log"):
        own = Prometheus(port)
        wait("Prometheus is ready", lambda: "Ready" in get(f"{own.url}/-/ready"), 60)
        yield own


@pytest.mark.triton
@pytest.mark.long
def test_every_panel_has_data_and_the_right_alert_fires_and_clears(servers: list[Server], tmp_path: Path) -> None:
    began = time.time()
    marks: dict[str, float] = {}

    def mark(event: str) -> None:
        marks[event] = time.time()

    with (
        prometheus(tmp_path, servers) as own,
        envoy(servers, tmp_path) as balancer,
        clients(balancer.grpc, "grpc", retries=3) as count,
    ):
        missing: dict[str, str] = {}

        def complete() -> bool:
            missing.clear()
            missing.update({name: text for name, text in expressions().items() if not own.query(text)})
            return not missing

        wait("every panel's expression returns data", complete, 60, 0.5)
        wait("both servers are seen", lambda: len(own.query("ssd:server_queue_ms:mean1m")) == 2, 20, 0.5)
        assert own.query("sum(ssd:requests:rate1m)")[0]["value"][1] != "0"
        metrics = set(re.findall(r"\b(?:nv|ssd)_\w+", RULES.read_text()))
        assert {metric for metric in metrics if not own.query(metric)} == set()
        assert own.firing() == set()

        servers[1].send(signal.SIGKILL)
        mark("kill -9 of one server")
        wait("the alert fires", lambda: "SSDServerDown" in own.firing(), 30, 0.3)
        mark("SSDServerDown fires, the server is started again")
        assert own.firing() <= {"SSDServerDown", "SSDModelNotReady", "SSDRestartLoop"}
        servers[1].stop()
        servers[1].start()
        wait("the alert clears", lambda: "SSDServerDown" not in own.firing(), 30, 0.3)
        mark("it clears")
        before = count.answered
        wait("both servers answer again", lambda: count.answered > before + 100, 60)

        seen, count.picture = count.picture, Image.new("RGB", (300, 300))
        mark("clients send blank pictures")
        wait("the alert about blank pictures fires", lambda: own.firing() == {"SSDNoDetections"}, 40, 0.3)
        mark("SSDNoDetections fires, clients send scenes again")
        count.picture = seen
        wait("it clears", lambda: own.firing() == set(), 40, 0.3)
        mark("it clears, too")
        time.sleep(5)  # so the picture shows the end
        picture.draw(own.url, json.loads(DASHBOARD.read_text()), began, time.time(), PICTURE, marks)
    print(f"{count.answered} answered, {len(count.failed)} failed, one of two servers killed and started again")
    assert count.failed == []
    assert PICTURE.stat().st_size > 10_000


@pytest.mark.triton
@pytest.mark.long
def test_servers_with_different_versions_and_a_server_without_a_model_are_seen(
    data_repository: Path, backend_folder: Path, tmp_path: Path
) -> None:
    """The alerts about versions and missing models, from real servers' metrics."""
    other = Path(shutil.copytree(data_repository, tmp_path / "other"))
    (other / "shapes" / "1").rename(other / "shapes" / "2")
    config = other / "shapes" / "config.pbtxt"
    config.write_text(config.read_text().replace("versions: 1", "versions: 2"))
    broken = Path(shutil.copytree(other, tmp_path / "broken"))
    (broken / "shapes" / "2" / "model.onnx").write_bytes(b"damaged")
    own = [
        Server(str(path), backend_folder, tmp_path / f"{path.name}.log") for path in (data_repository, other, broken)
    ]
    try:
        for server in own[:2]:
            server.start()
        own[2].start(ready=False)
        with prometheus(tmp_path, own) as seen:
            wait("both alerts fire", lambda: {"SSDVersionSkew", "SSDModelNotReady"} <= seen.firing(), 60, 0.5)
            assert seen.firing() == {"SSDVersionSkew", "SSDModelNotReady"}
    finally:
        for server in own:
            server.stop()
