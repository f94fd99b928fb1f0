// An index as it was when it was opened, read only, as runtime/index/reader.py and runtime/index/search.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../maxsim.h"
#include "files.h"
#include "filter.h"
#include "log.h"

namespace cembed {

// The row of a storage type, which must be known.
const maxsim::StorageType &storage_of(const std::string &name);

// What CURRENT says: storage types (tiers), the most exact first.
struct Current {
    std::string index, bundle;
    int64_t dim = 0;
    std::vector<std::string> tiers;
    std::vector<int64_t> segments;

    // Throws Error(INDEX): damaged, of a later version, not of an index.
    static Current decode(const std::string &raw);
    const maxsim::StorageType &storage(size_t tier) const { return storage_of(tiers[tier]); }
    bool operator==(const Current &other) const;
};

struct Hit {
    float score;
    int32_t page;  // in its source, from 1 on
    std::string id, source, metadata;
};

// The pages of a segment. Bytes of a page are compared with their CRC when they are first used.
class Segment {
  public:
    // Throws Error(INDEX): damaged, or files are missing.
    Segment(const std::string &folder, const Current &current, int64_t number, bool last);

    // Leaves out the pages with these serial numbers, which are in order.
    void remove(const std::vector<int64_t> &serials);
    void add_removed(std::vector<int64_t> &serials) const;

    int64_t size() const { return int64_t(rows_.size()); }
    int64_t vectors() const;
    int64_t live() const { return int64_t(live_.size()); }
    // Live pages that a filter takes. Throws Error(INDEX): metadata is damaged.
    std::vector<int64_t> choose(const Filter &filter) const;
    // Throws Error(INDEX) if one of `which` is damaged in a tier.
    maxsim_pages pages(size_t tier, const std::vector<int64_t> &which);
    // Gives back memory of a tier that was used so far.
    void release(size_t tier) const { tiers_[tier].map.release(); }
    std::string id(int64_t page) const;
    // Throws Error(INDEX): its metadata is damaged.
    Hit hit(int64_t page, float score) const;

  private:
    [[noreturn]] void damaged(const std::string &why) const;

    struct Tier {
        std::string path;
        const maxsim::StorageType *storage = nullptr;
        int64_t end = 0;
        Mapping map;
        std::vector<int64_t> starts;
        std::vector<uint32_t> crcs;
        std::vector<std::atomic<bool>> checked;
    };

    int64_t page_size(const Tier &tier, int64_t page) const;
    void add(const Commit &commit);
    void open_tiers();

    const int64_t dim_;
    const std::string path_;  // of its log
    std::vector<Tier> tiers_;
    std::vector<Commit> commits_;
    std::vector<int64_t> serials_, live_;
    std::vector<int32_t> rows_;
    std::vector<float> scales_, ones_;
    std::vector<std::pair<size_t, size_t>> places_;  // commit, and place in it
};

class Index {
  public:
    // Throws Error(INDEX): no index, or a damaged one.
    explicit Index(std::string folder);

    const Current &current() const { return current_; }
    int64_t size() const;
    // The best pages for query vectors [rows, dim], best first, of equal ones the one added first. Throws Error.
    std::vector<Hit> search(const float *query, int32_t rows, int64_t top, int threads, const Filter &filter);

  private:
    struct Stage {
        size_t tier;
        int64_t keep;
    };
    struct Ranked {
        float score;
        size_t segment;
        int64_t page;
    };

    void load();
    std::vector<Stage> make_plan(int64_t top, int64_t pages) const;
    std::vector<Ranked> run_stage(const float *query, int32_t rows, Stage stage, int threads,
                                  std::vector<std::vector<int64_t>> &which);

    const std::string folder_;
    Current current_;
    std::vector<std::unique_ptr<Segment>> segments_;
};

}  // namespace cembed
