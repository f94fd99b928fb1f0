// libFuzzer over what the library reads from a bundle and an index, by the first byte: a manifest, a CURRENT, a log's
// payload, where a graph's data is, a graph. Sums that would stop every mutation are made right first; `make fuzz`.
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "../../runtime/native/lib/contract.h"
#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/external_data.h"
#include "../../runtime/native/lib/graph_check.h"
#include "../../runtime/native/lib/index.h"
#include "../../runtime/native/lib/log.h"
#include "../../runtime/native/lib/manifest.h"

namespace {

using namespace cembed;

constexpr size_t TIERS = 2;
constexpr char NAME[] = "fuzz";

template <class T>
void put(std::string &record, size_t at, T value) {
    std::memcpy(&record[at], &value, sizeof value);
}

// A record of one commit with this payload, preceded by its counts.
std::string log_of(std::string payload) {
    payload.resize(std::max<size_t>(payload.size(), 2));
    const uint32_t pages = uint8_t(payload[0]), removed = uint8_t(payload[1]);
    payload.erase(0, 2);
    const uint32_t seed = crc32(std::string(NAME) + "/1");
    std::string header(
        "\x8e"
        "cembed\n",
        8),
        padded = payload;
    padded.resize(size_t(aligned(int64_t(payload.size()))));
    header.resize(64);
    put(header, 8, uint32_t(1));
    put(header, 12, pages);
    put(header, 16, removed);
    put(header, 20, crc32(padded, seed));
    put(header, 32, uint64_t(payload.size()));
    put(header, 60, crc32(header.substr(0, 60), seed));
    return header + padded;
}

// A file of this process, with other bytes each time.
struct OneFile {
    const std::string path = std::filesystem::temp_directory_path() / ("cembed-fuzz-" + std::to_string(getpid()));
    ~OneFile() { std::filesystem::remove(path); }
};

void read_log(const std::string &payload) {
    static const OneFile place;
    std::ofstream(place.path, std::ios::binary) << log_of(payload);
    const Log log(File(place.path, INDEX), NAME, 1, TIERS);
    for (const Commit &commit : log.commits) {
        for (size_t i = 0; i < commit.ids.size(); ++i) (void)commit.ids[i];
        for (const int32_t source : commit.source) (void)commit.sources[size_t(source)];
        for (const int32_t metadatum : commit.metadatum) (void)commit.metadata[size_t(metadatum)];
    }
}

void read_current(const std::string &text) {
    char crc[16];
    std::snprintf(crc, sizeof crc, " %08x\n", crc32(text));
    (void)Current::decode(text + crc);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) try {
    if (size == 0) return 0;
    const std::string rest(reinterpret_cast<const char *>(data) + 1, size - 1);
    const std::map<std::string, int64_t> sizes = {{"text.data", 1 << 20}};
    switch (data[0] % 8) {
        case 0: check_contract(Manifest::from_json(rest)); break;
        case 1: read_current(rest); break;
        case 2: read_log(rest); break;
        case 3: check_external_bytes(rest, sizes); break;
        default: check_model(rest, Graph{}, sizes);
    }
    return 0;
} catch (const cembed::Error &) {
    return 0;
}
