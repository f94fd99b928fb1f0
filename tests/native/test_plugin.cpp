// The TensorRT plugin as TensorRT meets it: loaded by name, asked for its creator, its forms, its workspace. No GPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

using namespace nvinfer1;

static void check(bool passed, const char *what) {
    if (!passed) {
        std::printf("failed: %s\n", what);
        std::exit(1);
    }
}
#define CHECK(what) check(what, #what)

struct Heard final : ILogger, ILoggerFinder {
    std::string last;
    void log(Severity, const char *text) noexcept override { last = text; }
    ILogger *findLogger() override { return this; }
};

static DynamicPluginTensorDesc tensor(DataType type, int32_t axes, int64_t first, int64_t second = 0) {
    DynamicPluginTensorDesc made{};
    made.desc.type = type;
    made.desc.format = TensorFormat::kLINEAR;
    made.desc.dims.nbDims = axes;
    made.desc.dims.d[0] = first;
    made.desc.dims.d[1] = second;
    made.min = made.max = made.desc.dims;
    return made;
}

// Query, pages, offsets, scores; with int8 pages scales before them.
struct Tensors {
    DynamicPluginTensorDesc all[5];
    int32_t inputs;
    explicit Tensors(bool levels, int64_t dim)
        : all{tensor(DataType::kHALF, 2, 20, dim), tensor(levels ? DataType::kINT8 : DataType::kHALF, 2, 100, dim),
              tensor(DataType::kINT64, 1, 8), tensor(DataType::kFLOAT, 1, 7), tensor(DataType::kFLOAT, 1, 7)},
          inputs(levels ? 4 : 3) {}
};

static void forms(IPluginV3OneBuild &build, bool levels) {
    Tensors given(levels, 128);
    for (int32_t at = 0; at <= given.inputs; ++at) {
        CHECK(build.supportsFormatCombination(at, given.all, given.inputs, 1));
        Tensors other(levels, 128);
        other.all[at].desc.type = DataType::kINT32;
        CHECK(!build.supportsFormatCombination(at, other.all, other.inputs, 1));
        other = Tensors(levels, 128);
        other.all[at].desc.format = TensorFormat::kCHW32;
        CHECK(!build.supportsFormatCombination(at, other.all, other.inputs, 1));
        other = Tensors(levels, 128);
        other.all[at].desc.dims.nbDims = 3;
        CHECK(!build.supportsFormatCombination(at, other.all, other.inputs, 1));
    }
    CHECK(!build.supportsFormatCombination(0, given.all, 2, 1));
    // 2 blocks of 16 rows, of 256 or 128 bytes; scales and biases; a counter
    CHECK(build.getWorkspaceSize(given.all, given.inputs, given.all + given.inputs, 1) ==
          size_t{32} * (levels ? 128 : 256) + 2 * 32 * 4 + 4);
    CHECK(build.configurePlugin(given.all, given.inputs, given.all + given.inputs, 1) == 0);
}

static void mistakes(IPluginV3OneBuild &build, const Heard &heard) {
    Tensors odd(true, 24);
    CHECK(build.configurePlugin(odd.all, 4, odd.all + 4, 1) != 0);
    CHECK(heard.last == "cembed::MaxSim: dim 24: a multiple of 16 is needed");
    CHECK(build.configurePlugin(Tensors(false, 24).all, 3, nullptr, 1) == 0);
    Tensors unequal(false, 64);
    unequal.all[0].desc.dims.d[1] = 128;
    CHECK(build.configurePlugin(unequal.all, 3, unequal.all + 3, 1) != 0);
    CHECK(heard.last == "cembed::MaxSim: the query has dim 128, the pages have 64");
    unequal.all[0].desc.dims.d[1] = -1;
    CHECK(build.configurePlugin(unequal.all, 3, unequal.all + 3, 1) == 0);
}

int main(int, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW);
    check(library != nullptr, arguments[1]);
    const auto creators = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(library, "getCreators"));
    const auto listen = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(library, "setLoggerFinder"));
    CHECK(creators && listen);
    Heard heard;
    listen(&heard);
    int32_t count = 0;
    auto *creator = static_cast<IPluginCreatorV3One *>(creators(count)[0]);
    CHECK(count == 1);
    CHECK(std::string(creator->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
    CHECK(std::string(creator->getPluginNamespace()) + "::" + creator->getPluginName() == "cembed::MaxSim");
    CHECK(creator->getFieldNames()->nbFields == 0);
    IPluginV3 *plugin = creator->createPlugin("scores", creator->getFieldNames(), TensorRTPhase::kBUILD);
    auto *core = static_cast<IPluginV3OneCore *>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    auto *build = static_cast<IPluginV3OneBuild *>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto *run = static_cast<IPluginV3OneRuntime *>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    CHECK(std::string(core->getPluginName()) == creator->getPluginName());
    CHECK(std::string(core->getPluginVersion()) == creator->getPluginVersion());
    CHECK(build->getNbOutputs() == 1);
    DataType type = DataType::kHALF;
    CHECK(build->getOutputDataTypes(&type, 1, nullptr, 3) == 0 && type == DataType::kFLOAT);
    forms(*build, false);
    forms(*build, true);
    mistakes(*build, heard);
    CHECK(run->getFieldsToSerialize()->nbFields == 0);
    IPluginV3 *attached = run->attachToContext(nullptr);
    CHECK(attached != nullptr && attached != plugin);
    delete attached;
    delete plugin;
    std::puts("passed");
}
