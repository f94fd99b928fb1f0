#include "plugin.h"

#include "../cuda/launch.h"

#include <cuda_runtime_api.h>

#include <new>
#include <string>

using namespace nvinfer1;

namespace cembed {
namespace {

constexpr char kName[] = "MaxSim", kVersion[] = "1", kNamespace[] = "cembed";
enum Input { kQuery, kPages, kOffsets, kScales }; // kScales inputs: half floats; one more: levels
constexpr PluginFieldCollection kNoFields{};

ILoggerFinder *logger_finder = nullptr;

int32_t fail(const std::string &what) {
    ILogger *logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger)
        logger->log(ILogger::Severity::kERROR, ("cembed::MaxSim: " + what).c_str());
    return 1;
}

bool has_levels(int32_t inputs) { return inputs > kScales; }

struct Form {
    DataType type;
    int32_t axes;
};

// Of the inputs in turn, and behind them the output.
Form wanted(int32_t at, int32_t inputs) {
    if (at == inputs)
        return {DataType::kFLOAT, 1};
    const Form forms[] = {{DataType::kHALF, 2},
                          {has_levels(inputs) ? DataType::kINT8 : DataType::kHALF, 2},
                          {DataType::kINT64, 1},
                          {DataType::kFLOAT, 1}};
    return forms[at];
}

// Shapes may still be unknown, as -1, when an engine is built.
int32_t check(const Dims &query, const Dims &pages, int32_t inputs) {
    const int64_t multiple = has_levels(inputs) ? 16 : 8, dim = pages.d[1];
    if (query.d[1] >= 0 && dim >= 0 && query.d[1] != dim)
        return fail("the query has dim " + std::to_string(query.d[1]) + ", the pages have " + std::to_string(dim));
    if (dim >= 0 && (dim == 0 || dim % multiple))
        return fail("dim " + std::to_string(dim) + ": a multiple of " + std::to_string(multiple) + " is wanted");
    return query.d[0] == 0 ? fail("a query without vectors") : 0;
}

} // namespace

IPluginCapability *MaxSim::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
    }
    return nullptr;
}

IPluginV3 *MaxSim::clone() noexcept { return new (std::nothrow) MaxSim(*this); }

const char *MaxSim::getPluginName() const noexcept { return kName; }
const char *MaxSim::getPluginVersion() const noexcept { return kVersion; }
const char *MaxSim::getPluginNamespace() const noexcept { return kNamespace; }

// Building -----------------------------------------------------------------------------------------------------------

int32_t MaxSim::getNbOutputs() const noexcept { return 1; }

int32_t MaxSim::getOutputDataTypes(DataType *types, int32_t outputs, const DataType *, int32_t) const noexcept {
    if (outputs != 1)
        return 1;
    types[0] = DataType::kFLOAT;
    return 0;
}

int32_t MaxSim::getOutputShapes(const DimsExprs *given, int32_t inputs, const DimsExprs *, int32_t, DimsExprs *shapes,
                                int32_t outputs, IExprBuilder &builder) noexcept {
    if (outputs != 1 || inputs < kScales || inputs > kScales + 1)
        return fail(std::to_string(inputs) + " inputs: query, pages, offsets are wanted, and scales with int8 pages");
    shapes[0].nbDims = 1;
    shapes[0].d[0] = builder.operation(DimensionOperation::kSUB, *given[kOffsets].d[0], *builder.constant(1));
    return 0;
}

bool MaxSim::supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc *tensors, int32_t inputs,
                                       int32_t outputs) noexcept {
    if (outputs != 1 || inputs < kScales || inputs > kScales + 1 || at > inputs)
        return false;
    const PluginTensorDesc &tensor = tensors[at].desc;
    const Form form = wanted(at, inputs);
    return tensor.format == TensorFormat::kLINEAR && tensor.type == form.type && tensor.dims.nbDims == form.axes;
}

int32_t MaxSim::configurePlugin(const DynamicPluginTensorDesc *given, int32_t inputs, const DynamicPluginTensorDesc *,
                                int32_t) noexcept {
    return check(given[kQuery].desc.dims, given[kPages].desc.dims, inputs);
}

size_t MaxSim::getWorkspaceSize(const DynamicPluginTensorDesc *given, int32_t inputs, const DynamicPluginTensorDesc *,
                                int32_t) const noexcept {
    const Dims &query = given[kQuery].max;
    return maxsim_workspace(has_levels(inputs), static_cast<int32_t>(query.d[0]), static_cast<int32_t>(query.d[1]));
}

// Running ------------------------------------------------------------------------------------------------------------

int32_t MaxSim::onShapeChange(const PluginTensorDesc *given, int32_t inputs, const PluginTensorDesc *,
                              int32_t) noexcept {
    levels_ = has_levels(inputs);
    return check(given[kQuery].dims, given[kPages].dims, inputs);
}

int32_t MaxSim::enqueue(const PluginTensorDesc *given, const PluginTensorDesc *made, const void *const *inputs,
                        void *const *outputs, void *workspace, cudaStream_t stream) noexcept {
    const Dims &query = given[kQuery].dims, &pages = given[kPages].dims;
    MaxSimCall call{};
    call.levels = levels_;
    call.query = inputs[kQuery];
    call.num = static_cast<int32_t>(query.d[0]);
    call.dim = static_cast<int32_t>(query.d[1]);
    call.pages.rows = static_cast<const unsigned char *>(inputs[kPages]);
    call.pages.offsets = static_cast<const long long *>(inputs[kOffsets]);
    call.pages.scales = levels_ ? static_cast<const float *>(inputs[kScales]) : nullptr;
    call.pages.count = made[0].dims.d[0];
    call.pages.row_bytes = call.dim * (levels_ ? 1 : 2);
    call.rows = pages.d[0];
    call.scores = static_cast<float *>(outputs[0]);
    call.workspace = workspace;
    const auto status = static_cast<cudaError_t>(maxsim_launch(call, stream));
    return status == cudaSuccess ? 0 : fail(cudaGetErrorString(status));
}

IPluginV3 *MaxSim::attachToContext(IPluginResourceContext *) noexcept { return clone(); }

const PluginFieldCollection *MaxSim::getFieldsToSerialize() noexcept { return &kNoFields; }

// Creating -----------------------------------------------------------------------------------------------------------

IPluginV3 *MaxSimCreator::createPlugin(const char *, const PluginFieldCollection *, TensorRTPhase) noexcept {
    return new (std::nothrow) MaxSim;
}

const PluginFieldCollection *MaxSimCreator::getFieldNames() noexcept { return &kNoFields; }
const char *MaxSimCreator::getPluginName() const noexcept { return kName; }
const char *MaxSimCreator::getPluginVersion() const noexcept { return kVersion; }
const char *MaxSimCreator::getPluginNamespace() const noexcept { return kNamespace; }

} // namespace cembed

// What TensorRT looks for in a library of plugins: --staticPlugins, --dynamicPlugins, IPluginRegistry::loadLibrary.
#define CEMBED_EXPORT extern "C" __attribute__((visibility("default")))

CEMBED_EXPORT IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static cembed::MaxSimCreator creator;
    static IPluginCreatorInterface *const creators[] = {&creator};
    count = 1;
    return creators;
}

CEMBED_EXPORT void setLoggerFinder(ILoggerFinder *finder) { cembed::logger_finder = finder; }
