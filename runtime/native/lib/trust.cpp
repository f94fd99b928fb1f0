#include "trust.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include <dirent.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include "error.h"
#include "files.h"
#include "manifest_schema.h"
#include "shared_tables.h"

namespace cembed {
namespace {

using namespace std::string_literals;
using Bytes = std::array<uint8_t, 32>;

constexpr const char *POLICY = "/etc/cembed/trust.toml", *VARIABLE = "CEMBED_TRUST";
constexpr std::string_view PREFIX = "ed25519 ", ENDING = ".pem";
constexpr size_t ID_DIGITS = 16, SIGNATURE_SIZE = 64, MOST_SIGNATURES = 16, MOST_KEYS = 64, KEY_DIGITS = 44;
constexpr size_t LINE = PREFIX.size() + ID_DIGITS + 1 + 2 * SIGNATURE_SIZE + 1;
constexpr int64_t MAX_POLICY = 1 << 16, MAX_KEY = 1 << 12;
constexpr std::string_view HEAD = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA", TAIL = "\n-----END PUBLIC KEY-----\n";

struct Demand {
    std::string origin;
    std::map<std::string, Bytes> keys;
    std::set<std::string> revoked;
    bool require = true;
};

using Signatures = std::map<std::string, std::vector<uint8_t>>;

bool is_hex(std::string_view text) { return text.find_first_not_of("0123456789abcdef") == text.npos; }

std::vector<uint8_t> from_hex(std::string_view digits) {
    std::vector<uint8_t> bytes;
    const auto value = [](char digit) { return digit <= '9' ? digit - '0' : digit - 'a' + 10; };
    for (size_t i = 0; i + 1 < digits.size(); i += 2)
        bytes.push_back(uint8_t(value(digits[i]) << 4 | value(digits[i + 1])));
    return bytes;
}

std::string to_hex(const Bytes &bytes) {
    std::string text;
    for (const uint8_t byte : bytes) {
        text += "0123456789abcdef"[byte >> 4];
        text += "0123456789abcdef"[byte & 15];
    }
    return text;
}

// Why a path cannot be looked at; 0 if it can.
int look(const std::string &path, struct stat *status) { return lstat(path.c_str(), status) == 0 ? 0 : errno; }

std::string key_id(const Bytes &key) {
    return sha256(std::string_view(reinterpret_cast<const char *>(key.data()), key.size())).substr(0, ID_DIGITS);
}

// The 32 bytes of a key, if `digits` are their base64, and no other.
std::optional<Bytes> from_base64(std::string_view digits) {
    uint8_t bytes[KEY_DIGITS / 4 * 3 + 1], again[KEY_DIGITS + 1];
    const auto *from = reinterpret_cast<const uint8_t *>(digits.data());
    if (EVP_DecodeBlock(bytes, from, int(digits.size())) < 0) return {};
    Bytes key;
    std::copy_n(bytes, key.size(), key.begin());
    EVP_EncodeBlock(again, key.data(), int(key.size()));
    if (std::memcmp(again, digits.data(), digits.size()) != 0) return {};
    return key;
}

bool is_small_order(Bytes key) {
    key[31] &= 127;
    const std::string text = to_hex(key);
    return std::find(std::begin(shared::SMALL_ORDER), std::end(shared::SMALL_ORDER), text) != std::end(shared::SMALL_ORDER);
}

Bytes parse_key(const std::string &path, std::string_view text) {
    std::optional<Bytes> key;
    const size_t size = HEAD.size() + KEY_DIGITS + TAIL.size();
    if (text.size() == size && text.substr(0, HEAD.size()) == HEAD && text.substr(size - TAIL.size()) == TAIL)
        key = from_base64(text.substr(HEAD.size(), KEY_DIGITS));
    if (!key)
        throw Error(BUNDLE, path + " is no public key of Ed25519, as `openssl pkey -pubout` writes it: give that");
    if (is_small_order(*key)) throw Error(BUNDLE, path + " is a key that anybody can sign for: make another");
    return *key;
}

bool is_folder(const std::string &path) {
    struct stat status{};
    return look(path, &status) == 0 && S_ISDIR(status.st_mode);
}

std::vector<std::string> key_files(const std::string &place) {
    if (!is_folder(place)) return {place};
    std::unique_ptr<DIR, int (*)(DIR *)> open(opendir(place.c_str()), closedir);
    if (!open) throw Error(BUNDLE, "cannot list " + place + ": " + std::strerror(errno));
    std::vector<std::string> files;
    while (const dirent *entry = readdir(open.get())) {
        const std::string_view name = entry->d_name;
        if (name.size() >= ENDING.size() && name.substr(name.size() - ENDING.size()) == ENDING)
            files.push_back(place + "/" + entry->d_name);
    }
    std::sort(files.begin(), files.end());
    return files;
}

std::map<std::string, Bytes> read_keys(const std::string &place) {
    const auto files = key_files(place);
    if (files.empty() || files.size() > MOST_KEYS)
        throw Error(BUNDLE, place + " has " + std::to_string(files.size()) +
                                " files that end in .pem: it needs 1 to " + std::to_string(MOST_KEYS) + ", one a key");
    std::map<std::string, Bytes> keys;
    for (const std::string &file : files) {
        const Bytes key = parse_key(file, File(file, BUNDLE).read(MAX_KEY));
        keys[key_id(key)] = key;
    }
    return keys;
}

std::string_view stripped(std::string_view text) {
    const size_t first = text.find_first_not_of(" \t");
    if (first == text.npos) return {};
    return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// What is between the quotes; nothing if that is no text of the policy.
std::optional<std::string> quoted(std::string_view text) {
    if (text.size() < 2 || text.front() != '"' || text.back() != '"') return {};
    const std::string_view inner = text.substr(1, text.size() - 2);
    if (inner.find_first_of("\"\\") != inner.npos) return {};
    return std::string(inner);
}

std::optional<std::set<std::string>> id_list(std::string_view text) {
    if (text.size() < 2 || text.front() != '[' || text.back() != ']') return {};
    std::string_view rest = text.substr(1, text.size() - 2);
    std::set<std::string> ids;
    if (stripped(rest).empty()) return ids;
    for (size_t comma = 0; comma != rest.npos;) {
        comma = rest.find(',');
        const auto id = quoted(stripped(rest.substr(0, comma)));
        if (!id || id->size() != ID_DIGITS || !is_hex(*id)) return {};
        ids.insert(*id);
        rest.remove_prefix(comma == rest.npos ? rest.size() : comma + 1);
    }
    return ids;
}

// The lines of a policy.
struct Policy {
    std::optional<bool> require;
    std::optional<std::string> keys;
    std::optional<std::set<std::string>> revoked;

    bool take(std::string_view name, std::string_view value) {
        if (name == "require" && !require && (value == "true" || value == "false")) {
            require = value == "true";
            return true;
        }
        if (name == "keys" && !keys) return (keys = quoted(value)) && !keys->empty() && keys->front() == '/';
        if (name == "revoked" && !revoked) return bool(revoked = id_list(value));
        return false;
    }
};

bool is_control(char c) { return (c >= 0 && c < ' ' && c != '\t') || c == 127; }

bool take_line(Policy &policy, std::string_view line) {
    if (std::any_of(line.begin(), line.end(), is_control)) return false;
    const std::string_view text = stripped(line);
    if (text.empty() || text.front() == '#') return true;
    const size_t equals = text.find('=');
    if (equals == text.npos) return false;
    return policy.take(stripped(text.substr(0, equals)), stripped(text.substr(equals + 1)));
}

Demand read_policy(const std::string &path) {
    const std::string expected = R"(: it has require = true, keys = "/PATH" and revoked = ["KEYID"], each once)";
    const std::string text = File(path, BUNDLE).read(MAX_POLICY);
    Policy policy;
    std::string_view rest = text;
    for (size_t number = 1, end = 0; end != rest.npos; ++number) {
        end = rest.find('\n');
        if (!take_line(policy, rest.substr(0, end)))
            throw Error(BUNDLE, path + " is no policy, see line " + std::to_string(number) + expected);
        if (end != rest.npos) rest.remove_prefix(end + 1);
    }
    if (!policy.require || !policy.keys) throw Error(BUNDLE, path + " is no policy, a line is missing" + expected);
    return {path, read_keys(*policy.keys), policy.revoked.value_or(std::set<std::string>()), *policy.require};
}

// What may not be looked at counts as there.
bool is_there(const std::string &path) {
    struct stat status{};
    return look(path, &status) != ENOENT;
}

std::vector<Demand> demands(const std::string &trusted) {
    std::vector<Demand> found;
    if (is_there(POLICY)) found.push_back(read_policy(POLICY));
    if (const char *more = std::getenv(VARIABLE); more != nullptr && *more) found.push_back(read_policy(more));
    if (!trusted.empty()) found.push_back({trusted, read_keys(trusted), {}, true});
    return found;
}

// A line of manifest.sig, without its end.
bool take_signature(Signatures &signatures, std::string_view line) {
    if (line.substr(0, PREFIX.size()) != PREFIX || line[PREFIX.size() + ID_DIGITS] != ' ') return false;
    const std::string_view id = line.substr(PREFIX.size(), ID_DIGITS), digits = line.substr(PREFIX.size() + ID_DIGITS + 1);
    return is_hex(id) && is_hex(digits) && signatures.emplace(id, from_hex(digits)).second;
}

Signatures read_signatures(const std::string &root) {
    const std::string path = root + "/" + schema::SIGNATURES;
    if (!is_there(path)) return {};
    const std::string text = File(path, BUNDLE).read(int64_t(MOST_SIGNATURES * LINE));
    Signatures signatures;
    bool whole = !text.empty() && text.size() % LINE == 0;
    for (size_t at = 0; whole && at < text.size(); at += LINE) {
        const std::string_view line = std::string_view(text).substr(at, LINE);
        whole = line.back() == '\n' && take_signature(signatures, line.substr(0, LINE - 1));
    }
    if (!whole) throw Error(BUNDLE, path + " is no list of signatures: it is damaged, get the bundle again");
    return signatures;
}

bool verify(const Bytes &key, const std::vector<uint8_t> &signature, const std::string &message) {
    const std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY *)> loaded(
        EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, nullptr, key.data(), key.size()), EVP_PKEY_free);
    const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX *)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (!loaded || !context || EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, loaded.get()) != 1)
        throw Error(INTERNAL, "libcrypto has no Ed25519");
    const auto *text = reinterpret_cast<const uint8_t *>(message.data());
    return EVP_DigestVerify(context.get(), signature.data(), signature.size(), text, message.size()) == 1;
}

