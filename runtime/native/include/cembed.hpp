// cembed.h for C++17: handles that close themselves, results that hold a value or an error.
//
// With CEMBED_EXCEPTIONS defined before the include, Result::value() throws cembed::Failure where there is an error;
// without it nothing throws but the allocator, and value() of an error ends the program.
#ifndef CEMBED_HPP
#define CEMBED_HPP

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>
#ifdef CEMBED_EXCEPTIONS
#include <stdexcept>
#endif

#include "cembed.h"

namespace cembed {

struct Error {
    cembed_status status;
    std::string message;
};

#ifdef CEMBED_EXCEPTIONS
struct Failure : std::runtime_error {
    explicit Failure(const Error &error) : std::runtime_error(error.message), status(error.status) {}
    cembed_status status;
};
#endif

template <class T>
class Result {
  public:
    Result(T value) : value_(std::move(value)) {}
    Result(Error error) : value_(std::move(error)) {}

    explicit operator bool() const { return value_.index() == 0; }
    const Error &error() const { return *std::get_if<1>(&value_); }
    T &value() & { return *checked(); }
    T value() && { return std::move(*checked()); }
    T *operator->() { return checked(); }
    T &operator*() { return *checked(); }

  private:
    T *checked() {
        if (T *value = std::get_if<0>(&value_)) return value;
#ifdef CEMBED_EXCEPTIONS
        throw Failure(error());
#else
        std::abort();
#endif
    }

    std::variant<T, Error> value_;
};

// What is not owned: elements in a row.
template <class T>
struct Span {
    T *data = nullptr;
    size_t size = 0;

    T *begin() const { return data; }
    T *end() const { return data + size; }
    T &operator[](size_t i) const { return data[i]; }
};

// Float32 [rows, dim].
class Vectors {
  public:
    Vectors() = default;
    explicit Vectors(cembed_vectors made) : made_(made) {}
    ~Vectors() { cembed_vectors_free(&made_); }
    Vectors(Vectors &&other) noexcept { std::swap(made_, other.made_); }
    Vectors &operator=(Vectors &&other) noexcept {
        std::swap(made_, other.made_);
        return *this;
    }

    size_t rows() const { return made_.rows; }
    size_t dim() const { return made_.dim; }
    Span<const float> operator[](size_t row) const { return {made_.data + row * dim(), dim()}; }
    Span<const float> flat() const { return {made_.data, rows() * dim()}; }

  private:
    cembed_vectors made_{};
};

namespace detail {

inline Error last(cembed_status status) { return {status, cembed_error()}; }

struct Close {
    void operator()(cembed_bundle *handle) const { cembed_close(handle); }
    void operator()(cembed_state *handle) const { cembed_state_close(handle); }
    void operator()(cembed_index *handle) const { cembed_index_close(handle); }
};

// The wrapper T of the handle that `make` gives.
template <class T, class Handle, class Make>
Result<T> opened(const Make &make) {
    Handle *handle = nullptr;
    if (const cembed_status status = make(&handle)) return last(status);
    return T(handle);
}

template <class Fill>
Result<Vectors> filled(const Fill &fill) {
    cembed_vectors made{};
    if (const cembed_status status = fill(&made)) return last(status);
    return Vectors(made);
}

}  // namespace detail

// A prompt that was run; for one thread at a time.
class State {
  public:
    explicit State(cembed_state *handle) : handle_(handle) {}

    Result<Vectors> extend(int32_t num_vectors) {
        return detail::filled([&](cembed_vectors *to) { return cembed_extend(handle_.get(), num_vectors, to); });
    }

  private:
    std::unique_ptr<cembed_state, detail::Close> handle_;
};

class Bundle {
  public:
    explicit Bundle(cembed_bundle *handle) : handle_(handle) {}

    static Result<Bundle> open(const std::string &path, const cembed_options &options = CEMBED_OPTIONS) {
        return detail::opened<Bundle, cembed_bundle>(
            [&](cembed_bundle **to) { return cembed_open(path.c_str(), &options, to); });
    }

