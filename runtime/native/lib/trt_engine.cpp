// Inputs of the same shapes share a ShapeContext: an execution context with its buffers. Its first run goes into the
// stream call by call, its second is captured as a CUDA graph, later ones are one launch. Caches stay on the device.
#ifdef CEMBED_TENSORRT

#include "trt_engine.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <list>
#include <numeric>
#include <utility>

#include "error.h"
#include "shared_tables.h"

namespace cembed {
namespace {

namespace trt = nvinfer1;

// Those of an engine and of its caches together: the one that was used longest ago goes first.
constexpr size_t MAX_CONTEXTS = 2 * size_t(shared::MAX_CONTEXTS);

Memory allocated(int64_t bytes, bool device) {
    const auto size = size_t(std::max<int64_t>(bytes, 1));
    void *memory = nullptr;
    check(device ? cudaMalloc(&memory, size) : cudaMallocHost(&memory, size), "allocate memory");
    return {memory, device ? cudaFree : cudaFreeHost};
}

std::string text_of(const trt::Dims &dims) {
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "(") + std::to_string(dims.d[i]);
    return text + ")";
}

int64_t bytes_of(Type type, const trt::Dims &dims) {
    return std::accumulate(dims.d, dims.d + dims.nbDims, size_of(type), std::multiplies<>());
}

// Items of `from` [size] to where they are in [room], which has as many axes.
const char *spread(const char *from, const int64_t *size, const int64_t *room, int32_t axes, int64_t item, char *to) {
    if (axes == 1) {
        std::memcpy(to, from, size_t(size[0] * item));
        return from + size[0] * item;
    }
    const int64_t step = std::accumulate(room + 1, room + axes, item, std::multiplies<>());
    for (int64_t i = 0; i < size[0]; ++i) from = spread(from, size + 1, room + 1, axes - 1, item, to + i * step);
    return from;
}

// Whose input an output updates in place; none where TensorRT is too old to say so.
template <class T>
auto aliased(const T &engine, const char *name, int) -> decltype(engine.getAliasedInputTensor(name)) {
    return engine.getAliasedInputTensor(name);
}
template <class T>
const char *aliased(const T &, const char *, long) {
    return nullptr;
}

// An input as an engine gets it.
struct Feed {
    const Tensor &tensor;
    trt::Dims room;  // the shape, filled up
    bool on_host;    // the engine reads it there, and shapes depend on it
    int64_t bytes;
};

// Where an input or output is, with a copy on the host; of a present that is not updated in place the past, no copy.
struct Port {
    Memory host, device;
    int64_t bytes;
    void *past = nullptr;
};

struct ShapeContext {
    explicit ShapeContext(std::string key) : key(std::move(key)) {}
    ~ShapeContext() {
        if (graph != nullptr) cudaGraphExecDestroy(graph);
    }

    const std::string key;
    std::unique_ptr<trt::IExecutionContext> context;
    std::vector<Port> inputs, outputs, presents;
    cudaGraphExec_t graph = nullptr;
    bool ran = false;
};

class TrtEngine : public Engine {
  public:
    TrtEngine(std::shared_ptr<Device> device, const Mapping &plan, const Graph &graph, std::string name, bool padded)
        : device_(std::move(device)),
          graph_(graph),
          name_(std::move(name)),
          padded_(padded),
          engine_(device_->runtime->deserializeCudaEngine(plan.data(), size_t(plan.size()))),
          scratch_(nullptr, cudaFree) {
        done(engine_ != nullptr, "load the engine");
        scratch_ = allocated(engine_->getDeviceMemorySizeV2(), true);
    }

    void run(const std::vector<Tensor> &inputs, const std::vector<Tensor> &outputs, Activations) const override {
        const std::lock_guard<std::mutex> guard(device_->lock);
        const std::vector<Feed> feeds = feeds_of(inputs);
        ShapeContext &bound = context_for(feeds, outputs);
        auto port = bound.inputs.begin();
        for (const Feed &feed : feeds) {
            if (!feed.tensor.resident) put(feed, (port++)->host.get());
        }
        if (bound.graph == nullptr && bound.ran) capture(bound);
        bound.graph == nullptr ? record(bound) : check(cudaGraphLaunch(bound.graph, device_->stream), "run a graph");
        check(cudaStreamSynchronize(device_->stream), "run the engine");
        bound.ran = true;
        port = bound.outputs.begin();
        for (const Tensor &output : outputs) {  // of one that was filled up the first rows
            if (output.resident) continue;
            done(output.bytes() <= port->bytes, "give all of " + output.name);
            std::memcpy(output.data, (port++)->host.get(), size_t(output.bytes()));
        }
    }

