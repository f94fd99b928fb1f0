#include "bundle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include <dirent.h>
#include <sys/stat.h>

#include "contract.h"
#include "error.h"
#include "external_data.h"
#include "graph_check.h"
#include "manifest_schema.h"
#include "trust.h"

namespace cembed {
namespace {

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
    for (const char *name : {".", "..", schema::MANIFEST, schema::DIGEST, schema::SIGNATURES}) names.erase(name);
    return names;
}

std::set<std::string> listed(const Manifest &manifest) {
    std::set<std::string> names;
    for (const auto &file : manifest.files) names.insert(file.first);
    return names;
}

std::string read_manifest(const std::string &root) {
    try {
        return File(root + "/" + schema::MANIFEST, BUNDLE).read(schema::MAX_MANIFEST);
    } catch (const Error &error) {
        throw Error(BUNDLE, root + " is not a bundle: " + error.what());
    }
}

// Read once: what is trusted is what is parsed.
std::string trusted_manifest(const std::string &root, const std::string &trusted) {
    std::string text = read_manifest(root);
    check_trust(root, text, trusted);
    return text;
}

bool exists(const std::string &path) {
    struct stat status{};
    return lstat(path.c_str(), &status) == 0;
}

// The line of manifest.sha256 for a manifest, as sha256sum writes it.
std::string digest_line(std::string_view text) { return sha256(text) + "  " + schema::MANIFEST + "\n"; }

bool is_line(std::string_view line, const std::string &like) {
    return line.size() == like.size() && line.substr(64) == std::string_view(like).substr(64) &&
           line.substr(0, 64).find_first_not_of("0123456789abcdef") == line.npos;
}

// Whether there is a digest. One that is being upgraded has a line for the manifest after, too.
bool check_digest(const std::string &root, const std::string &text) {
    const std::string path = root + "/" + schema::DIGEST, line = digest_line(text);
    if (!exists(path)) return false;
    const std::string known = File(path, BUNDLE).read(2 * int64_t(line.size()));
    const std::string first = known.substr(0, line.size()), second = known.substr(first.size());
    const bool two = is_line(first, line) && is_line(second, line);
    if (known != line && !(two && (first == line || second == line)))
        throw Error(BUNDLE, root + "/" + schema::MANIFEST + " does not match " + schema::DIGEST +
                                ": one of them is damaged, copy the bundle again");
    return true;
}

// Where `text` goes on after a word, and blanks if any; npos if it does not.
size_t after(std::string_view text, size_t at, std::string_view word) {
    if (at == text.npos || text.substr(at, word.size()) != word) return text.npos;
    return std::min(text.find_first_not_of(" \t\r\n", at + word.size()), text.size());
}

// The hash of a bundle: the sha256 of its manifest, and after an upgrade still that of the manifest before, whose bytes
// are made again here.
std::string hash_of(const std::string &root, const std::string &text, const Manifest &manifest) {
    if (!manifest.upgraded_from) return sha256(text);
    const std::string mark = "\"upgraded_from\": \"" + *manifest.upgraded_from + "\", ";
    std::string old = text;
    const size_t at = text.find(mark);
    if (at != std::string::npos) old.erase(at, mark.size());
    const size_t version = after(old, after(old, at, "\"schema_version\""), ":");
    if (version < old.size() && old[version] == '2') old[version] = '1';
    if (sha256(old) != *manifest.upgraded_from)
        throw Error(BUNDLE, root + ": " + schema::MANIFEST +
                                ": upgraded_from is not the hash of the manifest that this was made from");
    return *manifest.upgraded_from;
}

Manifest parse(const std::string &root, const std::string &text) {
    const bool has_digest = check_digest(root, text);
    try {
        Manifest manifest = Manifest::from_json(text);
        if (!has_digest && manifest.schema_version != schema::OLDEST)
            throw Error(BUNDLE, std::string("missing ") + schema::DIGEST + ": the bundle is incomplete, copy it again");
        check_contract(manifest);
        return manifest;
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

Bundle::Bundle(const std::string &root, const std::string &trusted)
    : Bundle(Read{root, trusted_manifest(root, trusted)}) {}

Bundle::Bundle(const Read &read)
    : manifest(parse(read.root, read.text)),
      root_(read.root),
      hash_(hash_of(root_, read.text, manifest)) {
    check_listing();
}

void Bundle::check_listing() const {
    const auto needed = listed(manifest);
    const auto found = entries(root_);
    if (const auto missing = without(needed, found); !missing.empty())
        throw Error(BUNDLE, root_ + ": missing " + list(missing) + ": the bundle is incomplete, copy it again");
    if (const auto extra = without(found, needed); !extra.empty())
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
    if (hash_of_file(name, path).get() != record->second.sha256)
        throw Error(BUNDLE, path + " does not match its sha256: it is damaged, copy it again");
    return path;
}

// Of each file once, by whoever asks first; of several files at a time.
std::shared_future<std::string> Bundle::hash_of_file(const std::string &name, const std::string &path) {
    const std::lock_guard<std::mutex> guard(lock_);
    auto &hash = hashes_[name];
    if (!hash.valid()) hash = std::async(std::launch::deferred, [path] { return sha256(File(path, BUNDLE)); }).share();
    return hash;
}

const Graph &Bundle::graph(const std::string &name) const {
    const auto graph = manifest.graphs.find(name);
    if (graph == manifest.graphs.end()) throw Error(BUNDLE, root_ + " has no graph '" + name + "'");
    return graph->second;
}

std::string Bundle::graph_path(const std::string &name) {
    const Graph &found = graph(name);
    std::call_once(inspected_, [this] { inspect(); });
    return path(found.file);
}

// All graphs, before an engine runs one of them.
void Bundle::inspect() {
    for (const auto &[name, graph] : manifest.graphs) {
        std::map<std::string, int64_t> sizes;
        for (const std::string &data : graph.data) sizes[data] = manifest.files.at(data).size;
        const std::string file = path(graph.file);
        check_external_data(file, sizes);
        check_graph(file, graph, sizes);
    }
}

void Bundle::verify_weights(const std::string &name) {
    for (const std::string &data : graph(name).data) path(data);
}

std::string Bundle::read(const std::string &name) { return File(path(name), BUNDLE).read(schema::MAX_TOKENIZER); }

Table Bundle::table(const EmbeddingTable &spec) {
    const int64_t width = manifest.hidden_size;
    Mapping values = map(spec.file, spec.rows * width * item_size(spec.dtype));
    Mapping scales = spec.scales ? map(*spec.scales, spec.rows * 4) : Mapping();
    return {std::move(values), std::move(scales), spec.dtype, spec.rows, width};
}

Mapping Bundle::map(const std::string &name, int64_t size) {
    const File file(path(name), BUNDLE);
    if (file.size() != size)
        throw Error(BUNDLE, root_ + "/" + name + ": such a table takes " + std::to_string(size) + " bytes");
    return Mapping(file, size);
}

}  // namespace cembed
