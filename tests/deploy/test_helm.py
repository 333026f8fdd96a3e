"""The chart: rendered by helm over a matrix of values, held against schemas, its probes asked of a real server."""

from __future__ import annotations

import copy
import json
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import CHART, ROOT, RULES, Server, get, parsed, python, rendered, run

CPU, GPU = CHART / "values-cpu.yaml", CHART / "values-gpu.yaml"
PVC = ("--set", "models.pvc.claimName=models")
MATRIX: dict[str, tuple[object, ...]] = {
    "cpu": ("-f", CPU),
    "gpu": ("-f", GPU),
    "pvc": PVC,
    "pvc, folder, polled": (*PVC, "--set", "models.pvc.subPath=ssd,models.pollSeconds=10"),
    "image": ("--set", "models.source=image,models.image.reference=registry.example/models:3,models.image.subPath=m"),
    "s3, synchronised": ("-f", CPU, "--set", "models.s3.sync.enabled=true"),
    "gpu, cache on a claim": ("-f", GPU, "--set", "plan.cache.kind=pvc,plan.cache.claimName=plans"),
    "gpu, no cache": ("-f", GPU, "--set", "plan.cache.kind=emptyDir"),
    "bare": (
        *PVC,
        "--set",
        "canary.enabled=false,networkPolicy.enabled=false,podDisruptionBudget.enabled=false,"
        "topologySpread.enabled=false,serviceAccount.create=false",
    ),
    "everything": (
        *("-f", CPU, "--set", "priorityClassName=high,runtimeClassName=nvidia,podAnnotations.a=b,podLabels.c=d"),
        *("--set", "imagePullSecrets[0].name=pull,server.extraArgs[0]=--log-verbose=1,server.env[0].name=A"),
        *("--set-string", "server.env[0].value=1,nodeSelector.disk=ssd"),
        *("--set", f"image.digest=sha256:{'0' * 64},service.type=LoadBalancer,service.annotations.e=f"),
        *("--set", "models.s3.sync.enabled=true,gpus=1,server.extraArgs[1]=--log-info=0"),
        *(
            "--set",
            "gateway.enabled=true,gateway.tokenSecret=token,gateway.model=shapes,gateway.extraArgs[0]=--threads=2",
        ),
    ),
    "gateway": (*PVC, "--set", "gateway.enabled=true,networkPolicy.enabled=false,topologySpread.enabled=false"),
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """Every entry of MATRIX, rendered."""
    folder = tmp_path_factory.mktemp("rendered")
    files = {}
    for name, options in MATRIX.items():
        text = run("helm", "template", "ssd", CHART, "--namespace", "detectors", *options, check=True).stdout
        files[name] = folder / f"{len(files)}.yaml"
        files[name].write_text(text)
    documents = {name: (path, parsed(path)) for name, path in files.items()}
    assert len(documents) == len(MATRIX)
    return documents


def of_kind(documents: list[Any], kind: str, name: str = "ssd") -> Any:
    """The only document of a kind; of the gateway where `name` says so."""
    names = {"ssd-gateway"} if name == "ssd-gateway" else {"ssd", "ssd-dashboard", "ssd-test"}
    (document,) = [entry for entry in documents if entry["kind"] == kind and entry["metadata"]["name"] in names]
    return document


def pod(documents: list[Any], name: str = "ssd") -> Any:
    return of_kind(documents, "Deployment", name)["spec"]["template"]["spec"]


def test_helm_lints_both_examples_strictly() -> None:
    for values in (CPU, GPU):
        run("helm", "lint", "--strict", CHART, "-f", values, check=True)


def test_kubernetes_and_custom_resource_schemas_hold_over_the_matrix(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    paths = [path for path, _ in matrix.values()]
    assert complaints("1.37", paths) == []
    assert python(ROOT / "deploy" / "schemas.py", "validate", *paths).returncode == 0


def complaints(version: str, paths: list[Path]) -> list[str]:
    """What kubernetes-validate says against manifests for a version of Kubernetes."""
    done = run("kubernetes-validate", "--strict", "-k", version, *paths)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("INFO", "WARN"))]
    assert bool(done.returncode) == bool(lines)
    return lines


