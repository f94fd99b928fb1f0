// What sessions run in place of ONNX Runtime's own operators: MultiHeadAttention in bfloat16, of provider onnxruntime-bf16,
// and products of bytes with exact sums, of provider onnxruntime-exact, where the processor's are not.
#include "operators.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <numeric>
#include <vector>

#include "attention.h"
#include "byte_product.h"

namespace {

using namespace onnxruntime_abi;

constexpr int INVALID_ARGUMENT = 2;
using Sizes = std::vector<int64_t>;

// What is released at the end of a scope.
struct Owned {
    const Api &api;
    Function release;
    void *what = nullptr;

    ~Owned() {
        if (what) api.call(release, what);
    }
};

void *invalid(const Api &api, const char *message) { return api.call(CREATE_STATUS, INVALID_ARGUMENT, message); }

// Below, what returns a pointer returns null, or a status.

struct Input {
    const void *value = nullptr;  // null where an optional one is not given
    void *data = nullptr;
    Sizes sizes;

    int64_t count() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>()); }
    template <class T> const T *at() const { return static_cast<const T *>(data); }
};

void *read(const Api &api, const void *context, size_t index, Input &input) {
    Owned info{api, RELEASE_SHAPE};
    size_t axes = 0;
    if (void *status = api.call(INPUT, context, index, &input.value)) return status;
    if (!input.value) return nullptr;
    if (void *status = api.call(TENSOR_DATA, input.value, &input.data)) return status;
    if (void *status = api.call(SHAPE, input.value, &info.what)) return status;
    if (void *status = api.call(NUM_DIMENSIONS, info.what, &axes)) return status;
    input.sizes.resize(axes);
    return axes ? api.call(DIMENSIONS, info.what, input.sizes.data(), axes) : nullptr;
}

template <size_t N> void *read(const Api &api, const void *context, Input (&inputs)[N]) {
    for (size_t i = 0; i < N; ++i)
        if (void *status = read(api, context, i, inputs[i])) return status;
    return nullptr;
}

void *write(const Api &api, const void *context, const Sizes &sizes, void **data) {
    void *output = nullptr;
    if (void *status = api.call(OUTPUT, context, size_t(0), sizes.data(), sizes.size(), &output)) return status;
    return api.call(TENSOR_DATA, output, data);
}

// Two passes in all threads, the second over what the first one left in `Work::scratch`: memory of the run, so what one
// layer has used the next one gets.
template <class Work>
void *run(const Api &api, const void *context, Work &work, size_t scratch_size, int64_t firsts, int64_t seconds) {
    Owned memory{api, RELEASE_MEMORY_INFO}, allocator{api, RELEASE_ALLOCATOR};
    if (void *status = api.call(CREATE_MEMORY_INFO, ARENA, HOST, &memory.what)) return status;
    if (void *status = api.call(ALLOCATOR, context, memory.what, &allocator.what)) return status;
    void *scratch = nullptr;
    if (scratch_size)
        if (void *status = api.call(ALLOCATE, allocator.what, scratch_size, &scratch)) return status;
    work.scratch = scratch;
    const auto parallel = [&](void (*part)(void *, size_t), int64_t count) -> void * {
        if (!count) return nullptr;
        return api.call(PARALLEL_FOR, context, part, size_t(count), size_t(count), static_cast<void *>(&work));
    };
    void *status = parallel([](void *given, size_t i) { static_cast<Work *>(given)->first(int64_t(i)); }, firsts);
    if (!status) status = parallel([](void *given, size_t i) { static_cast<Work *>(given)->second(int64_t(i)); }, seconds);
    if (scratch) api.call(FREE, allocator.what, scratch);
    return status;
}

// Inputs and outputs that are required, and of float32, unless said otherwise.
Operator operator_of(const char *(*name)(const Operator *), size_t (*num_inputs)(const Operator *)) {
    Operator made{};
    made.name = name;
    made.provider = [](const Operator *) -> const char * { return nullptr; };  // the CPU
    made.input_type = made.output_type = [](const Operator *, size_t) { return FLOAT; };
    made.num_inputs = num_inputs;
    made.num_outputs = [](const Operator *) -> size_t { return 1; };
    made.input_kind = made.output_kind = [](const Operator *, size_t) { return REQUIRED; };
    made.input_memory = [](const Operator *, size_t) { return HOST; };
    return made;
}

// Attention ----------------------------------------------------------------------------------------------------------------

