"""The plugin's C side says of the attributes, inputs and outputs of SSDNMS what build/contract.py says.

Header, reference library, the TensorRT plugin's attributes (compiled without TensorRT) and the benchmark's settings are
asked. Only what needs TensorRT's own types is read from the source.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import contract
from build.contract import ATTRIBUTES, Nms
from build.tables import INT32_MAX
from build.tensorrt.plugins import PLUGINS
from plugins.bench import params as bench
from tests.plugins.conftest import compile_host
from tests.plugins.library import RULES, Library, Params, c_value, params_of

SOURCE = PLUGINS / "ssd_nms"
ENUMS = {"score_activation": "SsdNmsActivation", "box_coding": "SsdNmsBoxCoding"}
FLOAT32, INT32, CHAR = 1, 5, 6  # TensorRT's PluginFieldType
F = np.float32


def camel(name: str) -> str:
    """The name of an attribute in SsdNmsParams."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def edges(name: str) -> tuple[list[Any], list[Any]]:
    """Values at the ends of an attribute's range, and the nearest ones beyond them, as C has them."""
    rule, default = RULES[name], getattr(Nms(), name)
    if rule["choices"]:
        last = len(rule["choices"]) - 1
        return [0, last], [-1, last + 1]
    if isinstance(default, bool):
        return [0, 1], [-1, 2]
    if isinstance(default, int):
        low, high = int(rule["low"]), int(rule["high"])
        assert high == INT32_MAX  # nothing of 32 bits lies beyond
        return [low, high], [low - 1, -(2**31)]
    if isinstance(default, float):
        low, high = F(rule["low"]), F(rule["high"])
        return [low, high], [np.nextafter(low, F(-9)), np.nextafter(high, F(9)), math.nan]
    assert rule["above"] == 0
    least, most = np.nextafter(F(0), F(1)), np.finfo(F).max
    at, beyond = (least, most), (F(0), -least, math.inf, math.nan)
    return [tuple(map(float, np.full(4, value))) for value in at], [(1.0, 1.0, 1.0, float(value)) for value in beyond]


def changed(name: str, value: Any) -> Params:
    params = params_of(Nms())
    setattr(params, name, (ctypes.c_float * 4)(*value) if isinstance(value, tuple) else value)
    return params


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the C compiler makes of ssd_nms.h."""
    folder = tmp_path_factory.mktemp("header")
    offsets = {name: f"offsetof(SsdNmsParams, {camel(name)})" for name in ATTRIBUTES} | {"": "sizeof(SsdNmsParams)"}
    values = {
        choice: f"static_cast<size_t>(SSD_NMS_{choice.upper()})" for name in ENUMS for choice in RULES[name]["choices"]
    }
    lines = [f'    std::printf("\\"%s\\": %zu, ", "{name}", {text});' for name, text in {**offsets, **values}.items()]
    source = folder / "header.cpp"
    body = ["int main()", "{", '    std::printf("{");', *lines, '    std::printf("\\"end\\": 0}\\n");', "}"]
    source.write_text("\n".join(['#include "ssd_nms.h"', "#include <cstdio>", *body, ""]))
    program = compile_host(folder / "header", f"-I{SOURCE}", source)
    told: dict[str, Any] = json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    return told


def test_the_struct_holds_the_attributes_in_order(header: dict[str, Any]) -> None:
    text = (SOURCE / "ssd_nms.h").read_text()
    (body,) = re.findall(r"typedef struct SsdNmsParams\s*\{(.*?)\} SsdNmsParams;", text, re.S)
    assert re.findall(r"^\s*(?:float|int32_t) (\w+)", body, re.M) == [camel(name) for name in ATTRIBUTES]
    for struct in (Params, bench.Params):
        assert [name for name, *_ in struct._fields_] == list(ATTRIBUTES)
        assert [getattr(struct, name).offset for name in ATTRIBUTES] == [header[name] for name in ATTRIBUTES]
        assert ctypes.sizeof(struct) == header[""]


@pytest.mark.parametrize("name", ENUMS)
def test_choices_have_their_numbers(name: str, header: dict[str, Any]) -> None:
    choices = RULES[name]["choices"]
    assert [header[choice] for choice in choices] == list(range(len(choices)))
    (body,) = re.findall(rf"typedef enum {ENUMS[name]}\s*\{{(.*?)\}}", (SOURCE / "ssd_nms.h").read_text(), re.S)
    assert re.findall(r"SSD_NMS_(\w+) =", body) == [choice.upper() for choice in choices]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_library_has_the_same_ranges(name: str, reference: Library) -> None:
    allowed, refused = edges(name)
    for value in allowed:
        assert reference.validate(changed(name, value), None) == ("ok", "")
    for value in refused:
        status, message = reference.validate(changed(name, value), None)
        assert (status, message.split(" ")[0].split("[")[0]) == ("params", name), value


def test_a_message_names_every_choice(reference: Library) -> None:
    for name in ENUMS:
        _, message = reference.validate(changed(name, -1), None)
        assert re.findall(r"(\d) \((\w+)\)", message) == [
            (str(number), choice) for number, choice in enumerate(RULES[name]["choices"])
        ]


class Field(ctypes.Structure):
    """PluginField."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The attributes of the TensorRT plugin, without TensorRT."""
    folder = Path(__file__).parent / "attributes"
    output = tmp_path_factory.mktemp("attributes") / "libattributes.so"
    include = ["-shared", f"-I{folder}", f"-I{SOURCE}"]
    library = ctypes.CDLL(str(compile_host(output, *include, folder / "attributes.cpp", SOURCE / "checks.cpp")))
    library.pluginName.restype = library.pluginVersion.restype = ctypes.c_char_p
    library.attribute.restype = ctypes.POINTER(Field)
    library.readAttributes.restype = ctypes.c_bool
    return library


