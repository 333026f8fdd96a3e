//! \file adapters.cpp
//! Drives the TensorRT adapter as TensorRT does, from TensorRT's headers alone, over the reference on host memory.
//!
//! Creator, shapes, formats, refusals, serialisation and enqueue. Prints what failed and ends with 1, or prints "ok".

#include "driver.h"

namespace
{

void testFormats(SsdNmsPlugin& plugin)
{
    Inputs const inputs = inputsOf(2, 10, 3, 5);
    for (int32_t position = 0; position < 9; ++position)
    {
        std::string const where = "format of tensor " + std::to_string(position);
        bool const isFlexible = position < 2;
        bool const isInt = position == 5 || position == 8;
        auto const linear = TensorFormat::kLINEAR;
        expect(supports(plugin, inputs, position, DataType::kFLOAT, linear) == !isInt, where + ": FP32");
        expect(supports(plugin, inputs, position, DataType::kHALF, linear) == isFlexible, where + ": FP16");
        expect(supports(plugin, inputs, position, DataType::kINT32, linear) == isInt, where + ": INT32");
        expect(!supports(plugin, inputs, position, DataType::kINT8, linear), where + ": INT8");
        expect(!supports(plugin, inputs, position, DataType::kFLOAT, TensorFormat::kCHW32), where + ": CHW32");
    }
}

void testShapes(SsdNmsPlugin& plugin)
{
    std::vector<std::vector<Extent>> const wanted{{-1, 1}, {-1, 7, 4}, {-1, 7}, {-1, 7}};
    expect(shapesOf(plugin, inputsOf(-1, 10, 3, 3)) == wanted, "a dynamic batch");
    expect(shapesOf(plugin, inputsOf(-1, 10, -1, 3)).empty(), "a dynamic C is refused");
    Inputs flat = inputsOf(2, 10, 3, 3);
    flat.dims[0] = dimsOf({2, 40});
    expect(shapesOf(plugin, flat).empty(), "deltas without three dimensions are refused");
    expect(shapesOf(plugin, inputsOf(2, 10, 3, 2)).empty(), "two inputs are refused");
    expect(shapesOf(plugin, inputsOf(2, 10, 3, 6)).empty(), "six inputs are refused");
}

void testConfigure(SsdNmsPlugin& plugin)
{
    Inputs const good = inputsOf(2, 10, 3, 5, DataType::kHALF);
    expect(configure(plugin, good), "a good configuration");
    SsdNmsShape const shape{2, 10, 3, SSD_NMS_FLOAT16, SSD_NMS_FLOAT16, 1, 1};
    SsdNmsParams params = defaultParams();
    params.maxDetections = 7;
    expect(workspaceOf(plugin, good) == ssdNmsWorkspaceSize(&params, &shape), "the core's workspace");
    for (size_t i = 0; i < good.dims.size(); ++i)
    {
        Inputs bad = good;
        bad.dims[i].d[0] += 1;
        bool const passed = configure(plugin, bad);
        char const* const names[] = {"class_logits", "class_logits", "anchors", "score_threshold", "iou_threshold"};
        bool const isNamed = gLog.find(names[i]) != std::string::npos;
        expect(!passed && isNamed, "a wrong dimension of input " + std::to_string(i) + " is refused by name");
    }
    Inputs const background = inputsOf(2, 10, 1, 3);
    bool const passed = configure(plugin, background);
    expect(!passed && gLog.find("it is the background") != std::string::npos, "nothing but background is refused");
    Inputs const large = inputsOf(1, 1 << 24, 300, 3);
    bool const passedLarge = configure(plugin, large);
    expect(
        !passedLarge && gLog.find("16777216 anchors x 299") != std::string::npos, "too large is refused with figures");
    configure(plugin, good);
}

//! What TensorRT calls at run time gives what the library gives.
void testEnqueue(SsdNmsPlugin& plugin, SsdNmsParams const& params, size_t count)
{
    Inputs const inputs = inputsOf(2, 10, 3, count);
    Tensors got;
    uint32_t random = 1;
    for (Buffer& buffer : got.inputs)
    {
        for (float& value : buffer.values)
        {
            random = random * 1664525U + 1013904223U;
            value = static_cast<float>(random >> 8) / 16777216.0F * 2.0F - 0.5F;
        }
    }
    for (size_t i = 0; i < 2; ++i)
    {
        got.inputs[kSCORE_THRESHOLD].values[i] = 0.3F + 0.1F * static_cast<float>(i);
        got.inputs[kIOU_THRESHOLD].values[i] = 0.2F;
    }
    Tensors want = got;
    std::string const name = "enqueue with " + std::to_string(count) + " inputs";
    configure(plugin, inputs);
    SsdNmsPlugin* const runtime = throughPlan(plugin);
    expect(runtime != nullptr, name + ": from a plan");
    expect(enqueue(*runtime, inputs, got) == 0, name + ": runs");
    SsdNmsShape const shape{2, 10, 3, 0, 0, count > 3 ? 1 : 0, count > 4 ? 1 : 0};
    auto const at = [](Buffer& buffer)
    {
        return static_cast<float*>(buffer.values);
    };
    SsdNmsTensors const tensors{at(want.inputs[0]), at(want.inputs[1]), at(want.inputs[2]), at(want.inputs[3]),
        at(want.inputs[4]), reinterpret_cast<int32_t*>(at(want.outputs[0])), at(want.outputs[1]), at(want.outputs[2]),
        reinterpret_cast<int32_t*>(at(want.outputs[3]))};
    expect(ssdNmsLaunch(&params, &shape, &tensors, nullptr, 20, nullptr) == SSD_NMS_OK, name + ": the library runs");
    int32_t detections = 0;
    std::memcpy(&detections, at(got.outputs[0]), sizeof(detections));
    expect(detections > 0, name + ": finds something");
    expect(std::memcmp(got.outputs, want.outputs, sizeof(want.outputs)) == 0, name + ": the same bits");

    size_t const launched = gLaunches;
    size_t const checked = gChecks;
    expect(enqueue(*runtime, inputs, got, false) == 0, name + ": again, without onShapeChange");
    size_t const own = gAllocations;
    expect(own == 0, name + ": no allocation, but " + std::to_string(own));
    expect(gLaunches == launched + 1 && gChecks == checked, name + ": nothing is checked again");
    expect(std::memcmp(got.outputs, want.outputs, sizeof(want.outputs)) == 0, name + ": the same bits again");
    SsdNmsPlugin* const unprepared = throughPlan(plugin);
    std::memset(got.outputs, 0, sizeof(got.outputs));
    expect(enqueue(*unprepared, inputs, got, false) == 0, name + ": from a plan, without onShapeChange");
    expect(std::memcmp(got.outputs, want.outputs, sizeof(want.outputs)) == 0, name + ": no threshold is lost");
    release(unprepared);

    Inputs const larger = inputsOf(3, 10, 3, count);
    bool const isRun = enqueue(*runtime, larger, got) == 0;
    expect(!isRun && gLog.find("the plan was built with 20:") != std::string::npos, name + ": beyond its workspace");
    expect(enqueue(*runtime, inputsOf(1, 10, 3, count), got) == 0, name + ": a smaller batch");

    Inputs wrong = inputs;
    wrong.dims[1].d[1] = 11;
    expect(enqueue(*runtime, wrong, got) != 0, name + ": a wrong shape is refused");
    expect(enqueue(*runtime, inputsOf(0, 10, 3, count), got) == 0, name + ": an empty batch is nothing to do");
    release(runtime);
}

#if NV_TENSORRT_MAJOR >= 10
//! What a clone serialises is its own, and outlives the plugin it was cloned from.
void testClones()
{
    auto* const original = static_cast<SsdNmsPlugin*>(create({}));
    configure(*original, inputsOf(2, 10, 3, 5));
    original->getFieldsToSerialize();
    auto* const copy = static_cast<SsdNmsPlugin*>(original->clone());
    PluginFieldCollection const* const fields = copy->getFieldsToSerialize();
    expect(fields != original->getFieldsToSerialize(), "a clone has fields of its own");
    auto const contains = [](SsdNmsPlugin const* plugin, void const* data)
    {
        auto const* const first = reinterpret_cast<char const*>(plugin);
        return data >= first && data < first + sizeof(*plugin);
    };
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        expect(!contains(original, fields->fields[i].data), std::string{"a clone's field "} + fields->fields[i].name);
    }
    expect(contains(copy, fields->fields[0].data), "a clone's attributes are in it");
    std::memset(static_cast<void*>(original), 0xA5, sizeof(*original)); // as freed memory may look
    auto* const back = static_cast<SsdNmsPlugin*>(gCreator.createPlugin("nms", fields, TensorRTPhase::kRUNTIME));
    expect(back != nullptr, "and are read without the original");
    release(back);
    release(copy);
    ::operator delete(static_cast<void*>(original));
}
#endif

