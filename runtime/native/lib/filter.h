// Which pages a search looks at, as `where` and `source` of runtime/index/search.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cembed {

// A pattern of fnmatch.fnmatchcase: `*`, `?`, `[abc]`, `[a-c]`, `[!abc]`.
class Pattern {
  public:
    explicit Pattern(std::u32string_view text);
    bool fits(std::u32string_view text) const;

  private:
    struct Item {  // one character of some, or of all others; or any number of any
        std::vector<std::pair<char32_t, char32_t>> ranges;
        bool negated = false, star = false;

        bool takes(char32_t c) const;
    };
    static Item set_of(std::u32string_view stuff);

    std::vector<Item> items_;
};

// A JSON object's values by name, each as a text that is the same for values that Python calls equal: 1, 1.0 and true.
using Values = std::map<std::string, std::string>;

// None if it is no JSON object.
std::optional<Values> values_of(std::string_view json);

class Filter {
  public:
    Filter() = default;
    // Null is no condition. Throws Error(INVALID_ARGUMENT): `where` is no JSON object, `source` is not UTF-8.
    Filter(const char *where, const char *source);

    bool takes_all() const { return where_.empty() && !source_; }
    bool takes_source(std::string_view source) const;
    // Throws Error(INDEX): it is no JSON object.
    bool takes_metadata(std::string_view json) const;

  private:
    Values where_;
    std::optional<Pattern> source_;
};

}  // namespace cembed