def field_of(name: str, value: Any) -> tuple[Field, Any]:
    """A field as TensorRT's ONNX parser makes it, and its memory."""
    default = getattr(Nms(), name)
    if isinstance(value, str):
        data, kind, length = ctypes.create_string_buffer(value.encode()), CHAR, len(value)
    elif isinstance(default, (float, tuple)):
        values = value if isinstance(value, tuple) else (value,)
        data, kind, length = (ctypes.c_float * len(values))(*values), FLOAT32, len(values)
    else:
        data, kind, length = ctypes.c_int32(value), INT32, 1
    return Field(name.encode(), ctypes.addressof(data), kind, length), data


def read(plugin: ctypes.CDLL, attributes: Mapping[str, Any]) -> Params | str:
    """What the plugin makes of attributes: their struct, or why it refuses them."""
    kept = [field_of(name, value) for name, value in attributes.items()]
    fields = (Field * len(kept))(*(field for field, _ in kept))
    params, message = Params(), ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(message))
    taken = plugin.readAttributes(fields, len(kept), ctypes.byref(params), message, size)
    return params if taken else message.value.decode()


def test_the_creator_announces_the_attributes_with_their_defaults(plugin: ctypes.CDLL) -> None:
    announced = [plugin.attribute(index).contents for index in range(plugin.attributeCount())]
    assert [field.name.decode() for field in announced] == list(ATTRIBUTES)
    for field, (name, default) in zip(announced, Nms().attributes().items(), strict=True):
        wanted, data = field_of(name, default)
        assert (field.type, field.length) == (wanted.type, wanted.length), name
        size = field.length * (1 if field.type == CHAR else 4)
        assert ctypes.string_at(field.data, size) == bytes(data)[:size], name
    assert bytes(read(plugin, {})) == bytes(params_of(Nms()))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_plugin_takes_what_the_contract_allows(name: str, plugin: ctypes.CDLL) -> None:
    allowed, refused = edges(name)
    if RULES[name]["choices"]:
        allowed = list(RULES[name]["choices"])
        refused = ["", "other", allowed[0].upper()]
    for value in allowed:
        wanted = changed(name, c_value(name, value))
        assert bytes(read(plugin, {name: value})) == bytes(wanted), value
    for value in refused:
        reason = read(plugin, {name: value})
        assert isinstance(reason, str), value
        assert name in reason


def test_all_attributes_at_once_are_what_the_node_says(plugin: ctypes.CDLL) -> None:
    nms = Nms(0.1, 0.2, 3, 4, 5, "none", "corner", (1.0, 2.0, 3.0, 4.0), False, True)
    assert bytes(read(plugin, nms.attributes())) == bytes(params_of(nms))


def test_the_plugin_has_the_operators_name_and_version(plugin: ctypes.CDLL) -> None:
    name, version = contract.OP_TYPE, str(contract.OP_VERSION)
    assert (plugin.pluginName().decode(), plugin.pluginVersion().decode()) == (name, version)
    information = (SOURCE / "tensorrt" / "plugin.cpp").read_text().replace('\\"', '"')
    assert f'"plugin": "{name}", "plugin_version": "{version}"' in information


def test_the_plugin_has_the_operators_inputs_and_outputs() -> None:
    text = (SOURCE / "tensorrt" / "tensors.h").read_text()
    for enum, names in (("Input", (*contract.NMS_INPUTS, *contract.THRESHOLDS)), ("Output", contract.OUTPUTS)):
        (body,) = re.findall(rf"enum {enum} : int32_t\s*\{{(.*?)\}}", text, re.S)
        listed = [(name, int(number)) for name, number in re.findall(r"k(\w+) = (\d+)", body)]
        assert listed == [(name.upper(), number) for number, name in enumerate(names)]
    (kinds,) = re.findall(r"kOutputTypes\[kOutputs\] = \{(.*?)\}", text)
    assert re.findall(r"DataType::k(\w+)", kinds) == [tensor.tensorrt for tensor in contract.outputs(1)]
    counts = {name: int(number) for name, number in re.findall(r"constexpr int32_t k(\w+) = (\d+);", text)}
    inputs = len(contract.NMS_INPUTS)
    assert counts["Outputs"] == len(contract.OUTPUTS)
    assert (counts["FewestInputs"], counts["MostInputs"]) == (inputs, inputs + len(contract.THRESHOLDS))


def test_the_benchmark_has_the_same_defaults() -> None:
    settings = bench.Settings()
    assert vars(settings) == {
        name: RULES[name]["choices"].index(value) if RULES[name]["choices"] else value
        for name, value in Nms().attributes().items()
    }
