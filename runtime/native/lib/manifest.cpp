#include "manifest.h"

#include <algorithm>
#include <set>
#include <sstream>

#include <nlohmann/json.hpp>

#include "error.h"

namespace cembed {
namespace {

using Json = nlohmann::json;

constexpr int64_t MAX_ROWS = 1 << 28;

// The dataclasses of runtime/manifest.py: `name:kind`, or `name?:kind` where there is a default. Kinds are str, int,
// number, axis (int or str), =one|of|these, the name of a class, [kind] for a list, [kind*n] for one of n, {kind} for
// an object with any names; null fits where a ? follows.
const std::map<std::string, std::string> SCHEMA = {
    {"Manifest",
     "backbone:str head:str target:str opset:int dtype:str hidden_size:int dim:int max_sequence_length:int "
     "image_token_id:int prompt_attention:=causal|bidirectional document:Side query:Side image:ImageProcessing "
     "positions:Positions graphs:{Graph} token_embeddings:EmbeddingTable tokenizer:str self_test:SelfTest "
     "parity:[Parity] source:{str} made_with:{str} slot_embeddings?:EmbeddingTable? quantisation?:Quantisation? "
     "files?:{FileRecord} schema_version?:int"},
    {"Side",
     "prompt:str slots:=constant|learned|feedback|all_tokens num_vectors:int? slot_positions:=zero|continue "
     "first_vector?:=prompt_end|slot latent_token_id?:int? slot_rows?:[int*2]? nested_budgets?:[int] "
     "pooling?:=none|mean|last|concat"},
    {"ImageProcessing",
     "resize:=smart|fixed patch_size:int merge_size:int min_pixels:int max_pixels:int rescale_factor:number "
     "mean:[number*3] std:[number*3] window_size?:int"},
    {"Positions", "axes:=1|3 first:int"},
    {"Tensor", "name:str dtype:str shape:[axis]"},
    {"Graph", "file:str data:[str] inputs:[Tensor] outputs:[Tensor]"},
    {"EmbeddingTable", "file:str dtype:=float32|float16|int8 rows:int scales?:str?"},
    {"SelfTest", "image:str text:str vectors:str tolerance:number"},
    {"FileRecord", "size:int sha256:str"},
    {"Parity", "graph:str max_error:number min_cosine:number tolerance:number"},
    {"Comparison",
     "pages:int queries:int min_cosine:number p1_cosine:number median_cosine:number score_error:number "
     "top5_overlap:number ms_per_page:[number*2] bytes:[int*2] ndcg5?:[number*2]?"},
    {"LayerDamage", "layer:str weights:[str] min_cosine:number score_error:number"},
    {"Quantisation",
     "weights:str embeddings:str rounding:str source:str schemes:{str} kept:[str] comparison:Comparison "
     "sensitivity?:[LayerDamage]"},
};

struct Field {
    std::string name, kind;
    bool required;
};

std::vector<Field> fields_of(const std::string &schema) {
    std::vector<Field> fields;
    std::istringstream words(schema);
    for (std::string word; words >> word;) {
        const size_t colon = word.find(':');
        const bool optional = word[colon - 1] == '?';
        fields.push_back({word.substr(0, colon - optional), word.substr(colon + 1), !optional});
    }
    return fields;
}

[[noreturn]] void refuse(const std::string &where, const std::string &why) {
    throw Error(BUNDLE, "manifest.json: " + where + " " + why);
}

bool is_integer(const Json &value) {
    return value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(INT64_MAX));
}

bool is_number(const Json &value) { return value.is_number() && std::abs(value.get<double>()) < 1e300; }

bool is_one_of(const Json &value, const std::string &choices) {
    const std::string text = value.is_string()           ? value.get<std::string>()
                             : value.is_number_integer() ? value.dump()
                                                         : "";
    std::istringstream words(choices);
    for (std::string word; std::getline(words, word, '|');) {
        if (word == text && std::isdigit(static_cast<unsigned char>(word[0])) == value.is_number()) return true;
    }
    return false;
}

void check(const Json &value, const std::string &kind, const std::string &where);

void check_object(const Json &value, const std::string &schema, const std::string &where) {
    if (!value.is_object()) refuse(where, "is not an object");
    std::set<std::string> known;
    for (const Field &field : fields_of(schema)) {
        known.insert(field.name);
        const auto found = value.find(field.name);
        if (found != value.end()) {
            check(*found, field.kind, where + "." + field.name);
        } else if (field.required) {
            refuse(where, "has missing fields: " + field.name);
        }
    }
    for (const auto &item : value.items()) {
        if (!known.count(item.key())) refuse(where, "has unknown fields: " + item.key());
    }
}

void check_list(const Json &value, const std::string &kind, const std::string &where) {
    const size_t star = kind.find('*');
    const bool right =
        value.is_array() && (star == std::string::npos || value.size() == std::stoul(kind.substr(star + 1)));
    if (!right) refuse(where, "is not a list of the length the schema wants");
    for (size_t i = 0; i < value.size(); ++i)
        check(value[i], kind.substr(0, star), where + "[" + std::to_string(i) + "]");
}

void check_names(const Json &value, const std::string &kind, const std::string &where) {
    if (!value.is_object()) refuse(where, "is not an object");
    for (const auto &item : value.items()) check(item.value(), kind, where + "." + item.key());
}

bool is_scalar(const Json &value, const std::string &kind) {
    if (kind == "str") return value.is_string();
    if (kind == "int") return is_integer(value);
    if (kind == "number") return is_number(value);
    if (kind == "axis") return value.is_string() || is_integer(value);
    return kind[0] == '=' && is_one_of(value, kind.substr(1));
}

// Throws Error(BUNDLE) unless a value is of a kind.
void check(const Json &value, const std::string &kind, const std::string &where) {
    const std::string inner = kind.substr(1, kind.size() - 2);
    if (kind.back() == '?') {
        if (!value.is_null()) check(value, kind.substr(0, kind.size() - 1), where);
    } else if (kind[0] == '[') {
        check_list(value, inner, where);
    } else if (kind[0] == '{') {
        check_names(value, inner, where);
    } else if (const auto schema = SCHEMA.find(kind); schema != SCHEMA.end()) {
        check_object(value, schema->second, where);
    } else if (!is_scalar(value, kind)) {
        refuse(where, "is not of the kind the schema wants (" + kind + ")");
    }
}

// From here on values are of their kinds
// -------------------------------------------------------------------------------

template <class T>
std::optional<T> optional(const Json &object, const char *name) {
    const auto found = object.find(name);
    if (found == object.end() || found->is_null()) return std::nullopt;
    return found->get<T>();
}

template <class T>
T choice(const std::map<std::string, T> &choices, const Json &object, const char *name) {
    const auto text = optional<std::string>(object, name);
    return text ? choices.at(*text) : T{};
}

const std::map<std::string, Slots> SLOTS = {{"constant", Slots::CONSTANT},
                                            {"learned", Slots::LEARNED},
                                            {"feedback", Slots::FEEDBACK},
                                            {"all_tokens", Slots::ALL_TOKENS}};
const std::map<std::string, Pooling> POOLING = {
    {"none", Pooling::NONE}, {"mean", Pooling::MEAN}, {"last", Pooling::LAST}, {"concat", Pooling::CONCAT}};

void check_side(const Side &side, const std::string &where) {
    if ((side.slots == Slots::ALL_TOKENS) == side.num_vectors.has_value())
        refuse(where, "has num_vectors that do not fit its slots");
    if (side.slots == Slots::ALL_TOKENS && side.pooling == Pooling::CONCAT)
        refuse(where, "has pooling concat, which needs latent slots");
    if (side.slots == Slots::CONSTANT && !side.latent_token_id)
        refuse(where, "has constant slots and no latent_token_id");
    if ((side.slots == Slots::LEARNED) != side.slot_rows.has_value())
        refuse(where, "has slot_rows that do not fit its slots");
    for (const int64_t number : side.slot_rows.value_or(std::vector<int64_t>{})) {
        if (number < 0 || number > MAX_ROWS) refuse(where, "has slot_rows out of range");
    }
    if (side.num_vectors.value_or(0) > MAX_ROWS) refuse(where, "has num_vectors out of range");
    if (side.slots == Slots::FEEDBACK && !side.prompt_end)
        refuse(where, "has feedback slots, which start with the prompt's end");
    if (side.num_vectors) side.check_budget(*side.num_vectors);
}

Side read_side(const Json &value, const std::string &where) {
    Side side;
    side.prompt = value.at("prompt");
    side.slots = choice(SLOTS, value, "slots");
    side.num_vectors = optional<int64_t>(value, "num_vectors");
    side.slot_positions = value.at("slot_positions") == "zero" ? SlotPositions::ZERO : SlotPositions::CONTINUE;
    side.prompt_end = value.value("first_vector", "prompt_end") == "prompt_end";
    side.latent_token_id = optional<int64_t>(value, "latent_token_id");
    side.slot_rows = optional<std::vector<int64_t>>(value, "slot_rows");
    side.pooling = choice(POOLING, value, "pooling");
    check_side(side, where);
    return side;
}

ImageProcessing read_image(const Json &value) {
    ImageProcessing image;
    image.resize = value.at("resize") == "smart" ? Resize::SMART : Resize::FIXED;
    image.patch_size = value.at("patch_size");
    image.merge_size = value.at("merge_size");
    image.min_pixels = value.at("min_pixels");
    image.max_pixels = value.at("max_pixels");
    image.rescale_factor = value.at("rescale_factor");
    image.mean = value.at("mean").get<std::array<double, 3>>();
    image.std = value.at("std").get<std::array<double, 3>>();
    image.window_size = value.value("window_size", int64_t(0));
    return image;
}

std::vector<TensorSpec> read_tensors(const Json &values) {
    std::vector<TensorSpec> tensors;
    for (const Json &value : values) {
        TensorSpec tensor{value.at("name"), value.at("dtype"), {}, {}};
        for (const Json &axis : value.at("shape")) {
            tensor.axes.push_back(axis.is_string() ? axis.get<std::string>() : "");
            tensor.shape.push_back(axis.is_string() ? 0 : axis.get<int64_t>());
        }
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

EmbeddingTable read_table(const Json &value) {
    return {value.at("file"), value.at("dtype"), value.at("rows"), optional<std::string>(value, "scales")};
}

// Numbers that sizes are computed from, within what can be computed with.
void check_numbers(const Manifest &m) {
    const ImageProcessing &image = m.image;
    const auto from_zero = [](int64_t value) { return std::clamp<int64_t>(value, -1, MAX_ROWS) + 1; };
    const std::vector<std::pair<const char *, std::pair<int64_t, int64_t>>> limits = {
        {"hidden_size", {m.hidden_size, 1 << 20}},
        {"dim", {m.dim, 1 << 20}},
        {"max_sequence_length", {m.max_sequence_length, MAX_ROWS}},
        {"image.patch_size", {image.patch_size, 1 << 10}},
        {"image.merge_size", {image.merge_size, 1 << 5}},
        {"image.min_pixels", {image.min_pixels, image.max_pixels}},
        {"image.max_pixels", {image.max_pixels, 1 << 28}},
        {"image.window_size", {from_zero(image.window_size), 1 << 16}},
        {"positions.first", {from_zero(m.positions.first), 1 << 16}},
        {"token_embeddings.rows", {m.token_embeddings.rows, MAX_ROWS}},
        {"slot_embeddings.rows", {m.slot_embeddings ? m.slot_embeddings->rows : 1, MAX_ROWS}},
    };
    for (const auto &[name, value] : limits) {
        if (value.first < 1 || value.first > value.second) refuse(name, "is out of range");
    }
    const bool windows = image.window_size != 0;
    if (windows && image.window_size % image.factor())
        refuse("image.window_size", "is not a multiple of a visual token");
}

Manifest read_manifest(const Json &value) {
    Manifest m;
    m.backbone = value.at("backbone");
    m.target = value.at("target");
    m.causal = value.at("prompt_attention") == "causal";
    m.opset = value.at("opset");
    m.hidden_size = value.at("hidden_size");
    m.dim = value.at("dim");
    m.max_sequence_length = value.at("max_sequence_length");
    m.image_token_id = value.at("image_token_id");
    m.document = read_side(value.at("document"), "document");
    m.query = read_side(value.at("query"), "query");
    m.image = read_image(value.at("image"));
    m.positions = {value.at("positions").at("axes"), value.at("positions").at("first")};
    for (const auto &[name, graph] : value.at("graphs").items()) {
        m.graphs[name] = {graph.at("file"), graph.at("data"), read_tensors(graph.at("inputs")),
                          read_tensors(graph.at("outputs"))};
    }
    m.token_embeddings = read_table(value.at("token_embeddings"));
    if (const auto table = value.find("slot_embeddings"); table != value.end() && !table->is_null())
        m.slot_embeddings = read_table(*table);
    m.tokenizer = value.at("tokenizer");
    m.self_test_image = value.at("self_test").at("image");
    m.self_test_vectors = value.at("self_test").at("vectors");
    const Json files = value.value("files", Json::object());
    for (const auto &[name, file] : files.items()) m.files[name] = {file.at("size"), file.at("sha256")};
    check_numbers(m);
    return m;
}

Json parse(std::string_view text) {
    try {
        return Json::parse(text);
    } catch (const Json::parse_error &error) {
        refuse("the file", "is not JSON, from byte " + std::to_string(error.byte) + " on");
    } catch (const Json::exception &) {
        refuse("the file", "is not JSON: it has a number that is too large");
    }
}

}  // namespace

std::optional<int64_t> Side::max_vectors() const {
    if (!slot_rows) return std::nullopt;
    return (*slot_rows)[1] + (prompt_end ? 1 : 0);
}

void Side::check_budget(int64_t wanted) const {
    if (wanted < 1) throw Error(INVALID_ARGUMENT, "num_vectors is " + std::to_string(wanted) + ": it is at least 1");
    if (const auto most = max_vectors(); most && wanted > *most) {
        throw Error(INVALID_ARGUMENT,
                    "num_vectors is " + std::to_string(wanted) + ": this bundle makes 1 to " + std::to_string(*most));
    }
}

int64_t Side::vector_dim(int64_t dim, int64_t wanted) const {
    return pooling == Pooling::CONCAT ? dim * (wanted ? wanted : num_vectors.value_or(1)) : dim;
}

bool Graph::takes(std::string_view input) const {
    return std::any_of(inputs.begin(), inputs.end(), [&](const TensorSpec &tensor) { return tensor.name == input; });
}

Manifest Manifest::from_json(std::string_view text) {
    const Json value = parse(text);
    const auto version = value.is_object() ? value.find("schema_version") : value.end();
    if (!value.is_object() || version == value.end() || !is_integer(*version))
        refuse("the file", "has no schema_version: this is not a cembed bundle");
    if (const int64_t number = *version; number != SCHEMA_VERSION) {
        refuse("the bundle", "has schema version " + std::to_string(number) + ", this cembed reads " +
                                 std::to_string(SCHEMA_VERSION) + ": " +
                                 (number > SCHEMA_VERSION ? "update cembed" : "export the bundle again"));
    }
    check(value, "Manifest", "the file");
    return read_manifest(value);
}

}  // namespace cembed
