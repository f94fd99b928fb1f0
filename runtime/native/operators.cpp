// MultiHeadAttention in bfloat16, in place of ONNX Runtime's own: what a session of provider onnxruntime-bf16 registers.
#include "operators.h"

#include <cmath>
#include <initializer_list>
#include <memory>

#include "attention.h"

namespace {

using namespace onnxruntime_abi;

constexpr int INVALID_ARGUMENT = 2;

struct Kernel {
    const Api &api;
    int64_t heads;
    float scale;  // 0: one over the root of a head's length
};

// What is released at the end of a scope.
struct Owned {
    const Api &api;
    Function release;
    void *what = nullptr;

    ~Owned() {
        if (what) api.call(release, what);
    }
};

void *create(const Operator *, const Api *api, const void *info, void **kernel) {
    auto made = std::make_unique<Kernel>(Kernel{*api, 0, 0});
    if (void *status = api->call(INTEGER_ATTRIBUTE, info, "num_heads", &made->heads)) return status;
    if (made->heads < 1) return api->call(CREATE_STATUS, INVALID_ARGUMENT, "num_heads is less than 1");
    int64_t causal = 0;
    for (void *status : {api->call(FLOAT_ATTRIBUTE, info, "scale", &made->scale),
                         api->call(INTEGER_ATTRIBUTE, info, "unidirectional", &causal)})
        if (status) api->call(RELEASE_STATUS, status);  // it is not given
    if (causal) return api->call(CREATE_STATUS, INVALID_ARGUMENT, "onnxruntime-bf16 has no attention that is causal");
    *kernel = made.release();
    return nullptr;
}

// Shapes of query, key and value. Null if they fit, else a status.
void *shape_of(const Kernel &kernel, const void *const inputs[3], attention::Shape &shape) {
    int64_t sizes[3][3];
    for (int i = 0; i < 3; ++i) {
        Owned info{kernel.api, RELEASE_SHAPE};
        size_t axes = 0;
        if (void *status = kernel.api.call(SHAPE, inputs[i], &info.what)) return status;
        if (void *status = kernel.api.call(NUM_DIMENSIONS, info.what, &axes)) return status;
        if (axes != 3) return kernel.api.call(CREATE_STATUS, INVALID_ARGUMENT, "query, key and value need three axes");
        if (void *status = kernel.api.call(DIMENSIONS, info.what, &sizes[i][0], size_t(3))) return status;
    }
    const auto &[query, key, value] = sizes;
    shape = {query[0], query[1], key[1], kernel.heads, query[2] / kernel.heads};
    const bool fits = key[0] == query[0] && key[2] == query[2] && query[2] % kernel.heads == 0 && key[1] > 0;
    if (fits && value[0] == key[0] && value[1] == key[1] && value[2] == key[2] && shape.dim <= attention::MOST_DIM)
        return nullptr;
    return kernel.api.call(CREATE_STATUS, INVALID_ARGUMENT,
                           "onnxruntime-bf16 needs query, key and value of one width, in heads of 256 at most");
}

struct Work {
    attention::Shape shape;
    const float *query, *key, *value;
    float scale, *output;
    char *packed;
};

// Memory of the run: what one layer has used the next one gets.
void *run(const Api &api, const void *context, Work &work) {
    Owned memory{api, RELEASE_MEMORY_INFO}, allocator{api, RELEASE_ALLOCATOR};
    if (void *status = api.call(CREATE_MEMORY_INFO, ARENA, HOST, &memory.what)) return status;
    if (void *status = api.call(ALLOCATOR, context, memory.what, &allocator.what)) return status;
    void *packed = nullptr;
    if (void *status = api.call(ALLOCATE, allocator.what, attention::packed_size(work.shape), &packed)) return status;
    work.packed = static_cast<char *>(packed);
    const auto parallel = [&](void (*part)(void *, size_t), int64_t count) {
        return api.call(PARALLEL_FOR, context, part, size_t(count), size_t(count), static_cast<void *>(&work));
    };
    void *status = parallel(
        [](void *given, size_t head) {
            const Work &work = *static_cast<Work *>(given);
            attention::pack(work.shape, int64_t(head), work.key, work.value, work.packed);
        },
        work.shape.all_heads());
    if (!status)
        status = parallel(
            [](void *given, size_t block) {
                const Work &work = *static_cast<Work *>(given);
                attention::attend(work.shape, int64_t(block), work.query, work.packed, work.scale, work.output);
            },
            attention::blocks(work.shape));
    api.call(FREE, allocator.what, packed);
    return status;
}

void *compute(void *given, void *context) {
    const Kernel &kernel = *static_cast<Kernel *>(given);
    const void *inputs[3];
    void *data[4], *output = nullptr;
    for (size_t i = 0; i < 3; ++i) {
        if (void *status = kernel.api.call(INPUT, context, i, &inputs[i])) return status;
        if (void *status = kernel.api.call(TENSOR_DATA, inputs[i], &data[i])) return status;
    }
    attention::Shape shape{};
    if (void *status = shape_of(kernel, inputs, shape)) return status;
    const int64_t sizes[] = {shape.batch, shape.queries, shape.width()};
    if (void *status = kernel.api.call(OUTPUT, context, size_t(0), &sizes[0], size_t(3), &output)) return status;
    if (void *status = kernel.api.call(TENSOR_DATA, output, &data[3])) return status;
    const float scale = kernel.scale != 0 ? kernel.scale : 1 / std::sqrt(float(shape.dim));
    const auto at = [&](int i) { return static_cast<float *>(data[i]); };
    Work work{shape, at(0), at(1), at(2), scale, at(3), nullptr};
    return attention::blocks(shape) ? run(kernel.api, context, work) : nullptr;
}

Operator multi_head_attention() {
    Operator made{};
    made.name = [](const Operator *) { return "MultiHeadAttention"; };
    made.provider = [](const Operator *) -> const char * { return nullptr; };  // the CPU
    made.input_type = made.output_type = [](const Operator *, size_t) { return FLOAT; };
    made.num_inputs = [](const Operator *) -> size_t { return 3; };
    made.num_outputs = [](const Operator *) -> size_t { return 1; };
    made.input_kind = made.output_kind = [](const Operator *, size_t) { return REQUIRED; };
    made.input_memory = [](const Operator *, size_t) { return HOST; };
    made.create = create;
    made.compute = compute;
    made.destroy = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
    return made;
}

}  // namespace

int multiplies_bfloat16() { return attention::supported(); }

void *RegisterCustomOps(void *options, const Base *base) {
    static const Operator attention = multi_head_attention();
    static constexpr const char *CONTRIB = "com.microsoft";  // a session's own operators come first
    const Api *api = base->api(VERSION);
    void *domain = nullptr;
    if (void *status = api->call(CREATE_DOMAIN, CONTRIB, &domain)) return status;
    if (void *status = api->call(ADD_TO_DOMAIN, domain, &attention)) return status;
    return api->call(ADD_DOMAIN, options, domain);
}