void testPlans(SsdNmsPlugin& plugin)
{
#if NV_TENSORRT_MAJOR >= 10
    PluginFieldCollection const* const fields = plugin.getFieldsToSerialize();
    std::vector<PluginField> changed{fields->fields, fields->fields + fields->nbFields};
    PluginFieldCollection collection{fields->nbFields, changed.data()};
    int32_t const version = 9;
    auto const at = [&](char const* name) -> PluginField&
    {
        return *std::find_if(changed.begin(), changed.end(),
            [&](PluginField const& field) { return std::strcmp(field.name, name) == 0; });
    };
    at("serialization_version").data = &version;
    auto const read = [&]
    {
        return gCreator.createPlugin("nms", &collection, TensorRTPhase::kRUNTIME);
    };
    bool const isRefused = read() == nullptr && gLog.find("serialization version 9") != std::string::npos;
    expect(isRefused, "a plan of another version is refused");
    at("serialization_version").data = &kSerializationVersion;
    Plugin* const good = read();
    expect(good != nullptr, "a plan of this version");
    delete good;
    for (char const* const name : {"serialization_version", "inputs", "workspace_bytes"})
    {
        expect(create({at(name)}) == nullptr, std::string{"a network cannot set "} + name);
    }
    int32_t const many = 6;
    at("inputs").data = &many;
    expect(read() == nullptr, "a plan with six inputs is refused");
    std::swap(at("inputs"), changed.back());
    collection.nbFields -= 1;
    expect(read() == nullptr, "a plan without its number of inputs is refused");
    changed.back() = fields->fields[fields->nbFields - 1];
    std::swap(at("serialization_version"), changed.back());
    expect(read() == nullptr, "a plan without a version is refused");
#else
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    bytes[4] = 9;
    expect(gCreator.deserializePlugin("nms", bytes.data(), bytes.size()) == nullptr, "a plan of another version");
    expect(gCreator.deserializePlugin("nms", bytes.data(), bytes.size() - 1) == nullptr, "a short plan");
#endif
}

} // namespace

