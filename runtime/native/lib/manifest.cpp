#include "manifest.h"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "error.h"
#include "manifest_schema.h"
#include "schema.h"

namespace cembed {
namespace {

using Json = nlohmann::json;

[[noreturn]] void refuse(const std::string &where, const std::string &why) { throw Error(BUNDLE, where + " " + why); }

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

const std::map<std::string, Resize> RESIZE = {
    {"smart", Resize::SMART}, {"fixed", Resize::FIXED}, {"tiles", Resize::TILES}};

void check_side(const Side &side, const std::string &where) {
    if ((side.slots == Slots::ALL_TOKENS) == side.num_vectors.has_value())
        refuse(where, "has num_vectors that do not fit its slots");
    if (side.slots == Slots::ALL_TOKENS && side.pooling == Pooling::CONCAT)
        refuse(where, "has pooling concat, which needs latent slots");
    if (side.slots == Slots::CONSTANT && !side.latent_token_id)
        refuse(where, "has constant slots and no latent_token_id");
    if ((side.slots == Slots::LEARNED) != side.slot_rows.has_value())
        refuse(where, "has slot_rows that do not fit its slots");
    if (side.slots == Slots::FEEDBACK && !side.prompt_end)
        refuse(where, "has feedback slots, which start with the prompt's end");
    if (side.unread_slots > 0 && (side.slots != Slots::LEARNED || side.prompt_end))
        refuse(where, "has unread_slots, which stand before learned slots, the first of which gives the first vector");
    if (side.num_vectors) side.check_budget(*side.num_vectors);
    int64_t before = 0;
    for (const int64_t budget : side.nested_budgets) {
        if (budget <= before || (side.num_vectors && budget > *side.num_vectors))
            refuse(where, "has nested_budgets that do not rise to num_vectors");
        before = budget;
    }
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
    side.unread_slots = value.value("unread_slots", int64_t(0));
    side.nested_budgets = value.value("nested_budgets", std::vector<int64_t>());
    side.pooling = choice(POOLING, value, "pooling");
    check_side(side, where);
    return side;
}

ImageProcessing read_image(const Json &value) {
    ImageProcessing image;
    image.resize = choice(RESIZE, value, "resize");
    image.patch_size = value.at("patch_size");
    image.merge_size = value.at("merge_size");
    image.min_pixels = value.at("min_pixels");
    image.max_pixels = value.at("max_pixels");
    image.rescale_factor = value.at("rescale_factor");
    image.mean = value.at("mean").get<std::array<double, 3>>();
    image.std = value.at("std").get<std::array<double, 3>>();
    image.window_size = value.value("window_size", int64_t(0));
    image.skip_blank = value.value("skip_blank", false);
    if (const auto tiles = value.find("tiles"); tiles != value.end() && !tiles->is_null()) {
        image.tiles = {tiles->at("side"),    tiles->at("longest_edge"), tiles->at("tile"),
                       tiles->at("row_end"), tiles->at("page"),         tiles->at("alone")};
    }
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

// Schemes go by part/weight; the part is the graph's name up to an underscore.
std::set<std::string> read_by_row(const Json &value, const std::map<std::string, Graph> &graphs) {
    std::set<std::string> found;
    const auto quantisation = value.find("quantisation");
    if (quantisation == value.end() || quantisation->is_null() || !quantisation->value("rows", false)) return found;
    for (const auto &graph : graphs) {
        const std::string part = graph.first.substr(0, graph.first.find('_')) + "/";
        for (const auto &[weight, scheme] : quantisation->at("schemes").items())
            if (scheme == "int8" && weight.compare(0, part.size(), part) == 0) found.insert(graph.first);
    }
    return found;
}

Manifest read_manifest(const Json &value) {
    Manifest m;
    m.backbone = value.at("backbone");
    m.target = value.at("target");
    m.dtype = value.at("dtype");
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
    m.by_row = read_by_row(value, m.graphs);
    m.token_embeddings = read_table(value.at("token_embeddings"));
    if (const auto table = value.find("slot_embeddings"); table != value.end() && !table->is_null())
        m.slot_embeddings = read_table(*table);
    m.tokenizer = value.at("tokenizer");
    m.self_test_image = value.at("self_test").at("image");
    m.self_test_vectors = value.at("self_test").at("vectors");
    const Json files = value.value("files", Json::object());
    for (const auto &[name, file] : files.items()) m.files[name] = {file.at("size"), file.at("sha256")};
    m.upgraded_from = optional<std::string>(value, "upgraded_from");
    m.schema_version = value.at("schema_version");
    return m;
}

// A bundle of another version is told apart before its fields are.
void check_version(const Json &value) {
    const auto version = value.is_object() ? value.find("schema_version") : value.end();
    if (!value.is_object() || version == value.end() || !version->is_number_integer())
        refuse(schema::MANIFEST, "has no schema_version: this is not a cembed bundle");
    if (*version < schema::OLDEST || *version > schema::VERSION) {
        refuse("the bundle", "has schema version " + version->dump() + ", this cembed reads " +
                                 std::to_string(schema::OLDEST) + " to " + std::to_string(schema::VERSION) + ": " +
                                 (*version > schema::VERSION ? "update cembed" : "export the bundle again"));
    }
    if (*version < schema::VERSION && value.contains("upgraded_from"))
        refuse(schema::MANIFEST, "has unknown fields: upgraded_from");
}

}  // namespace

std::optional<int64_t> Side::max_vectors() const {
    if (!slot_rows) return std::nullopt;
    return (*slot_rows)[1] - num_slots(0);
}

void Side::check_budget(int64_t budget) const {
    if (budget < 1) throw Error(INVALID_ARGUMENT, "num_vectors is " + std::to_string(budget) + ": it is at least 1");
    if (const auto most = max_vectors(); most && budget > *most) {
        throw Error(INVALID_ARGUMENT,
                    "num_vectors is " + std::to_string(budget) + ": this bundle makes 1 to " + std::to_string(*most));
    }
}

int64_t Side::vector_dim(int64_t dim, int64_t budget) const {
    return pooling == Pooling::CONCAT ? dim * (budget ? budget : num_vectors.value_or(1)) : dim;
}

bool Graph::takes(std::string_view input) const {
    return std::any_of(inputs.begin(), inputs.end(), [&](const TensorSpec &tensor) { return tensor.name == input; });
}

bool Manifest::reads_parts() const {
    const Graph &vision = graphs.at("vision");
    if (!image.tiles) return vision.takes("patch_positions");
    return vision.takes("pixel_values") && vision.inputs.size() == 1;
}

Manifest Manifest::from_json(std::string_view text) {
    const Json value = schema::parse(text);
    check_version(value);
    schema::check(value);
    return read_manifest(value);
}

}  // namespace cembed
