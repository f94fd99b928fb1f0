// cembed::MaxSim for TensorRT 10.3 and later: scores of one query with many pages.
//
// inputs   query    half    [Q, D]
//          pages    half    [N, D]     rows of all pages, one page after the other
//                   or int8 [N, D]     levels, zero point 0
//          offsets  int64   [P + 1]    first row of each page, and N
//          scales   float   [P]        with int8 only: what a page's levels are multiplied with
// output   scores   float   [P]        minus infinity for a page without rows
//
// D is a multiple of 8, with int8 of 16. It has no attributes: nothing is serialised. TensorRT 10.3 takes no tensor of
// 2^31 numbers or more, which are 524,288 pages of 32 x 128; the kernels themselves count rows in 64 bits.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <new>
#include <string>

#include "../cuda/launch.h"

using namespace nvinfer1;

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
bool takes(int32_t inputs, int32_t outputs) { return outputs == 1 && (inputs == kScales || inputs == kScales + 1); }

struct Form {
    DataType type;
    int32_t axes;
};

// Of the inputs in turn, and after them the output.
Form needed(int32_t at, int32_t inputs) {
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
        return fail("dim " + std::to_string(dim) + ": a multiple of " + std::to_string(multiple) + " is needed");
    return query.d[0] == 0 ? fail("a query without vectors") : 0;
}

class MaxSim final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }

    IPluginV3 *clone() noexcept override { return new (std::nothrow) MaxSim(*this); }
    const char *getPluginName() const noexcept override { return kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }

    // Building

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType *types, int32_t outputs, const DataType *, int32_t) const noexcept override {
        types[0] = DataType::kFLOAT;
        return outputs != 1;
    }

    int32_t getOutputShapes(const DimsExprs *given, int32_t inputs, const DimsExprs *, int32_t, DimsExprs *shapes,
                            int32_t outputs, IExprBuilder &builder) noexcept override {
        if (!takes(inputs, outputs))
            return fail("query, pages and offsets are needed, and scales with int8 pages; " + std::to_string(inputs) +
                        " inputs were given");
        shapes[0].nbDims = 1;
        shapes[0].d[0] = builder.operation(DimensionOperation::kSUB, *given[kOffsets].d[0], *builder.constant(1));
        return 0;
    }

    bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc *tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (!takes(inputs, outputs) || at > inputs)
            return false;
        const PluginTensorDesc &tensor = tensors[at].desc;
        const Form form = needed(at, inputs);
        return tensor.format == TensorFormat::kLINEAR && tensor.type == form.type && tensor.dims.nbDims == form.axes;
    }

    int32_t configurePlugin(const DynamicPluginTensorDesc *given, int32_t inputs, const DynamicPluginTensorDesc *,
                            int32_t) noexcept override {
        return check(given[kQuery].desc.dims, given[kPages].desc.dims, inputs);
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc *given, int32_t inputs, const DynamicPluginTensorDesc *,
                            int32_t) const noexcept override {
        const Dims &most = given[kQuery].max;
        return maxsim_workspace(has_levels(inputs), static_cast<int32_t>(most.d[0]), static_cast<int32_t>(most.d[1]));
    }

    // Running

    int32_t onShapeChange(const PluginTensorDesc *given, int32_t inputs, const PluginTensorDesc *,
                          int32_t) noexcept override {
        levels_ = has_levels(inputs);
        return check(given[kQuery].dims, given[kPages].dims, inputs);
    }

    int32_t enqueue(const PluginTensorDesc *given, const PluginTensorDesc *made, const void *const *inputs,
                    void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
        MaxSimCall call{};
        call.levels = levels_;
        call.query = inputs[kQuery];
        call.num = static_cast<int32_t>(given[kQuery].dims.d[0]);
        call.dim = static_cast<int32_t>(given[kQuery].dims.d[1]);
        call.pages.rows = static_cast<const unsigned char *>(inputs[kPages]);
        call.pages.offsets = static_cast<const long long *>(inputs[kOffsets]);
        call.pages.scales = levels_ ? static_cast<const float *>(inputs[kScales]) : nullptr;
        call.pages.count = made[0].dims.d[0];
        call.pages.row_bytes = call.dim * (levels_ ? 1 : 2);
        call.rows = given[kPages].dims.d[0];
        call.scores = static_cast<float *>(outputs[0]);
        call.workspace = workspace;
        const auto status = static_cast<cudaError_t>(maxsim_launch(call, stream));
        return status == cudaSuccess ? 0 : fail(cudaGetErrorString(status));
    }

    IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override { return clone(); }
    const PluginFieldCollection *getFieldsToSerialize() noexcept override { return &kNoFields; }

  private:
    bool levels_ = false; // pages are int8: known once shapes are
};

class MaxSimCreator final : public IPluginCreatorV3One {
  public:
    IPluginV3 *createPlugin(const char *, const PluginFieldCollection *, TensorRTPhase) noexcept override {
        return new (std::nothrow) MaxSim;
    }
    const PluginFieldCollection *getFieldNames() noexcept override { return &kNoFields; }
    const char *getPluginName() const noexcept override { return kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }
};

} // namespace

// What TensorRT looks for in a library of plugins: --staticPlugins, --dynamicPlugins, IPluginRegistry::loadLibrary.
#define CEMBED_EXPORT extern "C" __attribute__((visibility("default")))

CEMBED_EXPORT IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static MaxSimCreator creator;
    static IPluginCreatorInterface *const creators[] = {&creator};
    count = 1;
    return creators;
}

CEMBED_EXPORT void setLoggerFinder(ILoggerFinder *finder) { logger_finder = finder; }