extern "C" ILogger* getLogger() noexcept
{
    return &gLogger;
}

int main()
{
    SsdNmsParams params = defaultParams();
    params.maxDetections = 7;
    PluginFieldCollection const* const announced = gCreator.getFieldNames();
    expect(
        announced != nullptr && announced->nbFields >= 10, "the attributes are announced"); // test_contract.py: which
    Plugin* const created = create({PluginField{"max_detections", &params.maxDetections, PluginFieldType::kINT32, 1}});
    expect(created != nullptr, "creation");
    expect(create({PluginField{"foo", &params.maxDetections, PluginFieldType::kINT32, 1}}) == nullptr, "unknown");
    auto& plugin = *static_cast<SsdNmsPlugin*>(created);
    testFormats(plugin);
    testShapes(plugin);
    testConfigure(plugin);
    for (size_t const count : {3U, 4U, 5U})
    {
        testEnqueue(plugin, params, count);
    }
    testPlans(plugin);
#if NV_TENSORRT_MAJOR >= 10
    testClones();
#endif
    auto* const copy = plugin.clone();
    expect(copy != nullptr, "clone");
#if NV_TENSORRT_MAJOR >= 10
    int64_t const many = int64_t{1} << 40;
    expect(create({PluginField{"max_detections", &many, PluginFieldType::kINT64, 1}}) == nullptr, "64 bits too many");
    int64_t const few = 5;
    Plugin* const from64 = create({PluginField{"max_detections", &few, PluginFieldType::kINT64, 1}});
    expect(from64 != nullptr, "64 bits that fit");
    for (auto const type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD, PluginCapabilityType::kRUNTIME})
    {
        expect(plugin.getCapabilityInterface(type) != nullptr, "a capability");
    }
    delete from64;
    delete copy;
    delete created;
#else
    copy->destroy();
    created->destroy();
#endif
    std::printf("%s", gFailures == 0 ? "ok\n" : "");
    return gFailures == 0 ? 0 : 1;
}