    std::shared_ptr<void> allocate(int64_t bytes) const override {
        std::unique_lock<std::mutex> guard(device_->lock);
        std::vector<Memory> &unused = device_->caches[bytes];
        if (unused.empty()) unused.push_back(allocated(bytes, true));
        check(cudaMemsetAsync(unused.back().get(), 0, size_t(bytes), device_->stream), "clear a cache");
        const auto give_back = [device = device_, bytes](void *memory) {
            const std::lock_guard<std::mutex> again(device->lock);
            device->caches[bytes].emplace_back(memory, cudaFree);
        };
        void *memory = unused.back().release();
        unused.pop_back();
        guard.unlock();  // where this fails, the memory is given back
        return {memory, give_back};
    }

  private:
    void done(bool success, const std::string &what) const {
        if (!success) throw Error(ENGINE, "TensorRT cannot " + what + " of " + name_ + device_->logger.last);
    }

    trt::Dims limit(const std::string &name, int32_t profile, trt::OptProfileSelector which) const {
        return engine_->getProfileShape(name.c_str(), profile, which);
    }

    std::vector<Feed> feeds_of(const std::vector<Tensor> &inputs) const {
        std::vector<Feed> feeds;
        for (const Tensor &input : inputs) {
            trt::Dims room{int32_t(input.shape.size()), {}};
            std::copy(input.shape.begin(), input.shape.end(), room.d);
            if (padded_) fill_up(input.name, room);
            const bool on_host = engine_->getTensorLocation(input.name.c_str()) == trt::TensorLocation::kHOST;
            feeds.push_back({input, room, on_host, bytes_of(input.type, room)});
        }
        return feeds;
    }

    // To the next bucket that the engine still takes.
    void fill_up(const std::string &name, trt::Dims &shape) const {
        const auto axes = std::find_if(graph_.inputs.begin(), graph_.inputs.end(), [&](const TensorSpec &tensor) {
                              return tensor.name == name;
                          })->axes;
        for (size_t i = 0; i < axes.size(); ++i) {
            const auto named = [&](const shared::Bucket &known) { return known.axis == axes[i]; };
            const auto *bucket = std::find_if(std::begin(shared::BUCKETS), std::end(shared::BUCKETS), named);
            if (bucket == std::end(shared::BUCKETS)) continue;
            int64_t most = 0;
            for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile)
                most = std::max<int64_t>(most, limit(name, profile, trt::OptProfileSelector::kMAX).d[i]);
            const int64_t up = (shape.d[i] + bucket->step - 1) / bucket->step * bucket->step;
            shape.d[i] = std::max<int64_t>(shape.d[i], std::min(up, most));
        }
    }

    static void put(const Feed &feed, void *to) {
        const Tensor &tensor = feed.tensor;
        if (feed.bytes != tensor.bytes()) std::memset(to, 0, size_t(feed.bytes));
        spread(static_cast<const char *>(tensor.data), tensor.shape.data(), feed.room.d, feed.room.nbDims,
               size_of(tensor.type), static_cast<char *>(to));
    }

    // The context for these shapes, for the values of inputs that shapes depend on, and for a cache.
    ShapeContext &context_for(const std::vector<Feed> &feeds, const std::vector<Tensor> &outputs) const {
        std::string key;
        for (const Feed &feed : feeds) {
            key += text_of(feed.room);
            if (feed.tensor.resident) key += std::to_string(reinterpret_cast<uintptr_t>(feed.tensor.data));
            if (feed.on_host) key.append(static_cast<const char *>(feed.tensor.data), size_t(feed.bytes));
        }
        const auto same = [&](const ShapeContext &bound) { return bound.key == key; };
        const auto found = std::find_if(contexts_.begin(), contexts_.end(), same);
        if (found != contexts_.end()) {
            contexts_.splice(contexts_.begin(), contexts_, found);
        } else {
            std::list<ShapeContext> made;
            bind(made.emplace_front(key), feeds, outputs);
            contexts_.splice(contexts_.begin(), made);
            if (contexts_.size() > MAX_CONTEXTS) contexts_.pop_back();
        }
        return contexts_.front();
    }