std::string names_of(const Signatures &signatures, const std::set<std::string> &revoked) {
    std::string names;
    for (const auto &signature : signatures)
        names += (names.empty() ? "" : ", ") + signature.first + (revoked.count(signature.first) ? " (revoked)" : "");
    return names;
}

void check(const Demand &demand, const std::string &root, const std::string &message, const Signatures &signatures,
           const std::set<std::string> &revoked) {
    Signatures good;
    for (const auto &signature : signatures)
        if (demand.keys.count(signature.first) && !revoked.count(signature.first)) good.insert(signature);
    if (good.empty() && !signatures.empty())
        throw Error(BUNDLE, root + " is signed by " + names_of(signatures, revoked) + ": " + demand.origin +
                                " trusts none of them");
    if (good.empty() && demand.require)
        throw Error(BUNDLE,
                    root + " is not signed, and " + demand.origin + " wants a signature: get the signed bundle");
    for (const auto &[id, signature] : good)
        if (!verify(demand.keys.at(id), signature, message))
            throw Error(BUNDLE, root + ": the signature of " + id + " is not for this " + schema::MANIFEST +
                                    ": it was changed, get the bundle again");
}

}  // namespace

void check_trust(const std::string &root, const std::string &manifest, const std::string &trusted) {
    const auto found = demands(trusted);
    if (found.empty()) return;
    const std::string message = "cembed bundle 1\n" + sha256(manifest) + "  " + schema::MANIFEST + "\n";
    const Signatures signatures = read_signatures(root);
    std::set<std::string> revoked;  // by anybody
    for (const Demand &demand : found) revoked.insert(demand.revoked.begin(), demand.revoked.end());
    for (const Demand &demand : found) check(demand, root, message, signatures, revoked);
}

}  // namespace cembed