@pytest.mark.long
@pytest.mark.parametrize("version", ["1.29", "1.31", "1.33", "1.35"])
def test_older_versions_of_kubernetes_take_the_chart(matrix: dict[str, tuple[Path, list[Any]]], version: str) -> None:
    """From kubeVersion on; image volumes came with 1.31."""
    (chart,) = parsed(CHART / "Chart.yaml")
    assert chart["kubeVersion"] == ">=1.29.0-0"
    assert complaints(version, [path for name, (path, _) in matrix.items() if name != "image"]) == []
    assert bool(complaints(version, [matrix["image"][0]])) == (version == "1.29")


@pytest.mark.parametrize(("right", "wrong"), [("readinessProbe:", "readinesProbe:"), ("sizeLimit:", "sizelimit:")])
def test_a_misspelt_key_in_a_manifest_is_caught(
    matrix: dict[str, tuple[Path, list[Any]]], tmp_path: Path, right: str, wrong: str
) -> None:
    text = matrix["cpu"][0].read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
    done = run("kubernetes-validate", "--strict", tmp_path / "wrong.yaml")
    assert done.returncode != 0
    assert wrong.rstrip(":") in done.stdout + done.stderr


def test_a_misspelt_key_in_a_custom_resource_is_caught(
    matrix: dict[str, tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    text = matrix["cpu"][0].read_text()
    for right, wrong in (
        ("- port: metrics\n", "- prot: metrics\n"),
        ("- alert: SSDOverload", "- alerts: SSDOverload"),
        ("maxReplicaCount:", "maxReplicasCount:"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    (tmp_path / "wrong.yaml").write_text(text)
    done = python(ROOT / "deploy" / "schemas.py", "validate", tmp_path / "wrong.yaml")
    assert done.returncode == 1
    found = sorted(re.findall(r"^(\w+)/ssd: .*'(\w+)' was unexpected", done.stdout, re.MULTILINE))
    assert found == [("PrometheusRule", "alerts"), ("ScaledObject", "maxReplicasCount"), ("ServiceMonitor", "prot")]


def keys(value: Any, prefix: str = "") -> set[str]:
    """Every path of keys in a mapping."""
    if not isinstance(value, dict):
        return set()
    return {f"{prefix}{key}" for key in value} | {
        deeper for key, inner in value.items() for deeper in keys(inner, f"{prefix}{key}.")
    }


def schema_keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The same of a schema, which must be closed wherever it lists keys."""
    if "properties" in schema:
        assert schema["additionalProperties"] is False, prefix
        for key, inner in schema["properties"].items():
            yield f"{prefix}{key}"
            yield from schema_keys(inner, f"{prefix}{key}.")


def test_the_schema_knows_exactly_the_values_that_are_explained() -> None:
    known = set(schema_keys(json.loads((CHART / "values.schema.json").read_text()))) - {"global"}
    (values,) = parsed(CHART / "values.yaml")
    explained = keys(values)
    assert known <= explained
    below = explained - known
    open_maps = (
        *("podSecurityContext.", "resources.requests.", "resources.limits.", "monitoring.dashboard.labels."),
        *("gateway.resources.requests.", "gateway.resources.limits."),
    )
    assert all(key.startswith(open_maps) for key in below), below


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "autoscalling.kind=hpa"), "autoscalling"),
        (("--set", "models.s3.ulr=s3://a/b"), "ulr"),
        (("--set", "models.source=s4"), "source"),
        (("--set", "server.preStopSeconds=0"), "preStopSeconds"),
        (("--set", "gpus=one"), "gpus"),
        (("--set", "gateway.enable=true"), "enable"),
        (("--set", "gateway.resources.limit.memory=1Gi"), "limit"),
        (("--set", "models.source=s3,models.s3.url=s3://bucket/"), "url"),
        (("--set", "models.pvc.claimName="), "models.pvc.claimName must name the claim"),
        (("--set", "models.source=image"), "models.image.reference must name"),
        (("--set", "plan.enabled=true"), "set gpus to 1"),
        (("--set", "autoscaling.minReplicas=9"), "minReplicas is larger"),
        (("--set", "models.source=s3,models.s3.url=s3://b/p,models.s3.sync.enabled=true"), "no server takes them up"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(options: tuple[str, ...], says: str) -> None:
    done = run("helm", "template", "ssd", CHART, *PVC, *options)
    assert done.returncode != 0
    assert says in done.stderr


def test_replicas_belong_to_the_autoscaler_where_there_is_one(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    assert of_kind(matrix["pvc"][1], "Deployment")["spec"]["replicas"] == 2
    for name, kind in (("cpu", "ScaledObject"), ("gpu", "HorizontalPodAutoscaler")):
        assert "replicas" not in of_kind(matrix[name][1], "Deployment")["spec"]
        scaler = of_kind(matrix[name][1], kind)["spec"]
        advanced = scaler.get("advanced", {}).get("horizontalPodAutoscalerConfig", scaler)
        assert advanced["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    trigger = of_kind(matrix["cpu"][1], "ScaledObject")["spec"]["triggers"][0]["metadata"]
    assert set(trigger) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
    assert 'ssd:queue_ms:mean1m{namespace="detectors",job="ssd"}' in trigger["query"]
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    assert "ssd:queue_ms:mean1m" in recorded


def test_a_pod_ends_after_its_requests(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    for name, (_, documents) in matrix.items():
        spec = pod(documents)
        triton = spec["containers"][0]
        variables = {entry["name"]: entry.get("value") for entry in triton["env"]}
        command = triton["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "sleep"
        assert all("lifecycle" not in other for other in spec["containers"][1:]), "balancers hear of the end at once"
        needed = int(command[1]) + int(variables["SSD_EXIT_TIMEOUT"])
        assert spec["terminationGracePeriodSeconds"] > needed, name
        strategy = of_kind(documents, "Deployment")["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_every_container_is_confined(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    for name, (_, documents) in matrix.items():
        gateway = [pod(documents, "ssd-gateway")] if name in ("gateway", "everything") else []
        for spec in (pod(documents), of_kind(documents, "Pod")["spec"], *gateway):
            assert spec["automountServiceAccountToken"] is False
            context = spec["securityContext"]
            assert context["runAsNonRoot"]
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}} in pod(documents)["volumes"] or (
            pod(documents)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == 1
        )


def test_secrets_reach_only_what_reads_the_bucket(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    direct, synced = pod(matrix["cpu"][1]), pod(matrix["s3, synchronised"][1])
    assert "ssd-models" in json.dumps(direct["containers"])
    assert "ssd-models" not in json.dumps(synced["containers"])
    (sync,) = synced["initContainers"]
    assert sync["restartPolicy"] == "Always"
    assert "ssd-models" in json.dumps(sync)
    assert {"name": "SSD_REPOSITORY", "value": "/models/current"} in synced["containers"][0]["env"]


def test_the_plan_is_built_on_the_nodes_own_gpu(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    spec = pod(matrix["gpu"][1])
    (builder,) = spec["initContainers"]
    triton = spec["containers"][0]
    assert builder["resources"]["limits"]["nvidia.com/gpu"] == triton["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert builder["args"] == ["--cache=/cache", "--into=/models", "--precision=fp16", "shapes"]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


def test_network_services_and_spread(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    documents = matrix["cpu"][1]
    services = {entry["metadata"]["name"]: entry["spec"] for entry in documents if entry["kind"] == "Service"}
    assert services["ssd-headless"]["clusterIP"] == "None"
    named = {port["name"]: port["containerPort"] for port in pod(documents)["containers"][0]["ports"]}
    assert named == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {port["targetPort"] for service in services.values() for port in service["ports"]} <= set(named)
    policy = of_kind(documents, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert allowed == {"http", "grpc", "metrics", "canary"}
    spread = pod(documents)["topologySpreadConstraints"][0]
    labels = of_kind(documents, "Deployment")["spec"]["selector"]["matchLabels"]
    assert spread["labelSelector"]["matchLabels"] == labels
    assert of_kind(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert all(services[name]["selector"] == labels for name in services)
    tested = of_kind(documents, "Pod")["metadata"]["labels"]
    assert not labels.items() <= tested.items(), "the test pod must not be behind the Service"


def test_the_gateway_is_off_unless_asked_for_and_reaches_only_the_servers(
    matrix: dict[str, tuple[Path, list[Any]]],
) -> None:
    assert not any("gateway" in entry["metadata"]["name"] for entry in matrix["cpu"][1])
    documents = matrix["everything"][1]
    deployment = of_kind(documents, "Deployment", "ssd-gateway")["spec"]
    labels = deployment["selector"]["matchLabels"]
    servers = of_kind(documents, "Deployment")["spec"]["selector"]["matchLabels"]
    assert labels.items() <= deployment["template"]["metadata"]["labels"].items()
    assert not servers.items() <= deployment["template"]["metadata"]["labels"].items(), (
        "no Service takes it for a server"
    )
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["args"] == ["--triton=dns:///ssd-headless:8001", "--model=shapes", "--threads=2"]
    assert {"name": "token", "key": "token"} in [
        entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry
    ]
    assert not any("valueFrom" in entry for entry in pod(matrix["gateway"][1], "ssd-gateway")["containers"][0]["env"])
    service = of_kind(documents, "Service", "ssd-gateway")["spec"]
    assert (
        service["selector"]
        == of_kind(documents, "PodDisruptionBudget", "ssd-gateway")["spec"]["selector"]["matchLabels"]
    )
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"] == "gateway"
    policy = of_kind(documents, "NetworkPolicy", "ssd-gateway")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["egress"][1]["to"] == [{"podSelector": {"matchLabels": servers}}]
    assert {"podSelector": {"matchLabels": labels}} in of_kind(documents, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert len([entry for entry in matrix["gateway"][1] if entry["kind"] == "NetworkPolicy"]) == 0


def test_the_prometheus_rule_is_the_rules_file(matrix: dict[str, tuple[Path, list[Any]]]) -> None:
    (rules,) = parsed(RULES)
    assert of_kind(matrix["cpu"][1], "PrometheusRule")["spec"] == rules
    board = of_kind(matrix["cpu"][1], "ConfigMap")["data"]["ssd-on-triton.json"]
    assert json.loads(board) == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_promtool_takes_the_rendered_rules(matrix: dict[str, tuple[Path, list[Any]]], tmp_path: Path) -> None:
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps(of_kind(matrix["cpu"][1], "PrometheusRule")["spec"]))
    run("promtool", "check", "rules", path, check=True)


def wrong_probes(container: Any, server: Server) -> list[str]:
    """Probes of a container that a real, ready server does not answer with 200 on its HTTP port.

    tritonserver's metrics port answers 200 to every path, whatever the state of the models.
    """
    ports = {"http": server.ports[0]}
    wrong = []
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]["httpGet"]
        try:
            get(f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}")
        except (urllib.error.HTTPError, KeyError) as error:
            wrong.append(f"{kind}: {probe}: {error}")
    return wrong


@pytest.mark.triton
def test_every_probe_is_answered_by_a_real_server(
    matrix: dict[str, tuple[Path, list[Any]]], servers: list[Server]
) -> None:
    container = pod(matrix["cpu"][1])["containers"][0]
    assert get(f"http://{servers[0].metrics}/v2/health/ready") is not None
    assert wrong_probes(container, servers[0]) == []
    for path in ("/v2/health/redy", "/health", "/v2/models/none/ready"):
        broken = copy.deepcopy(container)
        broken["readinessProbe"]["httpGet"]["path"] = path
        assert len(wrong_probes(broken, servers[0])) == 1, path
    broken["readinessProbe"]["httpGet"] = {"path": "/v2/health/ready", "port": "metrics"}
    assert len(wrong_probes(broken, servers[0])) == 1


def test_rendering_is_stable(matrix: dict[str, tuple[Path, list[Any]]], tmp_path: Path) -> None:
    assert rendered(tmp_path, *MATRIX["cpu"])[1] == matrix["cpu"][1]
