// The C interface: handles, codes and messages around the classes; no exception goes beyond it.
#include "../include/cembed.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../maxsim.h"
#include "embedder.h"
#include "error.h"
#include "finite.h"
#include "index.h"
#include "manifest_schema.h"
#include "state.h"
#include "unicode.h"

using namespace cembed;

static_assert(int(INVALID_ARGUMENT) == CEMBED_ARGUMENT && int(BUNDLE) == CEMBED_BUNDLE && int(ENGINE) == CEMBED_ENGINE &&
                  int(INDEX) == CEMBED_INDEX && int(MEMORY) == CEMBED_MEMORY && int(CAPACITY) == CEMBED_CAPACITY &&
                  int(INTERNAL) == CEMBED_INTERNAL,
              "codes are those of cembed.h");

struct cembed_bundle {
    std::shared_ptr<Embedder> embedder;
};

struct cembed_state {
    std::shared_ptr<Embedder> embedder;  // before the state, which it outlives
    State state;
};

struct cembed_index {
    Index index;
};

namespace {

// What cembed_hits points to.
struct Found {
    std::vector<Hit> found;
    std::vector<cembed_hit> hits;
};

// Unless the environment says otherwise, ONNX Runtime is told, before it loads, not to report and to keep no file of it.
// Here and not when a bundle is opened: other threads may read the environment by then.
__attribute__((constructor)) void turn_reports_off() { setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

thread_local char message[1024];

bool is_utf8(const char *text) noexcept try {
    unicode::check(text);
    return true;
} catch (...) {
    return false;
}

// One line of UTF-8. What an engine quotes of a damaged file may be none, and then stays in ASCII only.
cembed_status say(int code, const char *what) {
    size_t size = std::min(std::strlen(what), sizeof message - 1);
    while (what[size] && size && (what[size] & 0xC0) == 0x80) --size;
    std::replace_copy_if(what, what + size, message, [](char c) { return c >= 0 && c < ' '; }, ' ');
    message[size] = 0;
    if (!is_utf8(message)) std::replace_if(message, message + size, [](char c) { return (c & 0x80) != 0; }, '?');
    return cembed_status(code);
}

// Runs `call`; what it throws becomes a code and this thread's message.
template <class Call>
cembed_status guarded(const Call &call) noexcept try {
    message[0] = 0;
    call();
    return CEMBED_OK;
} catch (const Error &error) {
    return say(error.code, error.what());
} catch (const std::bad_alloc &) {
    return say(MEMORY, "there is not enough memory");
} catch (const std::length_error &) {
    return say(MEMORY, "there is not enough memory");
} catch (const std::exception &error) {
    return say(INTERNAL, error.what());
} catch (...) {
    return say(INTERNAL, "an unknown exception");
}

void require(bool right, const char *what) {
    if (!right) throw Error(INVALID_ARGUMENT, what);
}

void require_version(uint32_t version) {
    if (version == CEMBED_ABI_VERSION) return;
    throw Error(INVALID_ARGUMENT, "compiled for version " + std::to_string(version) + " of cembed.h, the library has " +
                                      std::to_string(CEMBED_ABI_VERSION) + ": compile again");
}

std::string text_or(const char *text, const char *otherwise) { return text == nullptr ? otherwise : text; }

Settings settings_of(const cembed_options &options) {
    require_version(options.abi_version);
    require(options.threads >= 0 && options.max_visual_tokens >= 0, "threads and max_visual_tokens are not below 0");
    Settings settings;
    settings.engine.provider = text_or(options.provider, "CPUExecutionProvider");
    settings.engine.library = text_or(options.onnxruntime, "");
    settings.engine.threads = options.threads;
    settings.engine.mapped_weights = options.mapped_weights != 0;
    settings.max_visual_tokens = options.max_visual_tokens;
    require(-1 <= options.skip_blank && options.skip_blank <= 1, "skip_blank is -1, 0 or 1");
    if (options.skip_blank != 0) settings.skip_blank = options.skip_blank > 0;
    if (options.state_memory != 0) settings.state_memory = int64_t(std::min<uint64_t>(options.state_memory, INT64_MAX));
    return settings;
}

void open_bundle(const char *path, const char *trusted, const cembed_options *options, cembed_bundle **bundle) {
    require(path != nullptr && options != nullptr && bundle != nullptr,
            "null where path, options or bundle are needed");
    *bundle = nullptr;
    Settings settings = settings_of(*options);
    settings.trusted = trusted;
    *bundle = new cembed_bundle{std::make_shared<Embedder>(path, settings)};
}

Rgb rgb_of(const cembed_image *image) {
    require(image != nullptr && image->pixels != nullptr, "there is no image");
    return {image->pixels, image->width, image->height, image->stride};
}

std::string_view view_of(const char *text, size_t length) {
    require(text != nullptr || length == 0, "there is no query");
    return {text == nullptr ? "" : text, length};
}

Budget budget_of(const cembed_budget *budget) {
    if (budget == nullptr) return {};
    return {budget->num_vectors, budget->dim, budget->loop != 0};
}

// Hands vectors over, into the caller's memory or the library's.
void give(const Vectors &made, cembed_vectors *to) {
    to->rows = size_t(made.rows);
    to->dim = size_t(made.dim);
    const size_t size = made.values.size();
    if (to->data != nullptr && to->capacity < size && !to->owned)
        throw Error(CAPACITY,
                    std::to_string(size) + " floats are needed, the buffer has " + std::to_string(to->capacity));
    if (to->data == nullptr || to->capacity < size) {
        auto *grown = static_cast<float *>(std::realloc(to->data, std::max<size_t>(size, 1) * sizeof(float)));
        if (grown == nullptr) throw std::bad_alloc();
        to->data = grown;
        to->capacity = size;
        to->owned = 1;
    }
    if (size) std::memcpy(to->data, made.values.data(), size * sizeof(float));
}

template <class MakePrompt>
void embed(cembed_bundle *bundle, bool query, const cembed_budget *budget, cembed_vectors *vectors,
           const MakePrompt &make) {
    require(bundle != nullptr && vectors != nullptr, "null where a bundle or vectors are needed");
    Embedder &embedder = *bundle->embedder;
    const Side &side = query ? embedder.manifest.query : embedder.manifest.document;
    embedder.check(side, budget_of(budget));
    give(embedder.embed(side, make(embedder), budget_of(budget)), vectors);
}

template <class MakePrompt>
void start(cembed_bundle *bundle, bool query, int32_t max_vectors, cembed_state **state, const MakePrompt &make) {
    require(bundle != nullptr && state != nullptr, "null where a bundle or a place for a state is needed");
    *state = nullptr;
    const auto &embedder = bundle->embedder;
    const Side &side = query ? embedder->manifest.query : embedder->manifest.document;
    const int64_t room = State::room(side, max_vectors);
    *state = new cembed_state{embedder, State(*embedder, side, make(*embedder), room, true)};
}

int threads_or_all(int32_t threads) {
    require(threads >= 0, "threads is below 0");
    return threads ? threads : int(std::max(1u, std::thread::hardware_concurrency()));
}

void check_query(const float *query, int32_t rows, int32_t dim) {
    require(query != nullptr && rows >= 1 && dim >= 1, "a query of at least one row and one component is needed");
    if (!all_finite(query, int64_t(rows) * dim))
        throw Error(INVALID_ARGUMENT, not_finite("the query", query, dim));
}

maxsim_array array_of(const float *vectors, int64_t rows, int32_t dim) {
    return {vectors, rows, int64_t(dim) * 4, 4, MAXSIM_F32};
}

// The kernels say which page is the first that is not finite.
void score(const float *query, int32_t rows, int32_t dim, const float *pages, const int32_t *page_rows, size_t count,
           int threads, float *scores) {
    std::vector<maxsim_array> arrays;
    for (size_t i = 0; i < count; ++i) {
        require(page_rows[i] >= 1, "a page has no vectors");
        require(page_rows[i] <= MAXSIM_MOST_ROWS, "a page has too many vectors");
        arrays.push_back(array_of(pages, page_rows[i], dim));
        pages += int64_t(page_rows[i]) * dim;
    }
    const maxsim_array asked = array_of(query, rows, dim);
    const int64_t wrong = maxsim_arrays(&asked, 1, dim, arrays.data(), int64_t(count), threads, scores);
    if (wrong == -1) throw std::bad_alloc();
    if (wrong == int64_t(count)) return;
    const auto *from = static_cast<const float *>(arrays.at(size_t(wrong)).data);
    throw Error(INVALID_ARGUMENT, not_finite("page " + std::to_string(wrong), from, dim));
}

}  // namespace

cembed_status cembed_open(const char *path, const cembed_options *options, cembed_bundle **bundle) {
    return guarded([&] { open_bundle(path, "", options, bundle); });
}

cembed_status cembed_open_trusted(const char *path, const char *trusted, const cembed_options *options,
                                  cembed_bundle **bundle) {
    return guarded([&] {
        require(trusted != nullptr && *trusted, "there is no key to trust");
        open_bundle(path, trusted, options, bundle);
    });
}

void cembed_close(cembed_bundle *bundle) { delete bundle; }

cembed_status cembed_get_info(const cembed_bundle *bundle, cembed_info *info) {
    return guarded([&] {
        require(bundle != nullptr && info != nullptr, "null where a bundle or an info is needed");
        const Manifest &m = bundle->embedder->manifest;
        const auto vectors = [](const Side &side) {
            return int32_t(side.num_vectors && side.pooling != Pooling::NONE ? 1 : side.num_vectors.value_or(0));
        };
        *info = {bundle->embedder->bundle.hash().c_str(),
                 m.backbone.c_str(),
                 vectors(m.document),
                 int32_t(m.document.vector_dim(m.dim, 0)),
                 vectors(m.query),
                 int32_t(m.query.vector_dim(m.dim, 0)),
                 int32_t(bundle->embedder->image.max_visual_tokens())};
    });
}

cembed_status cembed_load(cembed_bundle *bundle, int32_t pages, int32_t queries) {
    return guarded([&] {
        require(bundle != nullptr, "null where a bundle is needed");
        Embedder &embedder = *bundle->embedder;
        const Manifest &m = embedder.manifest;
        const auto text = [](const Side &side) { return side.slots == Slots::FEEDBACK ? "text_step" : "text"; };
        std::future<void> vision;  // opened meanwhile: each graph is packed by one thread
        if (pages) vision = std::async(std::launch::async, [&embedder] { embedder.engine("vision"); });
        if (queries) embedder.engine(text(m.query));
        if (pages) embedder.engine(text(m.document));
        if (pages) vision.get();
    });
}

cembed_status cembed_embed_image(cembed_bundle *bundle, const cembed_image *image, const cembed_budget *budget,
                                 cembed_vectors *vectors) {
    return guarded([&] {
        embed(bundle, false, budget, vectors, [&](Embedder &embedder) { return embedder.document(rgb_of(image)); });
    });
}

cembed_status cembed_embed_query(cembed_bundle *bundle, const char *text, size_t length, const cembed_budget *budget,
                                 cembed_vectors *vectors) {
    return guarded([&] {
        embed(bundle, true, budget, vectors, [&](Embedder &embedder) { return embedder.query(view_of(text, length)); });
    });
}

void cembed_vectors_free(cembed_vectors *vectors) {
    if (vectors == nullptr) return;
    if (vectors->owned) std::free(vectors->data);
    *vectors = {};
}

cembed_status cembed_start_image(cembed_bundle *bundle, const cembed_image *image, int32_t max_vectors,
                                 cembed_state **state) {
    return guarded([&] {
        start(bundle, false, max_vectors, state, [&](Embedder &embedder) { return embedder.document(rgb_of(image)); });
    });
}

cembed_status cembed_start_query(cembed_bundle *bundle, const char *text, size_t length, int32_t max_vectors,
                                 cembed_state **state) {
    return guarded([&] {
        start(bundle, true, max_vectors, state,
              [&](Embedder &embedder) { return embedder.query(view_of(text, length)); });
    });
}

cembed_status cembed_extend(cembed_state *state, int32_t num_vectors, cembed_vectors *vectors) {
    return guarded([&] {
        require(state != nullptr && vectors != nullptr, "null where a state or vectors are needed");
        give(state->state.extend(num_vectors), vectors);
    });
}

void cembed_state_close(cembed_state *state) { delete state; }

cembed_status cembed_maxsim(const float *query, int32_t rows, int32_t dim, const float *pages, const int32_t *page_rows,
                            size_t count, int32_t threads, float *scores) {
    return guarded([&] {
        check_query(query, rows, dim);
        if (count == 0) return;
        require(pages != nullptr && page_rows != nullptr && scores != nullptr, "null where pages or scores are needed");
        score(query, rows, dim, pages, page_rows, count, threads_or_all(threads), scores);
    });
}

cembed_status cembed_index_open(uint32_t abi_version, const char *path, cembed_index **index) {
    return guarded([&] {
        require_version(abi_version);
        require(path != nullptr && index != nullptr, "null where a path or a place for an index is needed");
        *index = nullptr;
        *index = new cembed_index{Index(path)};
    });
}

void cembed_index_close(cembed_index *index) { delete index; }

cembed_status cembed_index_get_info(const cembed_index *index, cembed_index_info *info) {
    return guarded([&] {
        require(index != nullptr && info != nullptr, "null where an index or an info is needed");
        const Current &current = index->index.current();
        *info = {current.bundle.c_str(), index->index.size(), int32_t(current.dim)};
    });
}

cembed_status cembed_index_search(cembed_index *index, const float *query, int32_t rows, int32_t dim, int32_t top,
                                  int32_t threads, cembed_hits *hits) {
    return cembed_index_search_filtered(index, query, rows, dim, top, threads, nullptr, hits);
}

cembed_status cembed_index_search_filtered(cembed_index *index, const float *query, int32_t rows, int32_t dim,
                                           int32_t top, int32_t threads, const cembed_filter *filter,
                                           cembed_hits *hits) {
    return guarded([&] {
        require(index != nullptr && hits != nullptr, "null where an index or hits are needed");
        *hits = {};
        check_query(query, rows, dim);
        require(top >= 1, "top is below 1");
        require(dim == index->index.current().dim, "the query has another dim than the index");
        auto owner = std::make_unique<Found>();
        owner->found = index->index.search(query, rows, top, threads_or_all(threads),
                                           filter == nullptr ? Filter() : Filter(filter->where, filter->source));
        for (const Hit &hit : owner->found)
            owner->hits.push_back({hit.score, hit.page, hit.id.c_str(), hit.source.c_str(), hit.metadata.c_str()});
        *hits = {owner->hits.data(), owner->hits.size(), owner.get()};
        owner.release();
    });
}

void cembed_hits_free(cembed_hits *hits) {
    if (hits == nullptr) return;
    delete static_cast<Found *>(hits->owner);
    *hits = {};
}

const char *cembed_error(void) { return message; }

uint32_t cembed_abi_version(void) { return CEMBED_ABI_VERSION; }

const char *cembed_version(void) { return CEMBED_VERSION; }

int32_t cembed_schema_version(void) { return schema::VERSION; }

const char *cembed_kernels(int32_t i) { return i < 0 ? nullptr : maxsim_kernels(i); }