struct Attention {
    const Api &api;
    int64_t heads;
    float scale;  // 0: one over the root of a head's length
};

void *create_attention(const Operator *, const Api *api, const void *info, void **kernel) {
    auto made = std::make_unique<Attention>(Attention{*api, 0, 0});
    if (void *status = api->call(INTEGER_ATTRIBUTE, info, "num_heads", &made->heads)) return status;
    if (made->heads < 1) return invalid(*api, "num_heads is less than 1");
    int64_t causal = 0;
    for (void *status : {api->call(FLOAT_ATTRIBUTE, info, "scale", &made->scale),
                         api->call(INTEGER_ATTRIBUTE, info, "unidirectional", &causal)})
        if (status) api->call(RELEASE_STATUS, status);  // it is not given
    if (causal) return invalid(*api, "onnxruntime-bf16 has no attention that is causal");
    *kernel = made.release();
    return nullptr;
}

struct AttentionWork {
    attention::Shape shape;
    const float *query, *key, *value;
    float scale, *output;
    void *scratch;

    char *packed() const { return static_cast<char *>(scratch); }
    void first(int64_t head) const { attention::pack(shape, head, key, value, packed()); }
    void second(int64_t block) const { attention::attend(shape, block, query, packed(), scale, output); }
};

void *compute_attention(void *given, void *context) {
    const Attention &kernel = *static_cast<Attention *>(given);
    Input inputs[3];
    if (void *status = read(kernel.api, context, inputs)) return status;
    const Sizes &query = inputs[0].sizes, &key = inputs[1].sizes;
    for (const Input &input : inputs)
        if (input.sizes.size() != 3) return invalid(kernel.api, "query, key and value need three axes");
    const attention::Shape shape{query[0], query[1], key[1], kernel.heads, query[2] / kernel.heads};
    const bool fits = key[0] == query[0] && key[2] == query[2] && query[2] % kernel.heads == 0 && key[1] > 0;
    if (!fits || inputs[2].sizes != key || shape.dim > attention::MOST_DIM)
        return invalid(kernel.api, "onnxruntime-bf16 needs query, key and value of one width, in heads of 256 at most");
    void *output = nullptr;
    if (void *status = write(kernel.api, context, query, &output)) return status;
    const float scale = kernel.scale != 0 ? kernel.scale : 1 / std::sqrt(float(shape.dim));
    const auto at = [&](int i) { return inputs[i].at<float>(); };
    AttentionWork work{shape, at(0), at(1), at(2), scale, static_cast<float *>(output), nullptr};
    if (!attention::blocks(shape)) return nullptr;
    return run(kernel.api, context, work, attention::packed_size(shape), shape.all_heads(), attention::blocks(shape));
}

const Operator &multi_head_attention() {
    static const Operator made = [] {
        Operator made = operator_of([](const Operator *) { return "MultiHeadAttention"; },
                                    [](const Operator *) -> size_t { return 3; });
        made.create = create_attention;
        made.compute = compute_attention;
        made.destroy = [](void *kernel) { delete static_cast<Attention *>(kernel); };
        return made;
    }();
    return made;
}

// Products of bytes --------------------------------------------------------------------------------------------------------

struct ProductWork : byte_product::Product {
    void *scratch;

    void first(int64_t block) const { byte_product::first(*this, block, scratch); }
    void second(int64_t block) const { byte_product::second(*this, block, scratch); }
};

// Inputs of MatMulIntegerToFloat: A [..., I], B [I, O], A's scale, B's scales [O], zero points, of which B's are 0, and a
// bias [O]. MatMulInteger has no scales and no bias; its inputs are those at PLACES.
constexpr int TYPES[] = {UINT8, INT8, FLOAT, FLOAT, UINT8, INT8, FLOAT};
constexpr size_t PLACES[] = {0, 1, 4, 5};
using ProductInputs = Input[std::size(TYPES)];

