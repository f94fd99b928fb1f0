#include "graph_check.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "error.h"
#include "files.h"
#include "manifest_schema.h"

namespace cembed {
namespace {

using std::string_view;

constexpr const char *MORE = ": cembed exports no such graph: export the bundle again";
constexpr int64_t FULL = int64_t(1) << 60;  // more than any limit: sums and products stop here

[[noreturn]] void refuse(const std::string &why) { throw Error(BUNDLE, why); }

std::string shown(string_view text) {
    std::string out(text.substr(0, 80));
    std::replace_if(out.begin(), out.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    return "'" + out + "'";
}

std::string number(int64_t value) { return std::to_string(value); }

int64_t magnitude(int64_t value) { return value < -FULL ? FULL : std::min(std::abs(value), FULL); }
int64_t sum(int64_t a, int64_t b) { return std::min(a + b, FULL); }
int64_t product(int64_t a, int64_t b) { return a && b > FULL / a ? FULL : a * b; }
int64_t at_least_one(int64_t value) { return std::max<int64_t>(1, value); }

template <class Rows> bool has(const Rows &rows, string_view value) {
    return std::any_of(std::begin(rows), std::end(rows), [&](const char *row) { return value == row; });
}

struct Place {
    size_t start, end;
    uint64_t number;  // of a field that is one
    bool is_number;
};

struct FieldKind {
    std::string kind;
    bool many;
};

constexpr uint64_t FIELDS_END = 32;

// A message's fields, by number.
using Message = const std::optional<FieldKind> *;
using Messages = std::map<std::string, std::vector<std::optional<FieldKind>>>;

const Messages &messages() {
    static const Messages made = [] {
        Messages found;
        for (const auto &row : schema::GRAPH_FIELDS) {
            auto &fields = found.try_emplace(row.message, FIELDS_END).first->second;
            std::string kind = row.inner;
            const bool many = kind.back() == '*';
            if (many) kind.pop_back();
            fields[row.field] = FieldKind{kind, many};
        }
        return found;
    }();
    return made;
}

Message message(const char *name) { return messages().at(name).data(); }

bool is_wire(char kind, uint64_t wire) {
    return kind == 'n' ? wire == 0 : kind == 'f' ? wire == 5 : kind == 'a' ? wire == 0 || wire == 2 || wire == 5 : wire == 2;
}

// What is known of a value: as in Python.
struct Known {
    int64_t elements = 0;
    std::vector<int64_t> numbers;
    bool constant = true;
};

using Axes = std::vector<int64_t>;  // -1 for those that have no number
using Fields = std::vector<std::vector<Place>>;

struct Scope {
    std::unordered_map<string_view, Known> known;
    std::unordered_map<string_view, Axes> axes;
    std::unordered_map<string_view, Place> places;
};

class Check {
  public:
    Check(string_view data, const std::map<std::string, int64_t> &sizes) : data_(data), sizes_(sizes) {}

    void model(const Graph &graph) {
        const Fields found = read("Model", {0, data_.size(), 0, false});
        for (const Place &place : found[8]) {
            const Fields opset = read("Opset", place);
            if (!has(schema::DOMAINS, text(opset, 1))) refuse("it has operators of " + shown(text(opset, 1)) + MORE);
        }
        if (found[7].empty()) refuse("there is no graph in it");
        const Fields top = read("Graph", found[7][0]);
        signature("inputs", graph.inputs, top[11]);
        signature("outputs", graph.outputs, top[12]);
        check(top, {}, 1);
        if (folded_ > sum(product(schema::FOLDED_SHARE, stored_), schema::FOLDED_MORE))
            refuse("it makes " + number(folded_) + " elements of constants alone, and " + number(stored_) +
                   " are stored" + MORE);
    }

  private:
    // The wire format

    Fields read(const char *name, Place place) const {
        const Message known = message(name);
        Fields found(FIELDS_END);
        size_t at = place.start;
        while (at < place.end) {
            const uint64_t tag = varint(at), field = tag >> 3, wire = tag & 7;
            const bool is_known = field < FIELDS_END && known[field] && is_wire(known[field]->kind[0], wire);
            if (!is_known)
                refuse("field " + std::to_string(field) + " of a " + name + ", of wire type " + std::to_string(wire) + MORE);
            if (!known[field]->many && !found[field].empty())
                refuse("field " + std::to_string(field) + " of a " + name + " is there twice");
            found[field].push_back(value(wire, at));
            at = found[field].back().end;
            if (at > place.end) refuse("it is cut off after byte " + std::to_string(place.end));
        }
        return found;
    }

    // A field's content; for a number, `end` is where it ends.
    Place value(uint64_t wire, size_t at) const {
        if (wire == 5) return {at, at + 4, 0, false};
        const uint64_t content = varint(at);
        if (wire == 0) return {at, at, content, true};
        if (content > data_.size()) refuse("it is cut off");
        return {at, at + size_t(content), 0, false};
    }

    uint64_t varint(size_t &at) const {
        uint64_t value = 0;
        for (int shift = 0; shift < 70; shift += 7) {
            if (at >= data_.size()) refuse("it is cut off");
            const auto byte = static_cast<unsigned char>(data_[at++]);
            value |= uint64_t(byte & 127) << (shift & 63);
            if (byte < 128) return value;
        }
        refuse("it is damaged before byte " + std::to_string(at));
    }

    string_view bytes(const Place &place) const { return data_.substr(place.start, place.end - place.start); }
    string_view text(const Fields &found, int field) const {
        return found[size_t(field)].empty() ? string_view() : bytes(found[size_t(field)][0]);
    }

    static int64_t first(const Fields &found, int field, int64_t otherwise) {
        return found[size_t(field)].empty() ? otherwise : int64_t(found[size_t(field)][0].number);
    }

    std::vector<int64_t> numbers(const std::vector<Place> &values) const {
        std::vector<int64_t> found;
        for (const Place &value : values) {
            if (value.is_number) found.push_back(int64_t(value.number));
            for (size_t at = value.start; at < value.end;) found.push_back(int64_t(varint(at)));
        }
        return found;
    }

    // Inputs, outputs and what is said of values between

    struct Value {
        string_view name;
        int64_t kind;
        std::optional<Axes> axes;
    };

    Value value_of(const Place &place) const {
        const Fields found = read("Value", place);
        Value value{text(found, 1), 0, std::nullopt};
        if (found[2].empty()) return value;
        const Fields kind = read("Type", found[2][0]);
        if (kind[1].empty()) return value;
        const Fields tensor = read("TensorType", kind[1][0]);
        value.kind = first(tensor, 1, 0);
        if (tensor[2].empty()) return value;
        value.axes = Axes();
        const Fields shape = read("Shape", tensor[2][0]);
        for (const Place &dim : shape[1]) {
            const Fields axis = read("Dim", dim);
            value.axes->push_back(axis[1].empty() ? -1 : int64_t(axis[1][0].number));
            if (!axis[1].empty() && axis[1][0].number > uint64_t(schema::MAX_AXIS))
                refuse("it has an axis of " + std::to_string(axis[1][0].number));
        }
        return value;
    }

    static int64_t type_of(const std::string &dtype) {
        for (const auto &row : schema::GRAPH_TYPES) {
            if (dtype == row.name) return row.number;
        }
        return 0;
    }

    void signature(const std::string &what, const std::vector<TensorSpec> &stated, const std::vector<Place> &places) const {
        std::map<string_view, Value> found;
        for (const Place &place : places) {
            Value value = value_of(place);
            found[value.name] = value;
        }
        const bool all = std::all_of(stated.begin(), stated.end(), [&](const auto &one) { return found.count(one.name); });
        if (found.size() != places.size() || found.size() != stated.size() || !all)
            refuse("its " + what + " are others than the manifest's");
        for (const TensorSpec &tensor : stated) {
            Axes axes;
            for (size_t i = 0; i < tensor.shape.size(); ++i) axes.push_back(tensor.axes[i].empty() ? tensor.shape[i] : -1);
            const Value &value = found[tensor.name];
            if (value.kind != type_of(tensor.dtype) || value.axes != axes)
                refuse("its " + what + " have " + tensor.name + " of another type or shape than the manifest");
        }
    }

    // Graphs

    void check(const Fields &found, const std::unordered_map<string_view, Known> &outer, int depth) {
        if (depth > schema::MAX_BODIES) refuse(std::string("it has graphs within each other") + MORE);
        nodes_ += int64_t(found[1].size());
        tensors_ += int64_t(found[5].size());
        if (nodes_ > schema::MAX_NODES || tensors_ > schema::MAX_TENSORS)
            refuse("it has " + number(nodes_) + " nodes and " + number(tensors_) + " tensors: " +
                   number(schema::MAX_NODES) + " and " + number(schema::MAX_TENSORS) + " are the most");
        Scope scope{outer, {}, {}};
        for (const int field : {11, 12, 13}) {
            for (const Place &place : found[size_t(field)]) scope.places[text(read("Value", place), 1)] = place;
        }
        for (const Place &place : found[5]) {
            auto [name, known, shape] = tensor(place);
            scope.known[name] = std::move(known);
            scope.axes[name] = std::move(shape);
        }
        for (const Place &place : found[1]) node(place, scope, depth);
    }

    void node(const Place &place, Scope &scope, int depth) {
        const Fields found = read("Node", place);
        const string_view domain = text(found, 7), kind = text(found, 4);
        const std::string full = domain.empty() ? std::string(kind) : std::string(domain) + ":" + std::string(kind);
        if (kind.empty() || !has(schema::OPERATORS, full)) refuse("it has the operator " + shown(full) + MORE);
        std::vector<string_view> inputs;
        for (const Place &input : found[1]) inputs.push_back(bytes(input));
        if (kind == "MatMulNBits") blocks(found[5], inputs, scope);
        std::optional<Known> value;
        for (const Place &part : found[5]) {
            if (auto other = attribute(part, scope, depth)) value = other;
        }
        if (const auto about = result(kind, inputs, scope, value)) {
            for (const Place &output : found[2]) scope.known[bytes(output)] = *about;
            if (about->constant) folded_ = sum(folded_, product(about->elements, int64_t(found[2].size())));
        }
    }

    // A product's sizes are those of its weight: an engine reads as much as they say.
    void blocks(const std::vector<Place> &attributes, const std::vector<string_view> &inputs, const Scope &scope) const {
        std::map<string_view, int64_t> said;
        for (const Place &place : attributes) {
            const Fields one = read("Attribute", place);
            said[text(one, 1)] = first(one, 3, -1);
        }
        const int64_t outputs = said["N"], blocks = said["K"] / schema::BLOCK;
        std::vector<Axes> stored;
        for (size_t i = 1; i < inputs.size(); ++i) {
            const auto found = scope.axes.find(inputs[i]);
            stored.push_back(found == scope.axes.end() ? Axes() : found->second);
        }
        const decltype(said) known{
            {"K", blocks * schema::BLOCK}, {"N", outputs}, {"bits", 4}, {"block_size", schema::BLOCK}, {"accuracy_level", 4}};
        const bool sized = said == known && attributes.size() == known.size();
        if (!sized || stored != std::vector<Axes>{{outputs, blocks, schema::BLOCK / 2}, {outputs, blocks}} || blocks <= 0)
            refuse(std::string("a MatMulNBits has not the sizes of its weight") + MORE);
    }

    std::optional<Known> attribute(const Place &place, const Scope &scope, int depth) {
        const Fields found = read("Attribute", place);
        if (!found[6].empty()) {
            check(read("Graph", found[6][0]), scope.known, depth + 1);
        } else if (int64_t(place.end - place.start) > schema::MAX_ATTRIBUTE) {
            refuse("an attribute has " + std::to_string(place.end - place.start) + " bytes: " +
                   number(schema::MAX_ATTRIBUTE) + " are the most");
        }
        if (found[5].empty()) return std::nullopt;
        return std::get<1>(tensor(found[5][0]));
    }

    // Tensors

    std::tuple<string_view, Known, Axes> tensor(const Place &place) {
        const Fields found = read("Tensor", place);
        const Axes shape = numbers(found[1]);
        const int64_t kind = first(found, 2, 0);
        int64_t bits = 0, elements = 1;
        for (const auto &row : schema::GRAPH_BITS) bits = row.type == kind ? row.bits : bits;
        bool fits = bits && int64_t(shape.size()) <= schema::MAX_AXES;
        for (const int64_t axis : shape) {
            fits = fits && axis >= 0 && axis <= schema::MAX_AXIS;
            elements = fits ? product(elements, axis) : 0;
        }
        if (!fits || (!elements && shape.size() > 1) || elements >= FULL >> 7)
            refuse("a tensor of type " + number(kind) + " has a shape of " + std::to_string(shape.size()) + " axes" + MORE);
        check_bytes(found, elements, (elements * bits + 7) / 8);
        stored_ = sum(stored_, elements);
        return {text(found, 8), Known{elements, shape_numbers(found, kind, elements), true}, shape};
    }

    void check_bytes(const Fields &found, int64_t elements, int64_t needed) const {
        const int typed = !found[4].empty() + !found[5].empty() + !found[7].empty();
        if (typed + !found[9].empty() + !found[13].empty() > 1) refuse("a tensor has its data in several places");
        int64_t there = int64_t(text(found, 9).size());
        if (typed) there = count(found) == elements ? needed : -1;
        if (!found[13].empty()) there = external(found, needed);
        if (there != needed)
            refuse("a tensor of " + number(elements) + " elements has other bytes than these take, " + number(needed));
    }

    int64_t count(const Fields &found) const {
        if (found[4].empty()) return int64_t(numbers(found[found[5].empty() ? 7 : 5]).size());
        int64_t floats = 0;
        for (const Place &place : found[4]) floats += int64_t(place.end - place.start) / 4;
        return floats;
    }

    // Where it lies was looked at by check_external_data.
    int64_t external(const Fields &found, int64_t needed) const {
        std::map<std::string, std::string> entries;
        for (const Place &place : found[13]) {
            const Fields entry = read("Entry", place);
            entries[std::string(text(entry, 1))] = std::string(text(entry, 2));
        }
        if (!entries.count("location")) refuse("a tensor's data is in no file");
        const auto value = [&](const char *key) { return entries.count(key) ? std::stoll(entries[key]) : 0; };
        const int64_t length = value("length");
        return length ? length : std::min(sizes_.at(entries["location"]) - int64_t(value("offset")), needed);
    }

    std::vector<int64_t> shape_numbers(const Fields &found, int64_t kind, int64_t elements) const {
        if ((kind != 6 && kind != 7) || elements > schema::MAX_NUMBERS) return {};
        if (!found[13].empty()) refuse("a shape is in a data file");
        if (found[9].empty()) return numbers(found[found[5].empty() ? 7 : 5]);
        std::vector<int64_t> values;
        const string_view raw = text(found, 9);
        for (int64_t i = 0; i < elements; ++i) {
            int64_t wide = 0;
            int32_t narrow = 0;
            if (kind == 7) std::memcpy(&wide, raw.data() + i * 8, 8);
            if (kind == 6) std::memcpy(&narrow, raw.data() + i * 4, 4);
            values.push_back(kind == 7 ? wide : narrow);
        }
        return values;
    }

    // What comes of constants

    std::optional<Known> result(string_view name, const std::vector<string_view> &inputs, const Scope &scope,
                                const std::optional<Known> &value) const {
        if (name == "Constant") {
            if (!value) refuse("a Constant has no tensor");
            return value;
        }
        if (name == "Shape") {
            if (inputs.empty()) refuse("it is cut off");
            return shape_of(inputs[0], scope);
        }
        std::vector<const Known *> parts;
        size_t given = 0;
        for (const string_view input : inputs) {
            given += !input.empty();
            const auto found = input.empty() ? scope.known.end() : scope.known.find(input);
            if (found != scope.known.end()) parts.push_back(&found->second);
        }
        const bool alone = parts.size() == given &&
                           std::all_of(parts.begin(), parts.end(), [](const Known *part) { return part->constant; });
        if (parts.empty() && !alone) return std::nullopt;
        if (name == "Range" || shape_input(name) >= 0) return sized(name, inputs, scope, alone);
        std::vector<int64_t> found = numbers_of(name, parts);
        if (alone) return Known{elements_of(name, parts), std::move(found), true};
        if (found.empty()) return std::nullopt;
        return Known{0, std::move(found), false};
    }

    std::optional<Axes> axes_of(string_view name, const Scope &scope) const {
        if (const auto found = scope.axes.find(name); found != scope.axes.end()) return found->second;
        const auto place = scope.places.find(name);
        return place == scope.places.end() ? std::nullopt : value_of(place->second).axes;
    }

    Known shape_of(string_view input, const Scope &scope) const {
        const auto axes = axes_of(input, scope);
        if (!axes) {
            const auto known = scope.known.find(input);
            return {0, {std::max(schema::UNKNOWN_AXIS, known == scope.known.end() ? 0 : known->second.elements)}, false};
        }
        Known known{int64_t(axes->size()), {}, false};
        for (const int64_t axis : *axes) known.numbers.push_back(axis < 0 ? 1 : axis);
        if (known.numbers.empty()) known.numbers.push_back(1);
        return known;
    }

    static int shape_input(string_view name) {
        return name == "ConstantOfShape" ? 0 : name == "Expand" || name == "Tile" || name == "Pad" ? 1 : -1;
    }

    static std::optional<Known> sized(string_view name, const std::vector<string_view> &inputs, const Scope &scope, bool alone) {
        const auto about = [&](size_t i) {
            const auto found = i < inputs.size() ? scope.known.find(inputs[i]) : scope.known.end();
            return found == scope.known.end() ? nullptr : &found->second;
        };
        int64_t size = name == "Range" ? 0 : 1;
        size_t count = 0;
        for (size_t i = 0; name == "Range" && i < inputs.size(); ++i) {
            for (const int64_t value : about(i) ? about(i)->numbers : Axes()) size = sum(size, magnitude(value)), ++count;
        }
        if (name == "Range" && alone && count != 3) refuse("a Range of constants has no whole numbers");
        if (const Known *shape = name == "Range" ? nullptr : about(size_t(shape_input(name)))) {
            for (const int64_t value : shape->numbers) size = product(size, at_least_one(magnitude(value)));
            if (shape->numbers.empty() && shape->elements > 0)
                refuse(std::string(name) + " has a shape of " + number(shape->elements) + " numbers that are not in the file");
        }
        const Known *data = about(0);
        if ((name == "Tile" || name == "Pad") && data && data->constant) size = product(size, at_least_one(data->elements));
        if (size > schema::MAX_SIZED)
            refuse(std::string(name) + " makes " + number(size) + " elements by constants: " + number(schema::MAX_SIZED) +
                   " are the most");
        return alone ? std::optional(Known{size, {}, true}) : std::nullopt;
    }

    static std::vector<int64_t> numbers_of(string_view name, const std::vector<const Known *> &parts) {
        int64_t all = 1, added = 0, largest = 0;
        size_t longest = 0;
        std::vector<int64_t> joined;
        for (const Known *part : parts) {
            if (part->numbers.empty()) continue;
            int64_t most = 0;
            for (const int64_t value : part->numbers) most = std::max(most, magnitude(value));
            all = product(all, most), added = sum(added, most), largest = std::max(largest, most);
            longest = std::max(longest, part->numbers.size());
            joined.insert(joined.end(), part->numbers.begin(), part->numbers.end());
        }
        if (joined.empty()) return {};
        if (name == "Concat") return int64_t(joined.size()) <= schema::MAX_NUMBERS ? joined : Axes{all};
        const Axes &front = parts[0]->numbers;
        if (name == "Gather") {
            if (front.empty()) return {};
            int64_t most = 0;
            for (const int64_t value : front) most = std::max(most, magnitude(value));
            return Axes(size_t(std::clamp<int64_t>(parts.back()->elements, 1, schema::MAX_NUMBERS)), most);
        }
        if (name == "Max" || name == "Min" || name == "Where" || name == "Div" || name == "Neg" || name == "Abs")
            return Axes(longest, largest);
        if (name == "Mul") return Axes(longest, all);
        if (name == "Add" || name == "Sub") return Axes(longest, added);
        return has(schema::KEEPS, name) ? front : Axes();
    }

    static int64_t elements_of(string_view name, const std::vector<const Known *> &parts) {
        string_view growth;
        for (const auto &row : schema::GROWTH) growth = name == row.name ? row.how : growth;
        if (growth.empty() || parts.empty()) refuse("it has a " + std::string(name) + " of constants alone" + MORE);
        if (growth == "same") return parts[0]->elements;
        int64_t total = growth == "sum" ? 0 : 1;
        for (const Known *part : parts)
            total = growth == "sum" ? sum(total, part->elements) : product(total, at_least_one(part->elements));
        return total;
    }

    string_view data_;
    const std::map<std::string, int64_t> &sizes_;
    int64_t nodes_ = 0, tensors_ = 0, stored_ = 0, folded_ = 0;
};

}  // namespace

void check_model(std::string_view data, const Graph &graph, const std::map<std::string, int64_t> &sizes) {
    Check(data, sizes).model(graph);
}

void check_graph(const std::string &path, const Graph &graph, const std::map<std::string, int64_t> &sizes) {
    const std::string data = File(path, BUNDLE).read(schema::MAX_GRAPH);
    try {
        check_model(data, graph, sizes);
    } catch (const Error &error) {
        throw Error(BUNDLE, path + " is no graph of a bundle: " + error.what());
    }
}

}  // namespace cembed
