// A CUDA runtime and a TensorRT without a GPU: what is put into the stream happens when the stream is waited for. A plan
// is JSON that names an ONNX file, its tensors and profiles; ONNX Runtime computes. Rules that are broken end the process.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "../../runtime/native/lib/engine.h"

using namespace nvinfer1;
using Json = nlohmann::json;
using Work = std::function<void()>;
using Blocks = std::map<const char *, size_t>;

static int the_stream;
static Blocks device, pinned;
static std::vector<Work> queue, captured;
static bool capturing = false;
static std::map<std::string, int64_t> counts;

#define RULE(kept)                                                \
    if (!(kept)) {                                                \
        std::fprintf(stderr, "a rule was broken: %s\n", #kept);   \
        std::abort();                                             \
    }

// Bytes from an address to the end of its block; 0 outside of all.
static size_t room(const Blocks &blocks, const void *address) {
    const auto *place = static_cast<const char *>(address);
    auto block = blocks.upper_bound(place);
    if (block == blocks.begin()) return 0;
    --block;
    return place < block->first + block->second ? size_t(block->first + block->second - place) : 0;
}

static cudaError_t enqueue(cudaStream_t stream, const char *name, Work work) {
    RULE(stream == &the_stream);
    ++counts[(capturing ? "captured " : "") + std::string(name)];
    (capturing ? captured : queue).push_back(std::move(work));
    return 0;
}

static cudaError_t allocate(Blocks &blocks, void **memory, size_t size) {
    RULE(!capturing && size > 0);
    *memory = std::malloc(size);
    std::memset(*memory, 0xff, size);  // NaN, in every type of float
    blocks[static_cast<char *>(*memory)] = size;
    return 0;
}

static cudaError_t release(Blocks &blocks, void *memory) {
    RULE(blocks.erase(static_cast<char *>(memory)) == 1);
    std::free(memory);
    return 0;
}

extern "C" int64_t fake_count(const char *what) { return what == std::string("blocks") ? int64_t(device.size()) : counts[what]; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    *properties = {"Fake GPU", 8, 7};
    return 0;
}
const char *cudaGetErrorString(cudaError_t) { return "a fake error"; }
cudaError_t cudaMalloc(void **memory, size_t size) { return allocate(device, memory, size); }
cudaError_t cudaMallocHost(void **memory, size_t size) { return allocate(pinned, memory, size); }
cudaError_t cudaFree(void *memory) { return release(device, memory); }
cudaError_t cudaFreeHost(void *memory) { return release(pinned, memory); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind way, cudaStream_t stream) {
    RULE(room(way == cudaMemcpyDeviceToHost ? pinned : device, to) >= size);
    RULE(room(way == cudaMemcpyHostToDevice ? pinned : device, from) >= size);
    return enqueue(stream, "copy", [=] { std::memcpy(to, from, size); });
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    RULE(room(device, to) >= size);
    return enqueue(stream, "clear", [=] { std::memset(to, value, size); });
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = &the_stream, 0; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    RULE(!capturing);
    for (const Work &work : std::exchange(queue, {})) work();
    return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return capturing = true, 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    capturing = false;
    *graph = new std::vector<Work>(std::exchange(captured, {}));
    return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long) {
    *made = new std::vector<Work>(*graph);
    return 0;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    ++counts["launch"];
    queue.insert(queue.end(), graph->begin(), graph->end());
    return 0;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, 0; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, 0; }

namespace {

struct Engine : ICudaEngine {
    explicit Engine(const std::string &plan)
        : plan(Json::parse(plan)), model(cembed::load_onnxruntime(this->plan.at("model"), {})) {
        for (const char *kind : {"inputs", "outputs"}) {
            for (const Json &tensor : this->plan.at(kind)) tensors[tensor.at("name")] = tensor;
        }
    }

    int64_t getDeviceMemorySizeV2() const override { return 4096; }
    int32_t getNbOptimizationProfiles() const override { return int32_t(plan.at("profiles").size()); }
    TensorLocation getTensorLocation(const char *name) const override {
        return name == std::string("prompt_length") ? TensorLocation::kHOST : TensorLocation::kDEVICE;
    }
    Dims getProfileShape(const char *name, int32_t profile, OptProfileSelector which) const override {
        RULE(getTensorLocation(name) == TensorLocation::kDEVICE);  // that profile has values, not shapes
        const Json &axes = plan.at("profiles").at(size_t(profile));
        Dims dims{};
        for (const Json &axis : tensors.at(name).at("shape"))
            dims.d[dims.nbDims++] = axis.is_string() ? axes.at(std::string(axis)).at(size_t(which)).get<int64_t>() : axis.get<int64_t>();
        return dims;
    }
    const char *getAliasedInputTensor(const char *name) const override {
        return plan.at("aliased") && std::strncmp(name, "present.", 8) == 0 ? "its past" : nullptr;
    }
    IExecutionContext *createExecutionContext(ExecutionContextAllocationStrategy strategy) override;

    Json plan;
    std::unique_ptr<cembed::Engine> model;
    std::map<std::string, Json> tensors;
};

struct Context : IExecutionContext {
    explicit Context(const Engine &engine) : engine(engine) {}

    void setDeviceMemoryV2(void *memory, int64_t size) override {
        RULE(room(device, memory) >= size_t(size) && size >= engine.getDeviceMemorySizeV2());
        scratch = memory;
    }
    bool setOptimizationProfileAsync(int32_t index, cudaStream_t stream) override {
        profile = index;
        return enqueue(stream, "profile", [] {}) == 0;
    }
    bool setInputShape(const char *name, const Dims &shape) override {
        RULE(profile >= 0);
        const Dims least = engine.getProfileShape(name, profile, OptProfileSelector::kMIN);
        const Dims most = engine.getProfileShape(name, profile, OptProfileSelector::kMAX);
        for (int32_t i = 0; i < shape.nbDims; ++i) RULE(least.d[i] <= shape.d[i] && shape.d[i] <= most.d[i]);
        const Json &axes = engine.tensors.at(name).at("shape");
        for (int32_t i = 0; i < shape.nbDims; ++i) {
            if (axes.at(size_t(i)).is_string()) sizes[axes.at(size_t(i))] = shape.d[i];
        }
        shapes[name] = shape;
        return true;
    }
    bool setTensorAddress(const char *name, void *address) override {
        RULE(room(engine.getTensorLocation(name) == TensorLocation::kHOST ? pinned : device, address) > 0);
        addresses[name] = address;
        return true;
    }
    int32_t inferShapes(int32_t, const char **) override {
        int32_t missing = 0;
        for (const Json &tensor : engine.plan.at("inputs")) {
            const std::string name = tensor.at("name");
            missing += name == "prompt_length" ? !addresses.count(name) : !shapes.count(name);
        }
        sizes["num_visual_tokens"] = shapes["pixel_values"].d[1] / engine.plan.at("group").get<int64_t>();
        inferred = missing == 0;
        return missing;
    }
    Dims getTensorShape(const char *name) const override {
        RULE(inferred);
        Dims dims{};
        for (const Json &axis : engine.tensors.at(name).at("shape"))
            dims.d[dims.nbDims++] = axis.is_string() ? sizes.at(axis) : axis.get<int64_t>();
        return dims;
    }
    bool enqueueV3(cudaStream_t stream) override {
        RULE(room(device, scratch) && addresses.size() == engine.tensors.size());
        std::vector<cembed::Tensor> inputs, outputs;
        for (const auto &[name, tensor] : engine.tensors) {
            const bool present = name.compare(0, 8, "present.") == 0;
            if (present) {
                const bool same = addresses[name] == addresses["past_key_values." + name.substr(8)];
                RULE(same == (engine.getAliasedInputTensor(name.c_str()) != nullptr));
            }
            const bool output = present || tensor.at("output");
            (output ? outputs : inputs).push_back(view(name));
        }
        const auto baked = std::make_shared<int64_t>();  // an input of the host counts as it is now
        for (cembed::Tensor &input : inputs) {
            if (input.name != "prompt_length") continue;
            *baked = *static_cast<int64_t *>(input.data);
            input.data = baked.get();
        }
        return enqueue(stream, "engine", [this, inputs, outputs, baked] {
                   engine.model->run(inputs, outputs, cembed::Activations::KEEP);
               }) == 0;
    }
    cembed::Tensor view(const std::string &name) {
        const std::string type = engine.tensors.at(name).at("dtype");
        const Dims dims = getTensorShape(name.c_str());
        const cembed::Tensor tensor(name, type == "int64" ? cembed::Type::INT64 : cembed::Type::FLOAT32,
                                    {dims.d, dims.d + dims.nbDims}, addresses.at(name));
        const bool on_host = engine.getTensorLocation(name.c_str()) == TensorLocation::kHOST;
        RULE(room(on_host ? pinned : device, tensor.data) >= size_t(tensor.bytes()));
        return tensor;
    }

    const Engine &engine;
    int32_t profile = -1;
    bool inferred = false;
    void *scratch = nullptr;
    std::map<std::string, Dims> shapes;
    std::map<std::string, int64_t> sizes;
    std::map<std::string, void *> addresses;
};

IExecutionContext *Engine::createExecutionContext(ExecutionContextAllocationStrategy strategy) {
    RULE(strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED);
    return new Context(*this);
}

struct Runtime : IRuntime {
    explicit Runtime(ILogger &logger) : logger(logger) {}
    ICudaEngine *deserializeCudaEngine(const void *plan, size_t size) override try {
        return new Engine(std::string(static_cast<const char *>(plan), size));
    } catch (const std::exception &) {
        logger.log(ILogger::Severity::kERROR, "this is no plan");
        return nullptr;
    }
    ILogger &logger;
};

}  // namespace

extern "C" int32_t getInferLibVersion() {
    const char *version = std::getenv("FAKE_TENSORRT");
    return version == nullptr ? NV_TENSORRT_VERSION : std::atoi(version);
}
extern "C" void *createInferRuntime_INTERNAL(void *logger, int32_t version) {
    RULE(version == NV_TENSORRT_VERSION);
    return new Runtime(*static_cast<ILogger *>(logger));
}
