"""The OpenAPI description of the gateway."""

from __future__ import annotations

from typing import Any

import ssd_client

from .problems import CONTENT_TYPE
from .settings import Settings

PICTURE_TYPES = ("application/json", "image/jpeg", "image/png")  # of an answer of /detect


def describe(settings: Settings) -> dict[str, Any]:
    """The description of a gateway with these settings, as OpenAPI 3.1."""
    number = {"type": "number"}
    fraction = {"type": "number", "minimum": 0, "maximum": 1}
    text = {"type": "string"}
    size = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}

    def record(**properties: Any) -> dict[str, Any]:
        return {"type": "object", "required": list(properties), "properties": properties}

    def named(name: str) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{name}"}

    def answers(*statuses: int, **good: Any) -> dict[str, Any]:
        problem = {"description": "an error", "content": {CONTENT_TYPE: {"schema": named("Problem")}}}
        return {"200": good, **{str(status): problem for status in statuses}}

    def option(name: str, schema: dict[str, Any], about: str) -> dict[str, Any]:
        return {"name": name, "in": "query", "schema": schema, "description": about}

    schemas = {
        "Problem": record(type=text, title=text, status={"type": "integer"}, detail=text),
        "Detection": record(
            box={
                "type": "array",
                "items": number,
                "minItems": 4,
                "maxItems": 4,
                "description": "x1, y1, x2, y2 in pixels of the upright picture",
            },
            score=fraction,
            class_id={"type": "integer", "minimum": 0},
            label=text,
        ),
        "Detections": record(
            model=text,
            version=text,
            manifest_sha256=text,
            image_size={**size, "description": "width and height of the upright picture"},
            detections={"type": "array", "items": named("Detection"), "description": "best first"},
            timings_ms={
                "type": "object",
                "additionalProperties": number,
                "description": "read (the body), queue (for a thread), decode (the file), detect (Triton), total",
            },
        ),
        "Info": record(
            default_model=text,
            max_bytes={"type": "integer"},
            max_pixels={"type": "integer"},
            models={
                "type": "array",
                "items": record(
                    name=text,
                    version=text,
                    labels={"type": "array", "items": text},
                    input_size=size,
                    score_threshold=fraction,
                    lowest_score_threshold=fraction,
                    iou_threshold=fraction,
                    runtime_thresholds={"type": "boolean"},
                    max_detections={"type": "integer"},
                    precision=text,
                    runtime=text,
                    manifest_sha256=text,
                ),
            },
        ),
        "Health": record(status=text),
    }
    file = {"type": "string", "format": "binary"}
    upload = {"schema": {"type": "object", "properties": {"image": file}, "required": ["image"]}}
    json_answer, jpeg, png = PICTURE_TYPES
    found: dict[str, Any] = {
        json_answer: {"schema": named("Detections")},
        jpeg: {"schema": file},
        png: {"schema": file},
    }
    detect = {
        "summary": "Find the objects in a picture",
        "parameters": [
            option("model", text, "default: default_model of /info"),
            option("score_threshold", fraction, "keep scores above this; default: the model's own"),
            option("iou_threshold", fraction, "suppress boxes that overlap a better one by more; default: the model's"),
        ],
        "requestBody": {
            "required": True,
            "description": f"at most {settings.max_bytes} bytes and {settings.max_pixels} pixels",
            "content": {
                "image/*": {"schema": file},
                "application/octet-stream": {"schema": file},
                "multipart/form-data": upload,
            },
        },
        "responses": answers(
            *(400, 401, 403, 404, 408, 411, 413, 415, 422, 429, 502, 503, 504),
            description="the detections, or with Accept: image/jpeg or image/png the picture with them drawn on it",
            content=found,
        ),
    }

    def get(summary: str, media_type: str, schema: dict[str, Any], *statuses: int) -> dict[str, Any]:
        good = {"description": summary, "content": {media_type: {"schema": schema}}}
        return {"get": {"summary": summary, "responses": answers(403, *statuses, **good)}}

    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "SSD on Triton: gateway", "version": ssd_client.__version__},
        "paths": {
            "/": get("The page for people", "text/html", text),
            "/detect": {"post": detect},
            "/info": get("Limits and models", json_answer, named("Info"), 401, 503, 504),
            "/healthz": get("Whether a model is ready", json_answer, named("Health"), 503, 504),
            "/metrics": get("Prometheus metrics of this gateway", "text/plain", text, 401),
            "/openapi.json": get("This description", json_answer, {"type": "object"}),
        },
        "components": {"schemas": schemas},
    }
    if settings.token:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, method in (("/detect", "post"), ("/info", "get"), ("/metrics", "get")):
            description["paths"][path][method]["security"] = [{"token": []}]
    return description
