"""Holds manifests against the schemas of Kubernetes' custom resources; runs in the environment of deploy/tools.py.

    python deploy/schemas.py validate FILE...     every ServiceMonitor, PrometheusRule, ScaledObject, ServingRuntime and
                                                  InferenceService; unknown keys are errors. Exit status 1 on an error.
    python deploy/schemas.py compose FILE         a compose.yaml, by the Compose Specification; Docker is not asked
    python deploy/schemas.py json FILE...         the YAML documents as one JSON list

`kubernetes-validate` knows Kubernetes' own kinds and only warns about these. Their schemas come from packages that are
generated from the same Go types as the custom resource definitions: cloudcoil's for the Prometheus operator and KEDA,
and KServe's own Python SDK. SSD_CRDS names a folder of custom resource definitions (*.yaml) to use instead.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]

_PYDANTIC = {
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
}
_KSERVE = {
    "ServingRuntime": ("kserve.models", "V1alpha1ServingRuntime"),
    "ClusterServingRuntime": ("kserve.models", "V1alpha1ClusterServingRuntime"),
    "InferenceService": ("kserve.models", "V1beta1InferenceService"),
}
_SIMPLE = {"str": "string", "int": "integer", "bool": "boolean", "float": "number", "datetime": "string"}
_QUANTITY = {"anyOf": [{"type": "string"}, {"type": "number"}]}


def closed(schema: Any) -> Any:
    """The schema with every object's unknown keys refused; objects without listed keys stay open."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields", False))
    return result


def of_pydantic(kind: str) -> Schema:
    """The schema of a kind from cloudcoil's models."""
    model = getattr(importlib.import_module(_PYDANTIC[kind]), kind)
    return open_metadata(closed(model.model_json_schema(by_alias=True)))


def of_kserve(kind: str) -> Schema:
    """The schema of a kind from KServe's SDK, whose classes list the type of every key."""
    if "kserve" not in sys.modules:  # its __init__ imports the SDK's servers, which are not installed
        package = importlib.util.find_spec("kserve")
        assert package is not None
        assert package.submodule_search_locations is not None
        bare = types.ModuleType("kserve")
        bare.__path__ = list(package.submodule_search_locations)
        sys.modules["kserve"] = bare
    definitions: dict[str, Schema] = {}

    def reference(declared: str) -> Schema:
        inner = re.fullmatch(r"(list|dict)\[(?:str, ?)?(.+)\]", declared)
        if inner:
            key = "items" if inner[1] == "list" else "additionalProperties"
            return {"type": "array" if inner[1] == "list" else "object", key: reference(inner[2])}
        if declared in _SIMPLE:
            return {"type": _SIMPLE[declared]}
        found = _class(declared)
        if found is None:
            return _QUANTITY if declared in ("ResourceQuantity", "IntstrIntOrString") else {}
        if declared not in definitions:
            definitions[declared] = {}  # a type may contain itself
            types_, names = found.openapi_types, found.attribute_map
            definitions[declared] = {
                "type": "object",
                "properties": {names[name]: reference(kind_) for name, kind_ in types_.items()},
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{declared}"}

    top = reference(_KSERVE[kind][1])
    return {**top, "$defs": {**definitions, "V1ResourceRequirements": _RESOURCES, "V1ObjectMeta": {"type": "object"}}}


_MAP = {"type": "object", "additionalProperties": _QUANTITY}
_RESOURCES = {
    "type": "object",
    "properties": {"limits": _MAP, "requests": _MAP, "claims": {"type": "array"}},
    "additionalProperties": False,
}


def _class(name: str) -> Any:
    """A class of KServe's SDK or of Kubernetes' client."""
    for module in ("kserve.models", "kubernetes.client"):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
        if module == "kserve.models":
            try:
                return getattr(importlib.import_module(f"{module}.{snake}"), name)
            except (ImportError, AttributeError):
                continue
        return getattr(importlib.import_module(module), name, None)
    return None


def open_metadata(schema: Schema) -> Schema:
    """Metadata is Kubernetes' own; its server fills in more than a manifest holds."""
    schema.get("properties", {})["metadata"] = {"type": "object", "required": ["name"]}
    return schema


@functools.cache
def definitions() -> dict[tuple[str, str], Schema]:
    """(kind, version) → schema, of the custom resource definitions in the folder that SSD_CRDS names."""
    schemas = {}
    for path in sorted(Path(os.environ["SSD_CRDS"]).rglob("*.yaml")) if "SSD_CRDS" in os.environ else ():
        for document in yaml.safe_load_all(path.read_text()):
            if document and document.get("kind") == "CustomResourceDefinition":
                for version in document["spec"]["versions"]:
                    schema = open_metadata(closed(version["schema"]["openAPIV3Schema"]))
                    schemas[document["spec"]["names"]["kind"], version["name"]] = schema
    return schemas


@functools.cache
def schema_of(kind: str, version: str) -> Schema | None:
    """The schema of a kind; None for Kubernetes' own kinds."""
    given = definitions().get((kind, version))
    if given is not None:
        return given
    if kind in _PYDANTIC:
        return of_pydantic(kind)
    return of_kserve(kind) if kind in _KSERVE else None


def errors(document: Any) -> Iterator[str]:
    """What is wrong with one manifest."""
    kind, version = document.get("kind", ""), document.get("apiVersion", "")
    schema = schema_of(kind, version.rpartition("/")[2])
    if schema is None:
        if "." in version.partition("/")[0] and not version.partition("/")[0].endswith(".k8s.io"):
            yield f"{kind} {version}: no schema is known for this custom resource"
        return
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        detail = min((leaf for leaf in _leaves(error)), key=lambda leaf: -len(leaf.absolute_path))
        place = ".".join(map(str, detail.absolute_path)) or "top"
        yield f"{kind}/{document.get('metadata', {}).get('name', '?')}: {place}: {detail.message[:300]}"


def _leaves(error: Any) -> Iterator[Any]:
    if not error.context:
        yield error
    for inner in error.context:
        yield from _leaves(inner)


def documents(paths: list[str]) -> list[Any]:
    """All documents of some YAML files."""
    return [document for path in paths for document in yaml.safe_load_all(Path(path).read_text()) if document]


def main(command: str, paths: list[str]) -> int:
    """The command line."""
    if command == "json":
        print(json.dumps(documents(paths)))
        return 0
    if command == "compose":
        from compose_spec import PyCompose

        try:
            PyCompose.from_yaml(Path(paths[0]).read_text())
        except ValueError as error:
            print(error)
            return 1
        return 0
    wrong = [error for document in documents(paths) for error in errors(document)]
    print("\n".join(wrong) or f"{len(documents(paths))} documents are as their schemas say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
