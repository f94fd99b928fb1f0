#include "bundle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include <dirent.h>

#include "error.h"

namespace cembed {
namespace {

constexpr const char *MANIFEST = "manifest.json";
constexpr int64_t MAX_MANIFEST = 1 << 26, MAX_TOKENIZER = 1 << 28;

float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = 0;
    if (exponent == 31) {
        value = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    } else {
        value = std::ldexp(float(fraction + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
    }
    return bits & 0x8000 ? -value : value;
}

int64_t item_size(const std::string &dtype) { return dtype == "float32" ? 4 : dtype == "float16" ? 2 : 1; }

std::string list(const std::set<std::string> &names) {
    std::string text;
    for (const std::string &name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

std::set<std::string> without(const std::set<std::string> &names, const std::set<std::string> &others) {
    std::set<std::string> rest;
    std::set_difference(names.begin(), names.end(), others.begin(), others.end(), std::inserter(rest, rest.end()));
    return rest;
}

std::set<std::string> entries(const std::string &folder) {
    std::set<std::string> names;
    DIR *open = opendir(folder.c_str());
    if (open == nullptr) throw Error(BUNDLE, "cannot list " + folder + ": " + std::strerror(errno));
    while (const dirent *entry = readdir(open)) names.insert(entry->d_name);
    closedir(open);
    for (const char *name : {".", "..", MANIFEST}) names.erase(name);
    return names;
}

std::set<std::string> listed(const Manifest &manifest) {
    std::set<std::string> names;
    for (const auto &file : manifest.files) names.insert(file.first);
    return names;
}

std::vector<EmbeddingTable> tables_of(const Manifest &m) {
    std::vector<EmbeddingTable> tables{m.token_embeddings};
    if (m.slot_embeddings) tables.push_back(*m.slot_embeddings);
    return tables;
}

// The files that the manifest's fields name.
std::set<std::string> named(const Manifest &m) {
    std::set<std::string> names{m.tokenizer, m.self_test_image, m.self_test_vectors};
    for (const EmbeddingTable &table : tables_of(m)) {
        names.insert(table.file);
        if (table.scales && !table.scales->empty()) names.insert(*table.scales);
    }
    for (const auto &graph : m.graphs) {
        names.insert(graph.second.file);
        names.insert(graph.second.data.begin(), graph.second.data.end());
    }
    return names;
}

std::string read_manifest(const std::string &root) {
    try {
        return File(root + "/" + MANIFEST, BUNDLE).read(MAX_MANIFEST);
    } catch (const Error &error) {
        throw Error(BUNDLE, root + " is not a bundle: " + error.what());
    }
}

Manifest parse(const std::string &root, const std::string &text) {
    try {
        return Manifest::from_json(text);
    } catch (const Error &error) {
        throw Error(BUNDLE, root + ": " + error.what());
    }
}

}  // namespace

Table::Table(Mapping values, Mapping scales, std::string dtype, int64_t rows, int64_t width)
    : values_(std::move(values)),
      scales_(std::move(scales)),
      dtype_(std::move(dtype)),
      rows_(rows),
      width_(width) {}

void Table::read(int64_t row, float *to) const {
    if (row < 0 || row >= rows_)
        throw Error(BUNDLE, "there is no row " + std::to_string(row) + " in a table of " + std::to_string(rows_));
    const uint8_t *from = values_.data() + row * width_ * item_size(dtype_);
    if (dtype_ == "float32") {
        std::memcpy(to, from, size_t(width_) * 4);
    } else if (dtype_ == "float16") {
        const auto *halves = reinterpret_cast<const uint16_t *>(from);
        std::transform(halves, halves + width_, to, half_to_float);
    } else {
        const float scale = reinterpret_cast<const float *>(scales_.data())[row];
        const auto *levels = reinterpret_cast<const int8_t *>(from);
        std::transform(levels, levels + width_, to, [scale](int8_t level) { return float(level) * scale; });
    }
}

Bundle::Bundle(std::string root) : Bundle(root, read_manifest(root)) {}

Bundle::Bundle(std::string root, const std::string &text)
    : manifest(parse(root, text)),
      root_(std::move(root)),
      hash_(sha256(text)) {
    check_references();
    check_listing();
}

void Bundle::check_references() const {
    const Manifest &m = manifest;
    std::set<std::string> graphs, needed{"vision"};
    for (const auto &graph : m.graphs) graphs.insert(graph.first);
    for (const Side *side : {&m.document, &m.query})
        needed.insert(side->slots == Slots::FEEDBACK ? "text_step" : "text");
    if (const auto missing = without(needed, graphs); !missing.empty())
        throw Error(BUNDLE, root_ + ": the manifest has no graph " + list(missing));
    for (const EmbeddingTable &table : tables_of(m)) {
        if ((table.dtype == "int8") != (table.scales && !table.scales->empty()))
            throw Error(BUNDLE, root_ + ": tables of int8, and no others, have scales");
    }
    const int64_t rows = m.slot_embeddings ? m.slot_embeddings->rows : 0;
    for (const Side *side : {&m.document, &m.query}) {
        if (side->slot_rows && ((*side->slot_rows)[0] > rows || (*side->slot_rows)[1] > rows - (*side->slot_rows)[0]))
            throw Error(BUNDLE,
                        root_ + ": the manifest names slot rows behind the " + std::to_string(rows) + " there are");
    }
    auto different = without(named(m), listed(m));
    different.merge(without(listed(m), named(m)));
    if (!different.empty())
        throw Error(BUNDLE, root_ + ": the manifest lists " + list(different) + " but does not use it, or the reverse");
}

void Bundle::check_listing() const {
    const auto wanted = listed(manifest);
    for (const std::string &name : wanted) {
        if (name.empty() || name == "." || name == ".." ||
            name.find_first_of(std::string("/\0", 2)) != std::string::npos)
            throw Error(BUNDLE, root_ + ": the manifest names '" + name + "', which is not a plain file name");
    }
    const auto found = entries(root_);
    if (const auto missing = without(wanted, found); !missing.empty())
        throw Error(BUNDLE, root_ + ": missing " + list(missing) + ": the bundle is incomplete, copy it again");
    if (const auto extra = without(found, wanted); !extra.empty())
        throw Error(BUNDLE, root_ + ": " + list(extra) + " is not in the manifest: remove it or export again");
    for (const auto &[name, record] : manifest.files) {
        const File file(root_ + "/" + name, BUNDLE);
        if (file.size() != record.size) {
            throw Error(BUNDLE, root_ + "/" + name + " has " + std::to_string(file.size()) +
                                    " bytes, the manifest says " + std::to_string(record.size) +
                                    ": the file is damaged, copy the bundle again");
        }
    }
}

std::string Bundle::path(const std::string &name) {
    const auto record = manifest.files.find(name);
    if (record == manifest.files.end()) throw Error(BUNDLE, root_ + ": the manifest does not list '" + name + "'");
    std::string path = root_ + "/" + name;
    const std::lock_guard<std::mutex> guard(lock_);
    if (!verified_.count(name)) {
        if (sha256(File(path, BUNDLE)) != record->second.sha256)
            throw Error(BUNDLE, path + " does not match its sha256: it is damaged, copy it again");
        verified_.insert(name);
    }
    return path;
}

const Graph &Bundle::graph(const std::string &name) const {
    const auto graph = manifest.graphs.find(name);
    if (graph == manifest.graphs.end()) throw Error(BUNDLE, root_ + " has no graph '" + name + "'");
    return graph->second;
}

std::string Bundle::graph_path(const std::string &name) {
    for (const std::string &data : graph(name).data) path(data);
    return path(graph(name).file);
}

std::string Bundle::read(const std::string &name) { return File(path(name), BUNDLE).read(MAX_TOKENIZER); }

Table Bundle::table(const EmbeddingTable &spec) {
    const int64_t width = manifest.hidden_size;
    Mapping values = map(spec.file, spec.rows * width * item_size(spec.dtype));
    Mapping scales = spec.scales && !spec.scales->empty() ? map(*spec.scales, spec.rows * 4) : Mapping();
    return {std::move(values), std::move(scales), spec.dtype, spec.rows, width};
}

Mapping Bundle::map(const std::string &name, int64_t size) {
    const File file(path(name), BUNDLE);
    if (file.size() != size)
        throw Error(BUNDLE, root_ + "/" + name + ": such a table takes " + std::to_string(size) + " bytes");
    return Mapping(file, size);
}

}  // namespace cembed
