#include "tensorrt.h"

#include "error.h"

#ifndef CEMBED_TENSORRT

namespace cembed {

Engines tensorrt_engines(Bundle &) {
    throw Error(ENGINE, "this libcembed was built without TensorRT: build it with -DTENSORRT_ROOT=DIR");
}

}  // namespace cembed

#else

#include <cctype>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include <dlfcn.h>

#include <nlohmann/json.hpp>

#include "shared_tables.h"
#include "trt_engine.h"

namespace cembed {
namespace {

using shared::ATTENTION_SINCE;  // with it came the operators of opset 23 and later
constexpr int64_t MAX_DESCRIPTION = 1 << 20;

[[noreturn]] void failed(const std::string &what) { throw Error(ENGINE, what); }

std::string text_of(int32_t version) {
    const int32_t major = version / 10000, minor = version / 100 % 100, patch = version % 100;
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

void check_target(const Manifest &manifest) {
    if (manifest.target != "tensorrt")
        failed("this bundle is for " + manifest.target + ": export it with --target tensorrt");
    if (manifest.opset >= 23 && NV_TENSORRT_VERSION < ATTENTION_SINCE)
        failed("opset " + std::to_string(manifest.opset) + " needs TensorRT " + text_of(ATTENTION_SINCE) +
               ": export the bundle with --opset 20");
}

struct EngineFiles {
    EngineFiles(const Bundle &bundle, std::string tag) : bundle(bundle), tag(std::move(tag)) {
        char whole[PATH_MAX];
        if (realpath(bundle.root().c_str(), whole) == nullptr) failed("cannot find " + bundle.root());
        folder = std::string(whole) + ".engines";
    }

    std::string path(const std::string &graph) const {
        return folder + "/" + graph + "-" + bundle.hash().substr(0, 16) + "-" + tag + ".";
    }

    std::string advice(const std::string &graph) const {
        return "run `cembed build-engine " + bundle.root() + (graph == "text_step" ? " --loop" : "") + "` on this device";
    }

    // The sha256 of an engine. Throws Error(ENGINE): there is none for this bundle, TensorRT and GPU.
    std::string require(const std::string &graph) const {
        try {
            const File engine(path(graph) + "engine", ENGINE);
            return nlohmann::json::parse(File(path(graph) + "json", ENGINE).read(MAX_DESCRIPTION)).at("sha256");
        } catch (const std::exception &) {
            failed("there is no engine of " + graph + " for " + tag + ": " + advice(graph));
        }
    }

    Mapping read(const std::string &graph) const {
        const std::string expected = require(graph);
        const File file(path(graph) + "engine", ENGINE);
        if (sha256(file) != expected) failed(path(graph) + "engine is damaged: " + advice(graph));
        return Mapping(file, file.size());
    }

    const Bundle &bundle;
    std::string tag, folder;
};

}  // namespace

void check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) failed(std::string("CUDA cannot ") + what + ": " + cudaGetErrorString(status));
}

void TrtLogger::log(Severity severity, const char *text) noexcept {
    const std::lock_guard<std::mutex> guard(lock);
    if (severity <= Severity::kERROR) std::snprintf(last, sizeof last, ": %s", text);
}

Device::Device() {
    const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) failed(std::string("TensorRT is not found: ") + dlerror());
    const auto version_of = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    const auto create = reinterpret_cast<void *(*)(void *, int32_t)>(dlsym(library, "createInferRuntime_INTERNAL"));
    if (version_of == nullptr || create == nullptr) failed(name + " is no library of TensorRT");
    const int32_t version = version_of();
    if (version / 100 != NV_TENSORRT_VERSION / 100)  // what its classes have depends on it
        failed("this libcembed was built for TensorRT " + text_of(NV_TENSORRT_VERSION) + ", here is " +
               text_of(version) + ": build it with the headers of that one");
    runtime.reset(static_cast<nvinfer1::IRuntime *>(create(&logger, NV_TENSORRT_VERSION)));
    if (!runtime) failed(std::string("TensorRT cannot start") + logger.last);
    cudaDeviceProp gpu{};
    check(cudaGetDeviceProperties(&gpu, 0), "find a GPU");
    check(cudaStreamCreate(&stream), "make a stream");
    tag = "tensorrt-" + text_of(version) + "-";
    for (const char *c = gpu.name; *c; ++c) {
        const bool kept = std::isalnum(static_cast<unsigned char>(*c)) || *c == '.';
        if (kept || tag.back() != '-') tag += kept ? *c : '-';
    }
    tag += "-sm" + std::to_string(gpu.major) + std::to_string(gpu.minor);
}

Device::~Device() {
    caches.clear();
    if (stream != nullptr) cudaStreamDestroy(stream);
}

Engines tensorrt_engines(Bundle &bundle) {
    const Manifest &manifest = bundle.manifest;
    check_target(manifest);
    const auto device = std::make_shared<Device>();
    const EngineFiles files(bundle, device->tag);
    const bool fed_back = manifest.document.slots == Slots::FEEDBACK || manifest.query.slots == Slots::FEEDBACK;
    for (const auto &[name, graph] : manifest.graphs) {
        if (name != "text_step" || fed_back) files.require(name);
    }
    return [&bundle, device, files](const std::string &name) {
        const bool padded = bundle.manifest.causal && name == "text";
        return load_tensorrt(device, files.read(name), bundle.graph(name), name, padded);
    };
}

}  // namespace cembed

#endif
