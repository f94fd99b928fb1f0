#include "unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "error.h"
#include "unicode_tables.h"

namespace cembed::unicode {
namespace {

constexpr char32_t HANGUL = 0xac00, LEADING = 0x1100, VOWEL = 0x1161, TRAILING = 0x11a7;
constexpr char32_t VOWELS = 21, TRAILINGS = 28, SYLLABLES = 11172, LEADINGS = 19;

// The row of a table of ranges that holds c, or null.
template <class Row, size_t N> const Row *find(const Row (&table)[N], char32_t c) {
    const Row *row = std::lower_bound(table, table + N, c, [](const Row &r, char32_t value) { return r.last < value; });
    return row != table + N && row->first <= c ? row : nullptr;
}

uint8_t combining(char32_t c) {
    const Combining *row = c < 0x300 ? nullptr : find(COMBINING, c);
    return row == nullptr ? 0 : row->value;
}

void decompose(char32_t c, std::u32string &out) {
    if (c >= HANGUL && c < HANGUL + SYLLABLES) {
        const char32_t index = c - HANGUL, trailing = index % TRAILINGS;
        out += {LEADING + index / (VOWELS * TRAILINGS), VOWEL + index / TRAILINGS % VOWELS};
        if (trailing != 0) out += TRAILING + trailing;
        return;
    }
    const auto *row = std::lower_bound(std::begin(DECOMPOSITIONS), std::end(DECOMPOSITIONS), c,
                                       [](const Decomposition &r, char32_t value) { return r.from < value; });
    if (row == std::end(DECOMPOSITIONS) || row->from != c) {
        out += c;
        return;
    }
    decompose(row->first, out);
    if (row->second != 0) out += char32_t(row->second);  // a second part has no parts
}

// Marks between two starters, by their classes.
void reorder(std::u32string &text) {
    const auto mark = [](char32_t c) { return combining(c) != 0; };
    for (auto at = text.begin(); at != text.end();) {
        const auto first = std::find_if(at, text.end(), mark);
        at = std::find_if_not(first, text.end(), mark);
        std::stable_sort(first, at, [](char32_t a, char32_t b) { return combining(a) < combining(b); });
    }
}

bool before(const Decomposition &a, const Decomposition &b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
}

// Rows whose parts become them again, by their parts.
const std::vector<Decomposition> &compositions() {
    static const std::vector<Decomposition> rows = [] {
        std::vector<Decomposition> found;
        std::copy_if(std::begin(DECOMPOSITIONS), std::end(DECOMPOSITIONS), std::back_inserter(found),
                     [](const Decomposition &row) { return row.again; });
        std::sort(found.begin(), found.end(), before);
        return found;
    }();
    return rows;
}

// What two characters become, or 0.
char32_t composed(char32_t a, char32_t b) {
    if (a >= LEADING && a < LEADING + LEADINGS && b >= VOWEL && b < VOWEL + VOWELS) {
        return HANGUL + ((a - LEADING) * VOWELS + b - VOWEL) * TRAILINGS;
    }
    if (a >= HANGUL && a < HANGUL + SYLLABLES && (a - HANGUL) % TRAILINGS == 0 && b > TRAILING &&
        b < TRAILING + TRAILINGS) {
        return a + b - TRAILING;
    }
    const Decomposition key{0, uint32_t(a), uint32_t(b), true};
    const auto row = std::lower_bound(compositions().begin(), compositions().end(), key, before);
    return row != compositions().end() && row->first == a && row->second == b ? row->from : 0;
}

// Each mark or starter joins the last starter unless something between keeps them apart.
void compose(std::u32string &text) {
    size_t starter = std::u32string::npos, length = 0;
    int last = -1;  // class of the character before, after the starter; -1: none
    for (const char32_t c : text) {
        const int value = combining(c);
        const char32_t both = starter != std::u32string::npos && last < value ? composed(text[starter], c) : 0;
        if (both != 0) {
            text[starter] = both;
            continue;
        }
        if (value == 0) starter = length;
        last = value == 0 ? -1 : value;
        text[length++] = c;
    }
    text.resize(length);
}

// The code point at text[i], which moves after it.
char32_t next(std::string_view text, size_t &i, bool surrogates) {
    static constexpr char32_t SMALLEST[] = {0, 0x80, 0x800, 0x10000};
    const auto lead = uint8_t(text[i++]);
    if (lead < 0x80) return lead;
    const size_t more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    bool valid = lead >= 0xc2 && lead <= 0xf4 && i + more <= text.size();
    char32_t c = lead & (0x3f >> more);
    for (size_t k = 0; valid && k < more; ++k) {
        const auto byte = uint8_t(text[i++]);
        valid = (byte & 0xc0) == 0x80;
        c = c << 6 | (byte & 0x3f);
    }
    if (!valid || c < SMALLEST[more] || c > 0x10ffff || (!surrogates && c >= 0xd800 && c < 0xe000)) {
        throw Error(INVALID_ARGUMENT, "the text is not UTF-8");
    }
    return c;
}

}  // namespace

bool is_letter(char32_t c) { return find(LETTERS, c) != nullptr; }
bool is_number(char32_t c) { return find(NUMBERS, c) != nullptr; }
bool is_space(char32_t c) { return find(SPACES, c) != nullptr; }

void check(std::string_view utf8, bool surrogates) {
    for (size_t i = 0; i < utf8.size();) next(utf8, i, surrogates);
}

std::u32string decode(std::string_view utf8, bool surrogates) {
    std::u32string text;
    text.reserve(utf8.size());
    for (size_t i = 0; i < utf8.size();) text += next(utf8, i, surrogates);
    return text;
}

std::string encode(std::u32string_view text) {
    std::string utf8;
    utf8.reserve(text.size());
    for (const char32_t c : text) {
        const int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
        utf8 += char(more == 0 ? c : (0xff00 >> (more + 1) & 0xff) | c >> 6 * more);
        for (int k = more - 1; k >= 0; --k) utf8 += char(0x80 | (c >> 6 * k & 0x3f));
    }
    return utf8;
}

std::u32string nfc(const std::u32string &text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0x300; })) return text;
    std::u32string out;
    out.reserve(text.size());
    for (const char32_t c : text) decompose(c, out);
    reorder(out);
    compose(out);
    return out;
}

}  // namespace cembed::unicode
