#include "contract.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <set>
#include <tuple>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "manifest_schema.h"

namespace cembed {
namespace {

using Names = std::set<std::string>;
using Numbers = std::map<std::string, int64_t>;  // by the names that stand after = in TENSORS

[[noreturn]] void refuse(const std::string &why) { throw Error(BUNDLE, why); }

std::string list(const Names &names) {
    std::string text;
    for (const std::string &name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

Names without(const Names &names, const Names &others) {
    Names rest;
    std::set_difference(names.begin(), names.end(), others.begin(), others.end(), std::inserter(rest, rest.end()));
    return rest;
}

template <class T>
Names keys(const std::map<std::string, T> &values) {
    Names names;
    for (const auto &value : values) names.insert(value.first);
    return names;
}

std::vector<std::string> split(const std::string &text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

std::map<std::string, EmbeddingTable> tables_of(const Manifest &m) {
    std::map<std::string, EmbeddingTable> tables{{"token_embeddings", m.token_embeddings}};
    if (m.slot_embeddings) tables["slot_embeddings"] = *m.slot_embeddings;
    return tables;
}

// The files that the manifest's fields name.
Names named(const Manifest &m) {
    Names names{m.tokenizer, m.self_test_image, m.self_test_vectors};
    for (const auto &table : tables_of(m)) {
        names.insert(table.second.file);
        if (table.second.scales) names.insert(*table.second.scales);
    }
    for (const auto &graph : m.graphs) {
        names.insert(graph.second.file);
        names.insert(graph.second.data.begin(), graph.second.data.end());
    }
    return names;
}

// Before a file is hashed, or read at all.
void check_limit(const Manifest &m, const std::string &name, const std::string &what, int64_t limit) {
    if (const int64_t size = m.files.at(name).size; size > limit)
        refuse(name + " has " + std::to_string(size) + " bytes, more than any " + what + ": " + std::to_string(limit));
}

void check_files(const Manifest &m) {
    const Names listed = keys(m.files);
    Names different = without(named(m), listed);
    different.merge(without(listed, named(m)));
    if (!different.empty())
        refuse("the manifest lists " + list(different) + " but does not use it, or the reverse");
    check_limit(m, m.tokenizer, "tokenizer", schema::MAX_TOKENIZER);
    check_limit(m, m.self_test_image, "picture", schema::MAX_PICTURE);
    for (const auto &graph : m.graphs) check_limit(m, graph.second.file, "graph", schema::MAX_GRAPH);
}

void check_size(const Manifest &m, const std::string &file, const std::string &rows, int64_t expected) {
    const int64_t size = m.files.at(file).size;
    if (size == expected) return;
    refuse(file + " has " + std::to_string(size) + " bytes: " + rows + " of hidden_size, or of 1 for scales, take " +
           std::to_string(expected));
}

void check_scales(const Manifest &m) {
    for (const auto &[name, table] : tables_of(m)) {
        if ((table.dtype == "int8") != table.scales.has_value())
            refuse(name + " has dtype " + table.dtype + ": tables of int8, and no others, have scales");
    }
}

void check_sizes(const Manifest &m) {
    for (const auto &[name, table] : tables_of(m)) {
        const int64_t item = table.dtype == "float32" ? 4 : table.dtype == "float16" ? 2 : 1;
        check_size(m, table.file, name + ".rows", table.rows * m.hidden_size * item);
        if (table.scales) check_size(m, *table.scales, name + ".rows", table.rows * 4);
    }
}

size_t count(const std::string &text, const std::string &part) {
    size_t found = 0;
    for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
    return found;
}

void check_tiles(const ImageProcessing &image) {
    const Tiles &tiles = *image.tiles;
    const int64_t area = tiles.side * tiles.side;
    if (tiles.side % image.factor() || tiles.side % 2)
        refuse("image.tiles.side is " + std::to_string(tiles.side) + ": patch_size * merge_size must divide it, and 2");
    if (image.min_pixels != area || image.max_pixels > schema::MAX_TILES * area)
        refuse("image.min_pixels and max_pixels are not 1 to " + std::to_string(schema::MAX_TILES) + " tiles");
    for (const auto &[name, text, images] : {std::tuple("tile", tiles.tile, 1), std::tuple("row_end", tiles.row_end, 0),
                                             std::tuple("page", tiles.page, 1), std::tuple("alone", tiles.alone, 1)}) {
        if (count(text, "{image}") != size_t(images))
            refuse("image.tiles." + std::string(name) + " must contain {image} " + std::to_string(images) + " times");
    }
}

void check_image(const ImageProcessing &image) {
    const int64_t factor = image.factor(), side = std::llround(std::sqrt(double(image.max_pixels)));
    const std::string what = "image.max_pixels is " + std::to_string(image.max_pixels);
    if (factor * factor > image.max_pixels) refuse(what + ": a visual token has more");
    if (image.window_size % factor)
        refuse("image.window_size is " + std::to_string(image.window_size) + ", no multiple of a visual token");
    if (image.resize == Resize::FIXED && (side * side != image.max_pixels || side % factor))
        refuse(what + ", no square of visual tokens");
    if ((image.resize == Resize::TILES) != image.tiles.has_value()) refuse("image.tiles does not fit its resize");
    if (image.tiles) check_tiles(image);
}

void check_side(const Manifest &m, const std::string &name, const Side &side, const std::string &placeholder) {
    if (count(side.prompt, placeholder) != 1) refuse(name + ".prompt must contain " + placeholder + " exactly once");
    if (side.vector_dim(m.dim, 0) > schema::MAX_VECTOR)
        refuse(name + ".num_vectors is " + std::to_string(*side.num_vectors) + ": vectors of so many states are too long");
    const int64_t rows = m.slot_embeddings ? m.slot_embeddings->rows : 0;
    if (side.slot_rows && (*side.slot_rows)[0] + (*side.slot_rows)[1] > rows)
        refuse(name + ".slot_rows go beyond the " + std::to_string(rows) + " rows of slot_embeddings");
}

// A line of TENSORS.
struct Row {
    std::string graph, direction, name, group, dtypes;
    std::vector<std::string> axes;
};

std::vector<Row> rows_of(const std::string &graph, const std::string &direction) {
    std::vector<Row> rows;
    for (const char *line : schema::TENSORS) {
        std::istringstream words(line);
        Row row;
        words >> row.graph >> row.direction >> row.name >> row.group >> row.dtypes;
        row.axes.assign(std::istream_iterator<std::string>(words), {});
        if (row.graph == graph && row.direction == direction) rows.push_back(std::move(row));
    }
    return rows;
}

bool names(const Row &row, const std::string &name) {
    const size_t mark = row.name.find('#');
    if (mark == std::string::npos) return name == row.name;
    const std::string before = row.name.substr(0, mark), after = row.name.substr(mark + 1);
    if (name.size() <= before.size() + after.size() || name.compare(0, mark, before) != 0) return false;
    const size_t end = name.size() - after.size();
    return name.substr(end) == after && name.find_first_not_of("0123456789", mark) == end;
}

bool is_axis(const TensorSpec &tensor, size_t i, const std::string &needed, const Numbers &numbers) {
    if (tensor.shape[i] == 0) return tensor.axes[i] == needed;
    return needed == "*" || needed == std::to_string(tensor.shape[i]) ||
           (needed[0] == '=' && numbers.at(needed.substr(1)) == tensor.shape[i]);
}

bool fits(const Row &row, const TensorSpec &tensor, const Numbers &numbers) {
    const auto dtypes = split(row.dtypes, '|');
    if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) return false;
    if (tensor.axes.size() != row.axes.size()) return false;
    for (size_t i = 0; i < row.axes.size(); ++i) {
        const auto parts = split(row.axes[i], '|');
        const auto right = [&](const std::string &part) { return is_axis(tensor, i, part, numbers); };
        if (std::none_of(parts.begin(), parts.end(), right)) return false;
    }
    return true;
}

std::string needed(const Row &row, const Numbers &numbers) {
    std::string text = row.dtypes + " [";
    for (size_t i = 0; i < row.axes.size(); ++i) {
        const std::string &axis = row.axes[i];
        text += (i ? ", " : "") + (axis[0] == '=' ? std::to_string(numbers.at(axis.substr(1))) + " " : "") + axis;
    }
    return text + "]";
}

const Row &row_of(const std::string &where, const std::vector<Row> &rows, const TensorSpec &tensor,
                  const Numbers &numbers) {
    const auto row = std::find_if(rows.begin(), rows.end(), [&](const Row &one) { return names(one, tensor.name); });
    if (row == rows.end()) refuse(where + ": unknown '" + tensor.name.substr(0, 80) + "'");
    if (!fits(*row, tensor, numbers))
        refuse(where + ": " + tensor.name + " is of another type or shape: " + needed(*row, numbers) + " is needed");
    return *row;
}

void check_tensors(const std::string &where, const std::vector<Row> &rows, const std::vector<TensorSpec> &tensors,
                   const Numbers &numbers) {
    Names there, found, groups{"-"};
    for (const TensorSpec &tensor : tensors) {
        const Row &row = row_of(where, rows, tensor, numbers);
        if (!there.insert(tensor.name).second) refuse(where + ": " + tensor.name + " is there twice");
        found.insert(row.name);
        groups.insert(row.group);
    }
    for (const Row &row : rows) {
        if (groups.count(row.group) && !found.count(row.name)) refuse(where + ": " + row.name + " is missing");
    }
    if (rows[0].direction == "out" && tensors[0].name != rows[0].name)
        refuse(where + ": " + rows[0].name + " must be the first");
}

const schema::State *state_of(const std::string &past) {
    const auto named = [&](const schema::State &state) { return past.compare(0, std::strlen(state.past), state.past) == 0; };
    const auto *found = std::find_if(std::begin(schema::STATES), std::end(schema::STATES), named);
    return found == std::end(schema::STATES) ? nullptr : found;
}

bool is_present(const std::string &name) {
    const auto named = [&](const schema::State &state) {
        return name.compare(0, std::strlen(state.present), state.present) == 0;
    };
    return std::any_of(std::begin(schema::STATES), std::end(schema::STATES), named);
}

void check_step(const Manifest &m, const Graph &graph) {
    std::map<std::string, TensorSpec> past, present;  // by the names of the outputs
    std::set<std::pair<std::string, int64_t>> positions;
    for (const TensorSpec &tensor : graph.inputs) {
        if (!is_past(tensor.name)) continue;
        past[present_of(tensor.name)] = tensor;
        if (grows(tensor.name)) positions.insert({tensor.axes[2], tensor.shape[2]});
    }
    for (const TensorSpec &tensor : graph.outputs) {
        if (is_present(tensor.name)) present[tensor.name] = tensor;
    }
    const auto alike = [](const auto &one, const auto &other) {
        return one.first == other.first && one.second.dtype == other.second.dtype &&
               one.second.axes == other.second.axes && one.second.shape == other.second.shape;
    };
    if (!std::equal(past.begin(), past.end(), present.begin(), present.end(), alike))
        refuse("graphs.text_step: past_key_values or past_states and the present ones are not alike");
    if (positions.size() > 1) refuse("graphs.text_step: past_key_values hold different numbers of positions");
    const auto hidden = [](const TensorSpec &tensor) { return tensor.name == "hidden_states"; };
    if (m.dim != m.hidden_size && std::none_of(graph.outputs.begin(), graph.outputs.end(), hidden))
        refuse("graphs.text_step.outputs: hidden_states is missing, as dim is a projection's");
}

Numbers numbers_of(const Manifest &m) {
    const ImageProcessing &image = m.image;
    const int64_t side = image.window_size / image.factor() * image.merge_size;
    return {{"deepstack", deepstack_width(m)},
            {"image_features", m.hidden_size + deepstack_width(m)},
            {"hidden_size", m.hidden_size},
            {"dim", m.dim},
            {"positions.axes", m.positions.axes},
            {"image.max_pixels", image.input_patches()},
            {"image.patch_size", 3 * image.patch_size * image.patch_size},
            {"image.window_size", side * side}};
}

// Both text graphs are fed the same for each position.
void check_rows(const Manifest &m) {
    Names takers, others;
    for (const auto &[name, graph] : m.graphs) {
        if (name != "vision") (graph.takes(DEEPSTACK) ? takers : others).insert(name);
    }
    if (!takers.empty() && !others.empty())
        refuse("graphs." + *others.begin() + ".inputs: " + DEEPSTACK + " is missing, which " + *takers.begin() + " has");
}

void check_graphs(const Manifest &m) {
    Names needed{"vision"}, known;
    for (const Side *side : {&m.document, &m.query})
        needed.insert(side->slots == Slots::FEEDBACK ? "text_step" : "text");
    for (const char *line : schema::TENSORS) known.insert(split(line, ' ')[0]);
    if (const Names missing = without(needed, keys(m.graphs)); !missing.empty())
        refuse("graphs has no graph " + list(missing));
    if (const Names unknown = without(keys(m.graphs), known); !unknown.empty())
        refuse("graphs has an unknown graph " + list(unknown));
    const Numbers numbers = numbers_of(m);
    for (const auto &[name, graph] : m.graphs) {
        if (graph.file.size() < 5 || graph.file.compare(graph.file.size() - 5, 5, ".onnx") != 0)
            refuse("graphs." + name + ".file is " + graph.file + ": a graph is a file *.onnx");
        check_tensors("graphs." + name + ".inputs", rows_of(name, "in"), graph.inputs, numbers);
        check_tensors("graphs." + name + ".outputs", rows_of(name, "out"), graph.outputs, numbers);
    }
    check_rows(m);
    if (const auto step = m.graphs.find("text_step"); step != m.graphs.end()) check_step(m, step->second);
}

}  // namespace

int64_t deepstack_width(const Manifest &m) {
    int64_t widest = 0;
    for (const auto &[name, graph] : m.graphs) {
        for (const TensorSpec &tensor : graph.inputs) {
            if (tensor.name == DEEPSTACK && !tensor.shape.empty()) widest = std::max(widest, tensor.shape.back());
        }
    }
    return std::min(widest / m.hidden_size, schema::MAX_DEEPSTACK) * m.hidden_size;
}

bool is_past(const std::string &name) { return state_of(name) != nullptr; }

std::string present_of(const std::string &past) {
    const schema::State &state = *state_of(past);
    return state.present + past.substr(std::strlen(state.past));
}

bool grows(const std::string &past) { return state_of(past)->grows; }

void check_contract(const Manifest &manifest) {
    check_scales(manifest);
    check_files(manifest);
    check_sizes(manifest);
    check_image(manifest.image);
    check_side(manifest, "document", manifest.document, "{image}");
    check_side(manifest, "query", manifest.query, "{text}");
    check_graphs(manifest);
    if (manifest.image.skip_blank && !manifest.reads_parts())
        refuse("image.skip_blank is true: the vision graph takes whole pages only");
}

}  // namespace cembed
