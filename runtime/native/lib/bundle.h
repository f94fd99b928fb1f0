// An opened bundle: its manifest, and its files, each compared with its sha256 before anything else reads it,
// but for weights: before anything is computed from them.
#pragma once

#include <cstdint>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "files.h"
#include "manifest.h"

namespace cembed {

// Rows of float32, float16 or int8, memory-mapped.
class Table {
  public:
    Table(Mapping values, Mapping scales, std::string dtype, int64_t rows, int64_t width);

    int64_t width() const { return width_; }
    // Writes row `row` as float32 [width]. Throws Error(BUNDLE) if there is none.
    void read(int64_t row, float *to) const;

  private:
    Mapping values_, scales_;
    std::string dtype_;
    int64_t rows_, width_;
};

class Bundle {
  public:
    // Throws Error(BUNDLE): no bundle, a signature that will not do (trust.h), a manifest that is none, does not match its digest or contradicts itself, files
    // that are missing, unlisted, links, of another size.
    Bundle(const std::string &root, const std::string &trusted);

    const Manifest manifest;
    const std::string &root() const { return root_; }
    const std::string &hash() const { return hash_; }

    // The path of a file, once its sha256 is the manifest's.
    std::string path(const std::string &name);
    // The path of a graph's ONNX file. All graphs hold what an export has, and their tensors are in their data files and
    // nowhere else; `verify_weights` has to be called before anything is computed from these.
    std::string graph_path(const std::string &name);
    void verify_weights(const std::string &name);
    const Graph &graph(const std::string &name) const;
    std::string read(const std::string &name);
    Table table(const EmbeddingTable &spec);

  private:
    struct Read {
        std::string root, text;
    };
    explicit Bundle(const Read &read);
    void check_listing() const;
    void inspect();
    std::shared_future<std::string> hash_of_file(const std::string &name, const std::string &path);
    Mapping map(const std::string &name, int64_t size);

    std::string root_, hash_;
    std::mutex lock_;
    std::map<std::string, std::shared_future<std::string>> hashes_;
    std::once_flag inspected_;
};

}  // namespace cembed