    // Gives a ShapeContext its context, and every input and output a place.
    void bind(ShapeContext &bound, const std::vector<Feed> &feeds, const std::vector<Tensor> &outputs) const {
        const int32_t profile = profile_for(feeds);
        bound.context.reset(engine_->createExecutionContext(trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        done(bound.context != nullptr, "make a context");
        bound.context->setDeviceMemoryV2(scratch_.get(), engine_->getDeviceMemorySizeV2());
        done(bound.context->setOptimizationProfileAsync(profile, device_->stream), "take the profile");
        check(cudaStreamSynchronize(device_->stream), "take the profile");
        for (const Feed &feed : feeds) {
            const std::string &name = feed.tensor.name;
            if (!feed.on_host) done(bound.context->setInputShape(name.c_str(), feed.room), "take the shape of " + name);
            void *place = feed.tensor.data;
            if (!feed.tensor.resident) {
                bound.inputs.push_back(port(feed.bytes, !feed.on_host));
                place = feed.on_host ? bound.inputs.back().host.get() : bound.inputs.back().device.get();
                put(feed, bound.inputs.back().host.get());
            }
            set(bound, name, place);
        }
        const char *missing = nullptr;
        done(bound.context->inferShapes(1, &missing) == 0, "infer the shapes");
        for (const Tensor &output : outputs) {
            const char *name = output.name.c_str();
            const int64_t bytes = bytes_of(output.type, bound.context->getTensorShape(name));
            const bool in_place = output.resident && aliased(*engine_, name, 0) != nullptr;
            auto &ports = output.resident ? bound.presents : bound.outputs;
            if (!in_place) ports.push_back(port(bytes, true, output.resident ? output.data : nullptr));
            set(bound, output.name, in_place ? output.data : ports.back().device.get());
        }
    }

    static Port port(int64_t bytes, bool device, void *past = nullptr) {
        return {past == nullptr ? allocated(bytes, false) : Memory(nullptr, cudaFreeHost),
                device ? allocated(bytes, true) : Memory(nullptr, cudaFree), bytes, past};
    }

    void set(const ShapeContext &bound, const std::string &name, void *address) const {
        done(bound.context->setTensorAddress(name.c_str(), address), "take the address of " + name);
    }

    // The first profile that takes the shapes.
    int32_t profile_for(const std::vector<Feed> &feeds) const {
        const int32_t count = engine_->getNbOptimizationProfiles();
        const Feed *worst = nullptr;
        for (int32_t profile = 0; profile < count; ++profile) {
            const auto wrong = std::find_if(feeds.begin(), feeds.end(),
                                            [&](const Feed &feed) { return !feed.on_host && !takes(feed, profile); });
            if (wrong == feeds.end()) return profile;
            worst = &*wrong;
        }
        const std::string &name = worst->tensor.name;
        throw Error(ENGINE, "the engine of " + name_ + " takes " + name + " from " +
                                text_of(limit(name, count - 1, trt::OptProfileSelector::kMIN)) + " to " +
                                text_of(limit(name, count - 1, trt::OptProfileSelector::kMAX)) + ", not " +
                                text_of(worst->room) + ": build it with larger limits");
    }

    bool takes(const Feed &feed, int32_t profile) const {
        const trt::Dims least = limit(feed.tensor.name, profile, trt::OptProfileSelector::kMIN);
        const trt::Dims most = limit(feed.tensor.name, profile, trt::OptProfileSelector::kMAX);
        bool fits = least.nbDims == feed.room.nbDims;
        for (int32_t i = 0; fits && i < least.nbDims; ++i)
            fits = least.d[i] <= feed.room.d[i] && feed.room.d[i] <= most.d[i];
        return fits;
    }

    // Puts a run into the stream: inputs up, the engine, outputs down.
    void record(const ShapeContext &bound) const {
        const auto copy = [&](void *to, const void *from, const Port &port, cudaMemcpyKind way) {
            check(cudaMemcpyAsync(to, from, size_t(port.bytes), way, device_->stream), "copy");
        };
        for (const Port &in : bound.inputs) {
            if (in.device) copy(in.device.get(), in.host.get(), in, cudaMemcpyHostToDevice);
        }
        done(bound.context->enqueueV3(device_->stream), "run the engine");
        for (const Port &present : bound.presents)
            copy(present.past, present.device.get(), present, cudaMemcpyDeviceToDevice);
        for (const Port &out : bound.outputs) copy(out.host.get(), out.device.get(), out, cudaMemcpyDeviceToHost);
    }

    // The graph of a run, which is not executed yet.
    void capture(ShapeContext &bound) const {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(device_->stream, cudaStreamCaptureModeRelaxed), "capture a graph");
        try {
            record(bound);
        } catch (...) {
            cudaStreamEndCapture(device_->stream, &graph);
            cudaGraphDestroy(graph);
            throw;
        }
        check(cudaStreamEndCapture(device_->stream, &graph), "capture a graph");
        const cudaError_t made = cudaGraphInstantiateWithFlags(&bound.graph, graph, 0);
        cudaGraphDestroy(graph);
        check(made, "make a graph");
    }

    const std::shared_ptr<Device> device_;
    const Graph &graph_;
    const std::string name_;
    const bool padded_;
    const std::unique_ptr<trt::ICudaEngine> engine_;
    Memory scratch_;                 // of all contexts, which run one after the other
    mutable std::list<ShapeContext> contexts_;  // the last used first
};

}  // namespace

std::unique_ptr<Engine> load_tensorrt(std::shared_ptr<Device> device, const Mapping &plan, const Graph &graph,
                                      const std::string &name, bool padded) {
    return std::make_unique<TrtEngine>(std::move(device), plan, graph, name, padded);
}

}  // namespace cembed

#endif
