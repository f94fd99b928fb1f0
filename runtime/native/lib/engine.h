// Engines: a loaded graph behind the interface that every engine has.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace cembed {

enum class Type { FLOAT32, FLOAT16, INT64 };

int64_t size_of(Type type);

// An input or output in the caller's memory, row-major.
struct Tensor {
    std::string name;
    Type type;
    std::vector<int64_t> shape;
    void *data;
    bool resident = false;  // data is of Engine::allocate

    Tensor(std::string name, std::vector<int64_t> shape, const std::vector<float> &values);
    Tensor(std::string name, std::vector<int64_t> shape, const std::vector<int64_t> &values);
    Tensor(std::string name, Type type, std::vector<int64_t> shape, void *data);

    int64_t bytes() const;
};

enum class Activations { KEEP, RELEASE };

class Engine {
  public:
    virtual ~Engine() = default;

    // Runs the graph; outputs have their shape and place before. An input and an output may be the same memory, which
    // is then updated in place. Safe to call from several threads. Throws Error(ENGINE).
    virtual void run(const std::vector<Tensor> &inputs, const std::vector<Tensor> &outputs,
                     Activations after) const = 0;

    // Zeros, where the engine keeps what lives longer than a run: memory of the host unless it says otherwise.
    virtual std::shared_ptr<void> allocate(int64_t bytes) const;
};

// Loads a graph by its name.
using Engines = std::function<std::unique_ptr<Engine>(const std::string &graph)>;

constexpr const char *TENSORRT = "tensorrt";
constexpr const char *ONNXRUNTIME_BF16 = "onnxruntime-bf16";  // on the CPU, with attention in bfloat16
constexpr const char *ONNXRUNTIME_EXACT = "onnxruntime-exact";  // on the CPU, with sums of bytes that are exact everywhere

struct Manifest;

struct EngineSettings {
    std::string provider = "CPUExecutionProvider";  // of ONNX Runtime, or one of those above
    std::string library;  // of ONNX Runtime; empty: $CEMBED_ONNXRUNTIME, then the default names
    int threads = 0;      // of an operator; 0: one for each core
    bool mapped_weights = false;
};

// Throws Error(ENGINE): no library, a provider that it does not have, a graph that it cannot load.
std::unique_ptr<Engine> load_onnxruntime(const std::string &path, const EngineSettings &settings);

// Those of one graph, which may have no use for what the provider adds.
EngineSettings settings_for(const std::string &graph, const EngineSettings &settings, const Manifest &manifest);

// Throws Error(ENGINE): no library, a provider that it does not have, or that cannot run this bundle here.
void check_provider(const EngineSettings &settings, const Manifest &manifest);

}  // namespace cembed