    static Result<Bundle> open_trusted(const std::string &path, const std::string &trusted,
                                       const cembed_options &options = CEMBED_OPTIONS) {
        return detail::opened<Bundle, cembed_bundle>(
            [&](cembed_bundle **to) { return cembed_open_trusted(path.c_str(), trusted.c_str(), &options, to); });
    }

    cembed_info info() const {
        cembed_info info{};
        cembed_get_info(handle_.get(), &info);
        return info;
    }

    Result<Vectors> embed(const cembed_image &image, const cembed_budget &budget = {}) {
        return detail::filled(
            [&](cembed_vectors *to) { return cembed_embed_image(handle_.get(), &image, &budget, to); });
    }

    Result<Vectors> embed(std::string_view query, const cembed_budget &budget = {}) {
        return detail::filled([&](cembed_vectors *to) {
            return cembed_embed_query(handle_.get(), query.data(), query.size(), &budget, to);
        });
    }

    Result<State> start(const cembed_image &image, int32_t max_vectors = 0) {
        return detail::opened<State, cembed_state>(
            [&](cembed_state **to) { return cembed_start_image(handle_.get(), &image, max_vectors, to); });
    }

    Result<State> start(std::string_view query, int32_t max_vectors = 0) {
        return detail::opened<State, cembed_state>([&](cembed_state **to) {
            return cembed_start_query(handle_.get(), query.data(), query.size(), max_vectors, to);
        });
    }

    cembed_bundle *get() const { return handle_.get(); }

  private:
    std::unique_ptr<cembed_bundle, detail::Close> handle_;
};

// Pages that were found, best first.
class Hits {
  public:
    explicit Hits(cembed_hits made) : made_(made) {}
    ~Hits() { cembed_hits_free(&made_); }
    Hits(Hits &&other) noexcept : made_(std::exchange(other.made_, cembed_hits{})) {}
    Hits &operator=(Hits &&other) noexcept {
        std::swap(made_, other.made_);
        return *this;
    }

    size_t size() const { return made_.count; }
    const cembed_hit *begin() const { return made_.hits; }
    const cembed_hit *end() const { return made_.hits + made_.count; }
    const cembed_hit &operator[](size_t i) const { return made_.hits[i]; }

  private:
    cembed_hits made_;
};

class Index {
  public:
    explicit Index(cembed_index *handle) : handle_(handle) {}

    static Result<Index> open(const std::string &path) {
        return detail::opened<Index, cembed_index>(
            [&](cembed_index **to) { return cembed_index_open(CEMBED_ABI_VERSION, path.c_str(), to); });
    }

    cembed_index_info info() const {
        cembed_index_info info{};
        cembed_index_get_info(handle_.get(), &info);
        return info;
    }

    Result<Hits> search(const Vectors &query, int32_t top = 10, int32_t threads = 0, const cembed_filter &filter = {}) {
        cembed_hits made{};
        const auto rows = int32_t(query.rows()), dim = int32_t(query.dim());
        const cembed_status status =
            cembed_index_search_filtered(handle_.get(), query.flat().data, rows, dim, top, threads, &filter, &made);
        if (status) return detail::last(status);
        return Hits(made);
    }

  private:
    std::unique_ptr<cembed_index, detail::Close> handle_;
};

// A score for each page; one thread for each core where `threads` is 0.
inline Result<std::vector<float>> maxsim(const Vectors &query, const std::vector<Vectors> &pages, int32_t threads = 0) {
    std::vector<float> rows, scores(pages.size());
    std::vector<int32_t> counts;
    for (const Vectors &page : pages) {
        if (page.dim() != query.dim()) return Error{CEMBED_ARGUMENT, "a page has another dim than the query"};
        rows.insert(rows.end(), page.flat().begin(), page.flat().end());
        counts.push_back(int32_t(page.rows()));
    }
    const cembed_status status = cembed_maxsim(query.flat().data, int32_t(query.rows()), int32_t(query.dim()),
                                               rows.data(), counts.data(), counts.size(), threads, scores.data());
    if (status) return detail::last(status);
    return scores;
}

}  // namespace cembed
#endif
