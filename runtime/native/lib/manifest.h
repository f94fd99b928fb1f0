// What `manifest.json` says, field by field as in runtime/bundle/manifest.py, and how it is parsed: strictly.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "image.h"
#include "positions.h"

namespace cembed {

enum class Slots { CONSTANT, LEARNED, FEEDBACK, ALL_TOKENS };
enum class Pooling { NONE, MEAN, LAST, CONCAT };

// How one side, document or query, becomes vectors.
struct Side {
    std::string prompt;
    Slots slots = Slots::CONSTANT;
    std::optional<int64_t> num_vectors;
    SlotPositions slot_positions = SlotPositions::ZERO;
    bool prompt_end = true;  // the prompt's last position gives the first vector
    std::optional<int64_t> latent_token_id;
    std::optional<std::vector<int64_t>> slot_rows;  // first, count
    int64_t unread_slots = 0;  // learned ones before those that give vectors
    std::vector<int64_t> nested_budgets;
    Pooling pooling = Pooling::NONE;

    // The largest budget; none where only the model's context limits it.
    std::optional<int64_t> max_vectors() const;
    int64_t num_slots(int64_t num_vectors) const { return num_vectors - (prompt_end ? 1 : 0) + unread_slots; }
    // Throws Error(INVALID_ARGUMENT) if there can be no such number of vectors.
    void check_budget(int64_t budget) const;
    // Length of a vector at a budget, 0 being the full one, for states of length `dim`.
    int64_t vector_dim(int64_t dim, int64_t budget) const;
};

struct TensorSpec {
    std::string name, dtype;
    std::vector<std::string> axes;  // name of each axis; empty where it is a number
    std::vector<int64_t> shape;     // 0 where the axis has a name
};

struct Graph {
    std::string file;
    std::vector<std::string> data;
    std::vector<TensorSpec> inputs, outputs;

    bool takes(std::string_view input) const;
};

// Rows of hidden_size values; those of int8 are multiplied with the float32 in the file `scales`.
struct EmbeddingTable {
    std::string file, dtype;
    int64_t rows = 0;
    std::optional<std::string> scales;
};

struct FileRecord {
    int64_t size = 0;
    std::string sha256;
};

struct Manifest {
    std::string backbone, target, dtype;
    bool causal = false;  // the prompt's attention
    int64_t opset = 0, hidden_size = 0, dim = 0, max_sequence_length = 0, image_token_id = 0;
    Side document, query;
    ImageProcessing image;
    Positions positions;
    std::map<std::string, Graph> graphs;
    EmbeddingTable token_embeddings;
    std::optional<EmbeddingTable> slot_embeddings;
    std::string tokenizer, self_test_image, self_test_vectors;
    std::map<std::string, FileRecord> files;
    std::optional<std::string> upgraded_from;
    int64_t schema_version = 0;
    std::set<std::string> by_row;  // the graphs whose int8 weights meet activations with a range for each row

    // Whether the vision graph takes a part of a page: it is told the places of patches, or each tile is alone.
    bool reads_parts() const;

    // Throws Error(BUNDLE) that names the field which is unknown, missing, of another kind or out of range.
    static Manifest from_json(std::string_view text);
};

}  // namespace cembed