void *multiply(const Api &api, const void *context, const ProductInputs &given) {
    const auto &[a, b, scale, scales, zero, other_zero, bias] = given;
    if (a.sizes.empty() || b.sizes.size() != 2 || a.sizes.back() != b.sizes[0])
        return invalid(api, "a product of bytes needs [..., I] and [I, O]");
    if (b.sizes[0] < 1 || b.sizes[0] > byte_product::MOST_INNER)
        return invalid(api, "a product of bytes adds 1 to 65,536 of them");
    if ((zero.value && zero.count() != 1) || (scale.value && scale.count() != 1))
        return invalid(api, "a product of bytes has one zero point and one scale for all that is multiplied");
    for (const Input *each : {&scales, &bias})
        if (each->value && (each->sizes.size() != 1 || each->sizes[0] != b.sizes[1]))
            return invalid(api, "a product of bytes has a scale, and may have a bias, for each column");
    const auto *zeros = other_zero.at<int8_t>();
    if (other_zero.value && std::any_of(zeros, zeros + other_zero.count(), [](int8_t each) { return each != 0; }))
        return invalid(api, "a product of bytes has no zero point for weights but 0");
    ProductWork work{};
    work.inner = b.sizes[0];
    work.columns = b.sizes[1];
    work.rows = std::accumulate(a.sizes.begin(), a.sizes.end() - 1, int64_t(1), std::multiplies<>());
    work.a = a.at<uint8_t>();
    work.b = b.at<int8_t>();
    work.zero = zero.value ? *zero.at<uint8_t>() : 0;
    if (scales.value) {
        work.scale = *scale.at<float>();
        work.scales = scales.at<float>();
        work.bias = bias.at<float>();
    }
    Sizes sizes = a.sizes;
    sizes.back() = work.columns;
    if (void *status = write(api, context, sizes, &work.out)) return status;
    if (!work.rows || !work.columns) return nullptr;
    return run(api, context, work, byte_product::scratch_size(work), byte_product::first_blocks(work),
               byte_product::second_blocks(work));
}

// The kernel of an operator without attributes: the interface itself.
void *create_plain(const Operator *, const Api *api, const void *, void **kernel) {
    *kernel = const_cast<Api *>(api);
    return nullptr;
}

void *compute_integers(void *api, void *context) {
    const Api &known = *static_cast<const Api *>(api);
    ProductInputs inputs;
    for (size_t i = 0; i < std::size(PLACES); ++i)
        if (void *status = read(known, context, i, inputs[PLACES[i]])) return status;
    return multiply(known, context, inputs);
}

void *compute_floats(void *api, void *context) {
    const Api &known = *static_cast<const Api *>(api);
    ProductInputs inputs;
    if (void *status = read(known, context, inputs)) return status;
    return multiply(known, context, inputs);
}

Operator product_of_bytes(Operator made, void *(*compute)(void *kernel, void *context)) {
    made.create = create_plain;
    made.compute = compute;
    made.destroy = [](void *) {};
    return made;
}

const Operator &matmul_integer() {
    static const Operator made = [] {
        Operator made = operator_of([](const Operator *) { return "MatMulInteger"; },
                                    [](const Operator *) { return std::size(PLACES); });
        made.input_type = [](const Operator *, size_t i) { return TYPES[PLACES[i]]; };
        made.output_type = [](const Operator *, size_t) { return INT32; };
        made.input_kind = [](const Operator *, size_t i) { return i < 2 ? REQUIRED : OPTIONAL; };
        return product_of_bytes(made, compute_integers);
    }();
    return made;
}

const Operator &matmul_integer_to_float() {
    static const Operator made = [] {
        Operator made = operator_of([](const Operator *) { return "MatMulIntegerToFloat"; },
                                    [](const Operator *) { return std::size(TYPES); });
        made.input_type = [](const Operator *, size_t i) { return TYPES[i]; };
        made.input_kind = [](const Operator *, size_t i) { return i < 4 ? REQUIRED : OPTIONAL; };
        return product_of_bytes(made, compute_floats);
    }();
    return made;
}

void *add(const Api &api, void *options, const char *name, const Operator &what) {
    void *domain = nullptr;
    if (void *status = api.call(CREATE_DOMAIN, name, &domain)) return status;
    if (void *status = api.call(ADD_TO_DOMAIN, domain, &what)) return status;
    return api.call(ADD_DOMAIN, options, domain);
}

}  // namespace

int multiplies_bfloat16() { return attention::supported(); }
int multiplies_bytes() { return byte_product::supported(); }
int adds_bytes_exactly() { return byte_product::needless(); }

void *RegisterCustomOps(void *options, const Base *base) {
    static constexpr const char *STANDARD = "", *CONTRIB = "com.microsoft";  // a session's own operators come first
    const Api &api = *base->api(VERSION);
    if (multiplies_bfloat16()) return add(api, options, CONTRIB, multi_head_attention());
    if (void *status = add(api, options, CONTRIB, matmul_integer_to_float())) return status;
    return add(api, options, STANDARD, matmul_integer());
}
