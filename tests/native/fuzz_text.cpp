// Any bytes as a text, for both kinds of tokenizers: refused, or ids of the vocabulary.
#include <cstdlib>

#include "../../runtime/native/lib/error.h"
#include "../../runtime/native/lib/prompts.h"

namespace {

constexpr const char *QWEN = R"({"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
     "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
    "added_tokens": [{"id": 9, "content": "<s>", "normalized": false, "special": true}, {"id": 10, "content": "\u00e9"}],
    "model": {"type": "BPE", "unk_token": "?", "vocab": {"a": 0, "b": 1, "ab": 2, "\u00c3": 3, "\u0120": 4, "\u0120a": 5,
    "?": 6, "aa": 7, "aab": 8}, "merges": [["a", "b"], ["\u0120", "a"], ["a", "a"], ["a", "ab"]]}})";
constexpr const char *GEMMA = R"({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false},
    "added_tokens": [{"id": 3, "content": "<s>", "normalized": false, "special": true}],
    "model": {"type": "BPE", "unk_token": "?", "fuse_unk": true, "byte_fallback": true, "vocab": {"a": 0, "\u2581": 1,
    "\u2581a": 2, "<s>": 3, "?": 4, "<0xC3>": 5, "<0xA9>": 6, "aa": 7}, "merges": ["\u2581 a", "a a"]}})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const auto qwen = cembed::Tokenizer::from_json(QWEN), gemma = cembed::Tokenizer::from_json(GEMMA);
    for (const auto &tokenizer : {qwen, gemma}) {
        try {
            const std::string_view text(reinterpret_cast<const char *>(data), size);
            for (const int64_t id : tokenizer.encode(text)) {
                if (id < 0 || id > 11) std::abort();
            }
            cembed::Prompter(tokenizer, 0).query("<s>{text}", text);
        } catch (const cembed::Error &) {
        }
    }
    return 0;
}
