// ONNX Runtime, by its C interface, from a library that is found at run time: one cembed serves its CPU and GPU builds.
#include "engine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>

#include <dlfcn.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <onnxruntime_c_api.h>

#include "../operators.h"
#include "error.h"
#include "manifest.h"

namespace cembed {
namespace {

constexpr int OLDEST[] = {1, 24};  // earlier ones follow a tensor to any file, and are not tested
constexpr uint32_t NEEDED_API = onnxruntime_abi::VERSION;  // all functions used here are in it
static_assert(ORT_API_VERSION >= NEEDED_API, "the headers of ONNX Runtime 1.17 or later are needed");

// What ../onnxruntime.h says, against the headers.
#define SAME_PLACE(name, member) \
    static_assert(offsetof(OrtApi, member) == onnxruntime_abi::name * sizeof(void *), #member " has another place")
SAME_PLACE(CREATE_STATUS, CreateStatus);
SAME_PLACE(CREATE_DOMAIN, CreateCustomOpDomain);
SAME_PLACE(ADD_TO_DOMAIN, CustomOpDomain_Add);
SAME_PLACE(ADD_DOMAIN, AddCustomOpDomain);
SAME_PLACE(TENSOR_DATA, GetTensorMutableData);
SAME_PLACE(NUM_DIMENSIONS, GetDimensionsCount);
SAME_PLACE(DIMENSIONS, GetDimensions);
SAME_PLACE(SHAPE, GetTensorTypeAndShape);
SAME_PLACE(CREATE_MEMORY_INFO, CreateCpuMemoryInfo);
SAME_PLACE(ALLOCATE, AllocatorAlloc);
SAME_PLACE(FREE, AllocatorFree);
SAME_PLACE(FLOAT_ATTRIBUTE, KernelInfoGetAttribute_float);
SAME_PLACE(INTEGER_ATTRIBUTE, KernelInfoGetAttribute_int64);
SAME_PLACE(INPUT, KernelContext_GetInput);
SAME_PLACE(OUTPUT, KernelContext_GetOutput);
SAME_PLACE(RELEASE_STATUS, ReleaseStatus);
SAME_PLACE(RELEASE_MEMORY_INFO, ReleaseMemoryInfo);
SAME_PLACE(RELEASE_SHAPE, ReleaseTensorTypeAndShapeInfo);
SAME_PLACE(RELEASE_ALLOCATOR, ReleaseAllocator);
SAME_PLACE(ALLOCATOR, KernelContext_GetAllocator);
SAME_PLACE(PARALLEL_FOR, KernelContext_ParallelFor);
static_assert(offsetof(OrtCustomOp, GetInputMemoryType) == offsetof(onnxruntime_abi::Operator, input_memory) &&
              offsetof(OrtCustomOp, CreateKernelV2) == offsetof(onnxruntime_abi::Operator, create) &&
              offsetof(OrtCustomOp, KernelComputeV2) == offsetof(onnxruntime_abi::Operator, compute));
static_assert(onnxruntime_abi::FLOAT == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
              onnxruntime_abi::UINT8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 &&
              onnxruntime_abi::INT8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 &&
              onnxruntime_abi::INT32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 && onnxruntime_abi::HOST == OrtMemTypeDefault &&
              onnxruntime_abi::REQUIRED == INPUT_OUTPUT_REQUIRED && onnxruntime_abi::OPTIONAL == INPUT_OUTPUT_OPTIONAL &&
              onnxruntime_abi::ARENA == OrtArenaAllocator);

constexpr const char *VARIABLE = "CEMBED_ONNXRUNTIME";
constexpr const char *CPU = "CPUExecutionProvider";
constexpr const char *CUDA = "CUDAExecutionProvider";

// A library of ONNX Runtime; stays open until the process ends.
struct Library {
    const OrtApiBase *base = nullptr;
    const OrtApi *api = nullptr;
    OrtEnv *env = nullptr;

    void check(OrtStatus *status, const std::string &what) const {
        if (status == nullptr) return;
        const std::string text = api->GetErrorMessage(status);
        api->ReleaseStatus(status);
        throw Error(ENGINE, what + ": " + text.substr(0, text.find('\n')));
    }
};

void *open_library(const std::vector<std::string> &names) {
    std::string reasons;
    for (const std::string &name : names) {
        if (void *handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        reasons += std::string(reasons.empty() ? "" : "; ") + dlerror();
    }
    throw Error(ENGINE,
                "ONNX Runtime is not found: install libonnxruntime, or name its library in the options or in $" +
                    std::string(VARIABLE) + " (" + reasons + ")");
}

std::vector<std::string> names_of(const std::string &given) {
    if (!given.empty()) return {given};
    if (const char *variable = std::getenv(VARIABLE); variable != nullptr && *variable) return {variable};
    return {"libonnxruntime.so.1", "libonnxruntime.so"};
}

void check_version(const std::string &version) {
    int major = 0, minor = 0;
    std::sscanf(version.c_str(), "%d.%d", &major, &minor);
    if (std::pair(major, minor) >= std::pair(OLDEST[0], OLDEST[1])) return;
    throw Error(ENGINE, "ONNX Runtime " + version + " is too old: " + std::to_string(OLDEST[0]) + "." +
                            std::to_string(OLDEST[1]) + " or later is needed");
}

Library start(const std::vector<std::string> &names) {
    void *handle = open_library(names);
    const auto base = reinterpret_cast<const OrtApiBase *(*)()>(dlsym(handle, "OrtGetApiBase"));
    if (base == nullptr) throw Error(ENGINE, names[0] + " is no library of ONNX Runtime");
    check_version(base()->GetVersionString());
    Library library;
    library.api = base()->GetApi(NEEDED_API);
    if (library.api == nullptr) throw Error(ENGINE, names[0] + " does not have the functions of ONNX Runtime 1.17");
    library.base = base();
    library.check(library.api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "cembed", &library.env), "ONNX Runtime cannot start");
    return library;
}

const Library &library_of(const std::string &given) {
    static std::mutex lock;
    static auto *libraries = new std::map<std::vector<std::string>, Library>;
    const std::lock_guard<std::mutex> guard(lock);
    const auto names = names_of(given);
    auto found = libraries->find(names);
    if (found == libraries->end()) found = libraries->emplace(names, start(names)).first;
    return found->second;
}

bool is_own(const std::string &provider) { return provider == ONNXRUNTIME_BF16 || provider == ONNXRUNTIME_EXACT; }
bool on_cpu(const EngineSettings &settings) { return settings.provider == CPU || is_own(settings.provider); }

template <class T>
using Owned = std::unique_ptr<T, void (*)(T *)>;

class OrtEngine : public Engine {
  public:
    OrtEngine(const std::string &path, const EngineSettings &settings)
        : library_(library_of(settings.library)),
          api_(*library_.api),
          session_(nullptr, api_.ReleaseSession),
          release_(nullptr, api_.ReleaseRunOptions),
          memory_(nullptr, api_.ReleaseMemoryInfo) {
        const auto options = make_options(settings);
        OrtSession *session = nullptr;
        load(api_.CreateSession(library_.env, path.c_str(), options.get(), &session), path);
        session_.reset(session);
#ifdef __GLIBC__
        malloc_trim(0);  // it keeps what the tensors of a graph leave when they are packed
#endif
        OrtMemoryInfo *memory = nullptr;
        check(api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "ONNX Runtime failed");
        memory_.reset(memory);
        OrtRunOptions *release = nullptr;
        check(api_.CreateRunOptions(&release), "ONNX Runtime failed");
        release_.reset(release);
        if (on_cpu(settings))
            check(api_.AddRunConfigEntry(release, "memory.enable_memory_arena_shrinkage", "cpu:0"),
                  "ONNX Runtime failed");
    }

    void run(const std::vector<Tensor> &inputs, const std::vector<Tensor> &outputs, Activations after) const override {
        const Values in(*this, inputs), out(*this, outputs);
        std::vector<OrtValue *> results = out.values;
        const OrtRunOptions *options = after == Activations::RELEASE ? release_.get() : nullptr;
        check(api_.Run(session_.get(), options, in.names.data(), in.values.data(), in.values.size(), out.names.data(),
                       results.size(), results.data()),
              "ONNX Runtime failed");
    }

  private:
    // Tensors as ONNX Runtime takes them.
    struct Values {
        Values(const OrtEngine &engine, const std::vector<Tensor> &tensors) {
            for (const Tensor &tensor : tensors) {
                owned.push_back(engine.wrap(tensor));
                names.push_back(tensor.name.c_str());
                values.push_back(owned.back().get());
            }
        }

        std::vector<Owned<OrtValue>> owned;
        std::vector<const char *> names;
        std::vector<OrtValue *> values;
    };

    Owned<OrtValue> wrap(const Tensor &tensor) const {
        static const std::map<Type, ONNXTensorElementDataType> types = {
            {Type::FLOAT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
            {Type::FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
            {Type::INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};
        OrtValue *value = nullptr;
        check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), tensor.data, size_t(tensor.bytes()), tensor.shape.data(),
                                                  tensor.shape.size(), types.at(tensor.type), &value),
              "ONNX Runtime failed");
        return {value, api_.ReleaseValue};
    }

    Owned<OrtSessionOptions> make_options(const EngineSettings &settings) const {
        OrtSessionOptions *made = nullptr;
        check(api_.CreateSessionOptions(&made), "ONNX Runtime failed");
        Owned<OrtSessionOptions> options(made, api_.ReleaseSessionOptions);
        const char *mapped = settings.mapped_weights ? "1" : "0";
        check(api_.SetIntraOpNumThreads(made, settings.threads), "ONNX Runtime failed");
        check(api_.SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), "ONNX Runtime failed");
        check(api_.AddSessionConfigEntry(made, "session.disable_prepacking", mapped), "ONNX Runtime failed");
        if (on_cpu(settings))
            check(api_.DisableMemPattern(made), "ONNX Runtime failed");  // else each shape leaves a plan for ever
        if (is_own(settings.provider))
            check(static_cast<OrtStatus *>(RegisterCustomOps(
                      made, reinterpret_cast<const onnxruntime_abi::Base *>(library_.base))),
                  "ONNX Runtime failed");
        else if (settings.provider != CPU)
            add_provider(made, settings.provider);
        return options;
    }

    void add_provider(OrtSessionOptions *options, const std::string &provider) const {
        const std::string what = provider + " could not be started";
        if (provider != CUDA) {
            const std::string name = provider.substr(0, provider.rfind("ExecutionProvider"));
            return check(api_.SessionOptionsAppendExecutionProvider(options, name.c_str(), nullptr, nullptr, 0), what);
        }
        OrtCUDAProviderOptionsV2 *made = nullptr;
        check(api_.CreateCUDAProviderOptions(&made), what);
        const Owned<OrtCUDAProviderOptionsV2> cuda(made, api_.ReleaseCUDAProviderOptions);
        check(api_.SessionOptionsAppendExecutionProvider_CUDA_V2(options, made), what);
    }

    void check(OrtStatus *status, const std::string &what) const { library_.check(status, what); }

    void load(OrtStatus *status, const std::string &path) const {
        try {
            check(status, "ONNX Runtime cannot load " + path);
        } catch (const Error &error) {
            const std::string text = error.what();
            if (text.find("is not a registered function/op") == std::string::npos) throw;
            throw Error(ENGINE, text + "; the bundle has an operator of a later version: upgrade it, or export with "
                                       "--target onnx");
        }
    }

    const Library &library_;
    const OrtApi &api_;
    Owned<OrtSession> session_;
    Owned<OrtRunOptions> release_;
    Owned<OrtMemoryInfo> memory_;
};

}  // namespace

int64_t size_of(Type type) { return type == Type::INT64 ? 8 : type == Type::FLOAT32 ? 4 : 2; }

Tensor::Tensor(std::string name, std::vector<int64_t> shape, const std::vector<float> &values)
    : Tensor(std::move(name), Type::FLOAT32, std::move(shape), const_cast<float *>(values.data())) {}

Tensor::Tensor(std::string name, std::vector<int64_t> shape, const std::vector<int64_t> &values)
    : Tensor(std::move(name), Type::INT64, std::move(shape), const_cast<int64_t *>(values.data())) {}

Tensor::Tensor(std::string name, Type type, std::vector<int64_t> shape, void *data)
    : name(std::move(name)),
      type(type),
      shape(std::move(shape)),
      data(data) {}

int64_t Tensor::bytes() const {
    return std::accumulate(shape.begin(), shape.end(), size_of(type), std::multiplies<>());
}

std::shared_ptr<void> Engine::allocate(int64_t bytes) const {
    void *memory = std::calloc(size_t(bytes), 1);
    if (memory == nullptr) throw std::bad_alloc();
    return {memory, std::free};
}

std::unique_ptr<Engine> load_onnxruntime(const std::string &path, const EngineSettings &settings) {
    return std::make_unique<OrtEngine>(path, settings);
}

EngineSettings settings_for(const std::string &graph, const EngineSettings &settings, const Manifest &manifest) {
    EngineSettings chosen = settings;
    if (settings.provider == ONNXRUNTIME_EXACT && !(multiplies_bytes() && manifest.by_row.count(graph)))
        chosen.provider = CPU;  // it may even be without the operators' domain, and then fails to load
    return chosen;
}

void check_bfloat16(const Manifest &manifest) {
    const std::string name = ONNXRUNTIME_BF16;
    if (manifest.target != "onnxruntime" || manifest.opset < 24)
        throw Error(ENGINE, name + " runs bundles of --target onnxruntime; this one's attention is in basic operators");
    if (manifest.dtype == "fp16")
        throw Error(ENGINE, name + " is for bundles that compute in float32; this one does in fp16");
    if (!multiplies_bfloat16())
        throw Error(ENGINE, "this processor has no bfloat16 arithmetic (AVX-512 BF16), which " + name + " multiplies in");
}

void check_provider(const EngineSettings &settings, const Manifest &manifest) {
    const Library &library = library_of(settings.library);
    if (settings.provider == ONNXRUNTIME_BF16) return check_bfloat16(manifest);
    if (settings.provider == ONNXRUNTIME_EXACT) {
        if (multiplies_bytes() || adds_bytes_exactly()) return;
        throw Error(ENGINE, settings.provider + " has nothing for this processor");
    }
    char **names = nullptr;
    int count = 0;
    library.check(library.api->GetAvailableProviders(&names, &count), "ONNX Runtime failed");
    std::string all;
    bool found = false;
    for (int i = 0; i < count; ++i) {
        all += std::string(i ? ", " : "") + names[i];
        found = found || settings.provider == names[i];
    }
    library.check(library.api->ReleaseAvailableProviders(names, count), "ONNX Runtime failed");
    if (!found)
        throw Error(ENGINE, "execution provider " + settings.provider +
                                " is not in this build of ONNX Runtime, which has " + all);
}

}  // namespace cembed
