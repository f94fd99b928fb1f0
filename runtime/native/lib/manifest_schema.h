// Written by tests/native/manifest_schema.py from runtime/bundle: do not edit.
#pragma once

#include <cstdint>

namespace cembed::schema {

// What a kind is: tests/native/manifest_schema.py. TENSORS and MESSAGES: where they come from.
struct Field {
    const char *owner, *name, *kind;
    bool required;
    double least, most;
};

struct Inner {
    const char *message;
    uint32_t field;
    const char *inner;
};

struct State {
    const char *past, *present;
    bool grows;
};

constexpr int VERSION = 2, OLDEST = 1;
constexpr const char *MANIFEST = "manifest.json", *DIGEST = "manifest.sha256",
                     *SIGNATURES = "manifest.sig";
constexpr int64_t MAX_MANIFEST = 16777216;
constexpr int64_t MAX_PICTURE = 67108864;
constexpr int64_t MAX_TOKENIZER = 67108864;
constexpr int64_t MAX_VECTOR = 2147483647;
constexpr int64_t MAX_DEEPSTACK = 64;
constexpr int64_t MAX_TILES = 1024;
constexpr int64_t MAX_ONNX = 2147483647;
constexpr int MAX_DEPTH = 100;
constexpr const char *FORBIDDEN = "EPContext";

constexpr Field FIELDS[] = {
    {"Manifest", "backbone", "str", true, 0, 0},
    {"Manifest", "head", "str", true, 0, 0},
    {"Manifest", "target", "str", true, 0, 0},
    {"Manifest", "opset", "int", true, 18, 64},
    {"Manifest", "dtype", "str", true, 0, 0},
    {"Manifest", "hidden_size", "int", true, 1, 1048576},
    {"Manifest", "dim", "int", true, 1, 1048576},
    {"Manifest", "max_sequence_length", "int", true, 1, 16777216},
    {"Manifest", "image_token_id", "int", true, 0, 268435456},
    {"Manifest", "prompt_attention", "=causal|bidirectional", true, 0, 0},
    {"Manifest", "document", "Side", true, 0, 0},
    {"Manifest", "query", "Side", true, 0, 0},
    {"Manifest", "image", "ImageProcessing", true, 0, 0},
    {"Manifest", "positions", "Positions", true, 0, 0},
    {"Manifest", "graphs", "{str:Graph}", true, 0, 0},
    {"Manifest", "token_embeddings", "EmbeddingTable", true, 0, 0},
    {"Manifest", "tokenizer", "file", true, 0, 0},
    {"Manifest", "self_test", "SelfTest", true, 0, 0},
    {"Manifest", "parity", "[Parity]", true, 0, 0},
    {"Manifest", "source", "{str:str}", true, 0, 0},
    {"Manifest", "made_with", "{str:str}", true, 0, 0},
    {"Manifest", "slot_embeddings", "EmbeddingTable?", false, 0, 0},
    {"Manifest", "quantisation", "Quantisation?", false, 0, 0},
    {"Manifest", "files", "{file:FileRecord}", false, 0, 0},
    {"Manifest", "upgraded_from", "sha256?", false, 0, 0},
    {"Manifest", "schema_version", "int", false, 1, 2},
    {"Side", "prompt", "str", true, 0, 0},
    {"Side", "slots", "=constant|learned|feedback|all_tokens", true, 0, 0},
    {"Side", "num_vectors", "int?", true, 1, 16777216},
    {"Side", "slot_positions", "=zero|continue", true, 0, 0},
    {"Side", "first_vector", "=prompt_end|slot", false, 0, 0},
    {"Side", "latent_token_id", "int?", false, 0, 268435456},
    {"Side", "slot_rows", "[int*2]?", false, 0, 268435456},
    {"Side", "unread_slots", "int", false, 0, 268435456},
    {"Side", "nested_budgets", "[int]", false, 1, 16777216},
    {"Side", "pooling", "=none|mean|last|concat", false, 0, 0},
    {"ImageProcessing", "resize", "=smart|fixed|tiles", true, 0, 0},
    {"ImageProcessing", "patch_size", "int", true, 1, 256},
    {"ImageProcessing", "merge_size", "int", true, 1, 16},
    {"ImageProcessing", "min_pixels", "int", true, 1, 268435456},
    {"ImageProcessing", "max_pixels", "int", true, 1, 268435456},
    {"ImageProcessing", "rescale_factor", "number", true, 1e-06, 1000.0},
    {"ImageProcessing", "mean", "[number*3]", true, -1000.0, 1000.0},
    {"ImageProcessing", "std", "[number*3]", true, 1e-06, 1000.0},
    {"ImageProcessing", "window_size", "int", false, 0, 4096},
    {"ImageProcessing", "tiles", "Tiles?", false, 0, 0},
    {"ImageProcessing", "skip_blank", "bool", false, 0, 0},
    {"Tiles", "side", "int", true, 1, 4096},
    {"Tiles", "longest_edge", "int", true, 1, 4096},
    {"Tiles", "tile", "str", true, 0, 0},
    {"Tiles", "row_end", "str", true, 0, 0},
    {"Tiles", "page", "str", true, 0, 0},
    {"Tiles", "alone", "str", true, 0, 0},
    {"Positions", "axes", "=1|3", true, 0, 0},
    {"Positions", "first", "int", true, 0, 65536},
    {"Graph", "file", "file", true, 0, 0},
    {"Graph", "data", "[file]", true, 0, 0},
    {"Graph", "inputs", "[Tensor]", true, 0, 0},
    {"Graph", "outputs", "[Tensor]", true, 0, 0},
    {"Tensor", "name", "str", true, 0, 0},
    {"Tensor", "dtype", "str", true, 0, 0},
    {"Tensor", "shape", "[axis]", true, 1, 268435456},
    {"EmbeddingTable", "file", "file", true, 0, 0},
    {"EmbeddingTable", "dtype", "=float32|float16|int8", true, 0, 0},
    {"EmbeddingTable", "rows", "int", true, 1, 268435456},
    {"EmbeddingTable", "scales", "file?", false, 0, 0},
    {"SelfTest", "image", "file", true, 0, 0},
    {"SelfTest", "text", "words", true, 0, 0},
    {"SelfTest", "vectors", "file", true, 0, 0},
    {"SelfTest", "tolerance", "number", true, 0.0, 0.1},
    {"Parity", "graph", "str", true, 0, 0},
    {"Parity", "max_error", "number", true, 0.0, 1.001},
    {"Parity", "min_cosine", "number", true, -1.001, 1.001},
    {"Parity", "tolerance", "number", true, 0.0, 1.001},
    {"Quantisation", "weights", "str", true, 0, 0},
    {"Quantisation", "embeddings", "str", true, 0, 0},
    {"Quantisation", "rounding", "str", true, 0, 0},
    {"Quantisation", "source", "str", true, 0, 0},
    {"Quantisation", "schemes", "{str:str}", true, 0, 0},
    {"Quantisation", "kept", "[str]", true, 0, 0},
    {"Quantisation", "comparison", "Comparison", true, 0, 0},
    {"Quantisation", "sensitivity", "[LayerDamage]", false, 0, 0},
    {"Quantisation", "rows", "bool", false, 0, 0},
    {"Comparison", "pages", "int", true, 0, 1099511627776},
    {"Comparison", "queries", "int", true, 0, 1099511627776},
    {"Comparison", "min_cosine", "number", true, -1.001, 1.001},
    {"Comparison", "p1_cosine", "number", true, -1.001, 1.001},
    {"Comparison", "median_cosine", "number", true, -1.001, 1.001},
    {"Comparison", "score_error", "number", true, -1000000.0, 1000000.0},
    {"Comparison", "top5_overlap", "number", true, 0.0, 1.001},
    {"Comparison", "ms_per_page", "[number*2]", true, 0.0, 1000000000000.0},
    {"Comparison", "bytes", "[int*2]", true, 0, 1125899906842624},
    {"Comparison", "ndcg5", "[number*2]?", false, 0.0, 1.001},
    {"LayerDamage", "layer", "str", true, 0, 0},
    {"LayerDamage", "weights", "[str]", true, 0, 0},
    {"LayerDamage", "min_cosine", "number", true, -1.001, 1.001},
    {"LayerDamage", "score_error", "number", true, -1000000.0, 1000000.0},
    {"FileRecord", "size", "int", true, 0, 1125899906842624},
    {"FileRecord", "sha256", "sha256", true, 0, 0},
};

constexpr const char *const ORDER[] = {
    "image.min_pixels <= image.max_pixels",
    "image_token_id < token_embeddings.rows",
    "document.latent_token_id < token_embeddings.rows",
    "query.latent_token_id < token_embeddings.rows",
    "document.num_vectors <= max_sequence_length",
    "query.num_vectors <= max_sequence_length",
};

constexpr const char *const TENSORS[] = {
    "vision in pixel_values - float32 batch_size num_patches|=image.max_pixels =image.patch_size",
    "vision in patch_positions ? int64 num_patches 2",
    "vision in patch_fractions ?fractions float32 num_patches 2",
    "vision in window_index ?windows int64 num_windows =image.window_size",
    "vision in window_restore ?windows int64 num_patches",
    "vision out image_features - float32 batch_size num_visual_tokens =image_features",
    "text in inputs_embeds - float32 batch_size sequence_length =hidden_size",
    "text in position_ids - int64 =positions.axes batch_size sequence_length",
    "text in slot_indices - int64 batch_size num_vectors",
    "text in prompt_length ? int64 1",
    "text in deepstack_embeds ?deepstack float32 batch_size sequence_length =deepstack",
    "text out slot_states - float32 batch_size num_vectors =dim",
    "text_step in inputs_embeds - float32 batch_size sequence_length =hidden_size",
    "text_step in position_ids - int64 =positions.axes batch_size sequence_length",
    "text_step in slot_indices - int64 batch_size num_vectors",
    "text_step in cache_position - int64 batch_size",
    "text_step in deepstack_embeds ?deepstack float32 batch_size sequence_length =deepstack",
    "text_step in past_key_values.#.key - float32|float16 batch_size * capacity|* *",
    "text_step in past_key_values.#.value - float32|float16 batch_size * capacity|* *",
    "text_step in past_states.#.conv ?states float32 batch_size * *",
    "text_step in past_states.#.recurrent ?states float32 batch_size * * *",
    "text_step out slot_states - float32 batch_size num_vectors =dim",
    "text_step out hidden_states ? float32 batch_size num_vectors =hidden_size",
    "text_step out present.#.key - float32|float16 batch_size * capacity|* *",
    "text_step out present.#.value - float32|float16 batch_size * capacity|* *",
    "text_step out present_states.#.conv ?states float32 batch_size * *",
    "text_step out present_states.#.recurrent ?states float32 batch_size * * *",
};

constexpr State STATES[] = {
    {"past_key_values.", "present.", true},
    {"past_states.", "present_states.", false},
};

constexpr Inner MESSAGES[] = {
    {"Model", 7, "Graph!"},
    {"Model", 20, "Training"},
    {"Model", 25, "Function"},
    {"Graph", 1, "Node"},
    {"Graph", 5, "Tensor"},
    {"Graph", 15, "Sparse"},
    {"Node", 5, "Attribute"},
    {"Attribute", 5, "Tensor!"},
    {"Attribute", 6, "Graph!"},
    {"Attribute", 10, "Tensor"},
    {"Attribute", 11, "Graph"},
    {"Attribute", 22, "Sparse!"},
    {"Attribute", 23, "Sparse"},
    {"Sparse", 1, "Tensor!"},
    {"Sparse", 2, "Tensor!"},
    {"Training", 1, "Graph!"},
    {"Training", 2, "Graph!"},
    {"Function", 7, "Node"},
    {"Function", 11, "Attribute"},
    {"Tensor", 13, "Entry"},
    {"Entry", 1, "Text!"},
    {"Entry", 2, "Text!"},
};

constexpr const char *const DATA_KEYS[] = {
    "location",
    "offset",
    "length",
    "checksum",
};

constexpr int64_t MAX_GRAPH = 67108864;
constexpr int64_t MAX_NODES = 262144;
constexpr int64_t MAX_TENSORS = 262144;
constexpr int64_t MAX_BODIES = 2;
constexpr int64_t MAX_ATTRIBUTE = 16384;
constexpr int64_t MAX_AXES = 8;
constexpr int64_t MAX_AXIS = 268435456;
constexpr int64_t MAX_SIZED = 16777216;
constexpr int64_t MAX_NUMBERS = 64;
constexpr int64_t UNKNOWN_AXIS = 65536;
constexpr int64_t FOLDED_SHARE = 4;
constexpr int64_t FOLDED_MORE = 1048576;
constexpr int64_t BLOCK = 32;
constexpr int64_t MAX_ENTRIES = 2097152;
constexpr int64_t MAX_VALUES = 524288;
constexpr int64_t MAX_ADDED = 16384;
constexpr int64_t MAX_TOKEN = 1024;
constexpr int64_t MAX_GROWTH = 8;

struct Bits {
    int64_t type, bits;
};

struct Type {
    const char *name;
    int64_t number;
};

struct Growth {
    const char *name, *how;
};

constexpr const char *const DOMAINS[] = {
    "",
    "com.microsoft",
};

constexpr const char *const OPERATORS[] = {
    "Abs",
    "Add",
    "And",
    "Attention",
    "AveragePool",
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Conv",
    "Cos",
    "CumSum",
    "DequantizeLinear",
    "Div",
    "Equal",
    "Erf",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "IsInf",
    "IsNaN",
    "LayerNormalization",
    "Less",
    "LessOrEqual",
    "Log",
    "MatMul",
    "MatMulInteger",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Round",
    "Scan",
    "ScatterElements",
    "Shape",
    "Sigmoid",
    "Sign",
    "Sin",
    "Size",
    "Slice",
    "Softmax",
    "Softplus",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "TensorScatter",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
    "com.microsoft:GroupQueryAttention",
    "com.microsoft:LinearAttention",
    "com.microsoft:MatMulIntegerToFloat",
    "com.microsoft:MatMulNBits",
    "com.microsoft:MultiHeadAttention",
};

constexpr const char *const KEEPS[] = {
    "Cast",
    "Concat",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "Max",
    "Min",
};

constexpr Inner GRAPH_FIELDS[] = {
    {"Model", 1, "n"},
    {"Model", 2, "t"},
    {"Model", 3, "t"},
    {"Model", 4, "t"},
    {"Model", 5, "n"},
    {"Model", 6, "t"},
    {"Model", 7, "Graph"},
    {"Model", 8, "Opset*"},
    {"Model", 14, "t*"},
    {"Graph", 1, "Node*"},
    {"Graph", 2, "t"},
    {"Graph", 5, "Tensor*"},
    {"Graph", 10, "t"},
    {"Graph", 11, "Value*"},
    {"Graph", 12, "Value*"},
    {"Graph", 13, "Value*"},
    {"Graph", 16, "t*"},
    {"Node", 1, "t*"},
    {"Node", 2, "t*"},
    {"Node", 3, "t"},
    {"Node", 4, "t"},
    {"Node", 5, "Attribute*"},
    {"Node", 6, "t"},
    {"Node", 7, "t"},
    {"Node", 9, "t*"},
    {"Attribute", 1, "t"},
    {"Attribute", 2, "f"},
    {"Attribute", 3, "n"},
    {"Attribute", 4, "t"},
    {"Attribute", 5, "Tensor"},
    {"Attribute", 6, "Graph"},
    {"Attribute", 7, "a*"},
    {"Attribute", 8, "a*"},
    {"Attribute", 13, "t"},
    {"Attribute", 20, "n"},
    {"Tensor", 1, "a*"},
    {"Tensor", 2, "n"},
    {"Tensor", 4, "a*"},
    {"Tensor", 5, "a*"},
    {"Tensor", 7, "a*"},
    {"Tensor", 8, "t"},
    {"Tensor", 9, "t"},
    {"Tensor", 12, "t"},
    {"Tensor", 13, "Entry*"},
    {"Tensor", 14, "n"},
    {"Entry", 1, "t"},
    {"Entry", 2, "t"},
    {"Opset", 1, "t"},
    {"Opset", 2, "n"},
    {"Value", 1, "t"},
    {"Value", 2, "Type"},
    {"Value", 3, "t"},
    {"Type", 1, "TensorType"},
    {"TensorType", 1, "n"},
    {"TensorType", 2, "Shape"},
    {"Shape", 1, "Dim*"},
    {"Dim", 1, "n"},
    {"Dim", 2, "t"},
};

constexpr Bits GRAPH_BITS[] = {
    {1, 32},
    {2, 8},
    {3, 8},
    {6, 32},
    {7, 64},
    {9, 8},
    {10, 16},
    {11, 64},
    {16, 16},
    {21, 4},
    {22, 4},
};

constexpr Type GRAPH_TYPES[] = {
    {"float32", 1},
    {"int32", 6},
    {"int64", 7},
    {"bool", 9},
    {"float16", 10},
};

constexpr Growth GROWTH[] = {
    {"Abs", "same"},
    {"Cast", "same"},
    {"Ceil", "same"},
    {"Clip", "same"},
    {"Cos", "same"},
    {"DequantizeLinear", "same"},
    {"Erf", "same"},
    {"Exp", "same"},
    {"Flatten", "same"},
    {"Floor", "same"},
    {"Identity", "same"},
    {"IsInf", "same"},
    {"IsNaN", "same"},
    {"Log", "same"},
    {"Neg", "same"},
    {"Not", "same"},
    {"QuantizeLinear", "same"},
    {"Reciprocal", "same"},
    {"ReduceL2", "same"},
    {"ReduceMax", "same"},
    {"ReduceMean", "same"},
    {"ReduceMin", "same"},
    {"ReduceProd", "same"},
    {"ReduceSum", "same"},
    {"Relu", "same"},
    {"Reshape", "same"},
    {"Round", "same"},
    {"Sigmoid", "same"},
    {"Sign", "same"},
    {"Sin", "same"},
    {"Size", "same"},
    {"Slice", "same"},
    {"Softmax", "same"},
    {"Split", "same"},
    {"Sqrt", "same"},
    {"Squeeze", "same"},
    {"Tanh", "same"},
    {"Transpose", "same"},
    {"Trilu", "same"},
    {"Unsqueeze", "same"},
    {"Add", "product"},
    {"And", "product"},
    {"Div", "product"},
    {"Equal", "product"},
    {"Gather", "product"},
    {"GatherElements", "product"},
    {"Greater", "product"},
    {"GreaterOrEqual", "product"},
    {"Less", "product"},
    {"LessOrEqual", "product"},
    {"MatMul", "product"},
    {"MatMulInteger", "product"},
    {"Max", "product"},
    {"Mean", "product"},
    {"Min", "product"},
    {"Mod", "product"},
    {"Mul", "product"},
    {"Or", "product"},
    {"Pow", "product"},
    {"Sub", "product"},
    {"Sum", "product"},
    {"Where", "product"},
    {"Concat", "sum"},
    {"ConstantOfShape", "sized"},
    {"Expand", "sized"},
    {"Range", "sized"},
    {"Tile", "sized"},
};

}  // namespace cembed::schema
