#include "embedder.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <memory>
#include <numeric>
#include <utility>

#include "contract.h"
#include "error.h"
#include "finite.h"
#include "positions.h"
#include "state.h"
#include "tensorrt.h"

namespace cembed {
namespace {

[[noreturn]] void wrong(const std::string &what) { throw Error(INVALID_ARGUMENT, what); }

ImageProcessing skipping(const Manifest &manifest, const std::optional<bool> &skip_blank) {
    if (skip_blank.value_or(false) && !manifest.reads_parts()) {
        wrong("skip_blank: pages of this bundle are read whole, as the places of patches are inside of its vision "
              "graph; export it again, or leave skip_blank out");
    }
    ImageProcessing image = manifest.image;
    image.skip_blank = skip_blank.value_or(image.skip_blank);
    return image;
}

ImageProcessing limited(const Manifest &manifest, ImageProcessing image, int64_t tokens) {
    const int64_t area = image.factor() * image.factor(), most = image.max_visual_tokens();
    if (tokens == 0) return image;
    if (image.resize == Resize::FIXED)
        wrong(manifest.backbone + " pages always take " + std::to_string(most) + " visual tokens");
    const int64_t least = (image.min_pixels + area - 1) / area;
    if (tokens < least || tokens > most) {
        wrong("max_visual_tokens is " + std::to_string(tokens) + ": this bundle takes " + std::to_string(least) +
              " to " + std::to_string(most));
    }
    image.max_pixels = tokens * area;
    return image;
}

// States [K, D] as one row, unless pooling is none; returns the number of rows.
int64_t pool(std::vector<float> &states, int64_t rows, int64_t length, Pooling pooling) {
    if (pooling == Pooling::NONE || rows == 0) return rows;
    if (pooling == Pooling::LAST) states.erase(states.begin(), states.end() - length);
    if (pooling == Pooling::MEAN) {
        for (int64_t i = length; i < rows * length; ++i) states[size_t(i % length)] += states[size_t(i)];
        states.resize(size_t(length));
        for (float &value : states) value /= float(rows);
    }
    return 1;
}

// The sums of squares of rows, `step` apart, of which the first `dim` values count. Throws Error(ENGINE) where one is
// NaN, infinite or 0 as float32 has it; `source` says what gave the rows.
std::vector<double> squares_of(const std::vector<float> &states, int64_t step, int64_t dim, const std::string &source) {
    std::vector<double> sums;
    for (auto row = states.begin(); row != states.end(); row += step)
        sums.push_back(std::inner_product(row, row + dim, row, 0.0));
    const std::vector<float> rounded(sums.begin(), sums.end());
    require_finite(rounded.data(), int64_t(rounded.size()), source);
    if (std::count(rounded.begin(), rounded.end(), 0.0f)) refuse_states(source, "zeros");
    return sums;
}

void normalise(const float *from, int64_t dim, double squares, float *to) {
    const auto norm = float(std::sqrt(squares));
    std::transform(from, from + dim, to, [norm](float value) { return value / norm; });
}

// Pairs [P, 2], of the patches that are `read` only if it is not empty.
template <class T>
std::vector<T> pairs_of(std::vector<T> pairs, const std::vector<bool> &read) {
    size_t kept = 0;
    for (size_t i = 0; !read.empty() && i < pairs.size(); ++i) {
        if (read[i / 2]) pairs[kept++] = pairs[i];
    }
    if (!read.empty()) pairs.resize(kept);
    return pairs;
}

Engines engines_of(Bundle &bundle, const EngineSettings &settings) {
    if (settings.provider == TENSORRT) return tensorrt_engines(bundle);
    check_provider(settings, bundle.manifest);
    return [&bundle, settings](const std::string &graph) {  // weights are hashed while the engine takes them in
        const std::string path = bundle.graph_path(graph);
        auto verified = std::async(std::launch::async, [&bundle, &graph] { bundle.verify_weights(graph); });
        std::unique_ptr<Engine> engine;
        try {
            engine = load_onnxruntime(path, settings_for(graph, settings, bundle.manifest));
        } catch (const Error &) {
            verified.get();  // what is wrong with the file says more
            throw;
        }
        verified.get();
        return engine;
    };
}

std::optional<Table> slot_table(Bundle &bundle) {
    if (!bundle.manifest.slot_embeddings) return std::nullopt;
    return bundle.table(*bundle.manifest.slot_embeddings);
}

}  // namespace

int64_t Prompt::last_position() const { return *std::max_element(positions.begin(), positions.end()); }

Embedder::Embedder(const std::string &path, const Settings &settings)
    : bundle(path, settings.trusted),
      manifest(bundle.manifest),
      image(limited(manifest, skipping(manifest, settings.skip_blank), settings.max_visual_tokens)),
      deepstack_width(cembed::deepstack_width(manifest)),
      state_memory(settings.state_memory),
      prompter_(Tokenizer::from_json(bundle.read(manifest.tokenizer)), manifest.image_token_id),
      tokens_(bundle.table(manifest.token_embeddings)),
      slots_(slot_table(bundle)),
      open_(engines_of(bundle, settings.engine)) {}

void Embedder::check_length(int64_t length) const {
    if (length > manifest.max_sequence_length) {
        wrong("the input takes " + std::to_string(length) + " positions, the model has " +
              std::to_string(manifest.max_sequence_length));
    }
}

void Embedder::check_page(int64_t length, int64_t images) const {
    if (length > manifest.max_sequence_length && images > 1) {
        wrong("the page takes " + std::to_string(length) + " positions in " + std::to_string(images) +
              " tiles, the model has " + std::to_string(manifest.max_sequence_length) + ": lower max_visual_tokens");
    }
    check_length(length);
}

void Embedder::check(const Side &side, const Budget &budget) const {
    if (budget.num_vectors < 0) side.check_budget(budget.num_vectors);
    if (!side.num_vectors && (budget.num_vectors != 0 || budget.loop))
        wrong("this bundle makes one vector for every token: there is no budget and no loop");
    if (budget.num_vectors != 0) {
        side.check_budget(budget.num_vectors);
        check_length(budget.num_vectors);
    }
    const int64_t length = side.vector_dim(manifest.dim, budget.num_vectors);
    if (budget.dim < 0 || budget.dim > length)
        wrong("dim is " + std::to_string(budget.dim) + ": this bundle's vectors have " + std::to_string(length));
}

Prompt Embedder::document(const Rgb &page) {
    const PixelValues pixels = preprocess(page, image);
    const int64_t num_visual_tokens = pixels.num_patches() / (image.merge_size * image.merge_size);
    check_page(num_visual_tokens, pixels.images);
    auto ids = page_ids(pixels);
    std::vector<int64_t> positions = positions_of(ids, pixels.grid);
    if (!image.tiles && !pixels.read.empty()) leave_out(pixels.read, ids, positions);
    check_page(int64_t(ids.size()), pixels.images);
    Prompt made = prompt(ids, std::move(positions));
    made.after = Activations::RELEASE;
    const auto features = image_features(pixels);
    auto from = features.begin();
    for (std::ptrdiff_t i = 0; i < made.length; ++i) {
        if (ids[size_t(i)] != manifest.image_token_id) continue;
        std::copy_n(from, manifest.hidden_size, made.embeds.begin() + i * manifest.hidden_size);
        from += manifest.hidden_size;
        std::copy_n(from, deepstack_width, made.deepstack.begin() + i * deepstack_width);
        from += deepstack_width;
    }
    return made;
}

Prompt Embedder::query(std::string_view text) {
    const auto ids = prompter_.query(manifest.query.prompt, text);
    return prompt(ids, positions_of(ids, std::nullopt));
}

// `input_ids` of a page of which all is read; of tiles only those that are.
std::vector<int64_t> Embedder::page_ids(const PixelValues &pixels) const {
    const int64_t patches = image.input_patches() ? image.input_patches() : pixels.grid.height * pixels.grid.width;
    const int64_t tokens = patches / (image.merge_size * image.merge_size);
    const std::string text =
        page_prompt(manifest.document.prompt, image, pixels.grid, image.tiles ? pixels.read : std::vector<bool>());
    auto ids = prompter_.document(text, tokens);
    if (std::count(ids.begin(), ids.end(), manifest.image_token_id) != tokens * pixels.images)
        throw Error(BUNDLE, "the bundle's document prompt must contain {image} exactly once");
    return ids;
}

// Takes the visual tokens that are not `read` out of a prompt; the others stay where they are.
void Embedder::leave_out(const std::vector<bool> &read, std::vector<int64_t> &ids,
                         std::vector<int64_t> &positions) const {
    std::vector<bool> stays;
    auto next = read.begin();
    for (const int64_t id : ids) stays.push_back(id != manifest.image_token_id || *next++);
    size_t kept = 0;
    for (size_t i = 0; i < positions.size(); ++i) {
        if (stays[i % ids.size()]) positions[kept++] = positions[i];
    }
    positions.resize(kept);
    kept = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (stays[i]) ids[kept++] = ids[i];
    }
    ids.resize(kept);
}

std::vector<int64_t> Embedder::positions_of(const std::vector<int64_t> &ids, const std::optional<Grid> &grid) const {
    return prompt_positions(ids, manifest.image_token_id, grid, manifest.positions, image.merge_size);
}

Prompt Embedder::prompt(const std::vector<int64_t> &ids, std::vector<int64_t> positions) const {
    Prompt made;
    made.length = int64_t(ids.size());
    check_length(made.length);
    if (ids.empty()) throw Error(BUNDLE, "the bundle's prompt is empty");
    made.positions = std::move(positions);
    made.embeds.resize(ids.size() * size_t(manifest.hidden_size));
    made.deepstack.resize(ids.size() * size_t(deepstack_width));
    for (size_t i = 0; i < ids.size(); ++i) tokens_.read(ids[i], &made.embeds[i * size_t(manifest.hidden_size)]);
    return made;
}

std::vector<float> Embedder::image_features(const PixelValues &pixels) {
    const Graph &graph = bundle.graph("vision");
    const int64_t merged = image.merge_size * image.merge_size;
    const int64_t patches = pixels.num_patches(), tokens = patches / merged;
    std::vector<bool> read;  // by patch
    for (size_t i = 0; !image.tiles && i < pixels.read.size(); ++i)
        read.insert(read.end(), size_t(merged), pixels.read[i]);
    const std::vector<int64_t> shape{1, patches / pixels.images, 3 * image.patch_size * image.patch_size};
    float *const values = const_cast<float *>(pixels.values.data());
    std::vector<Tensor> inputs{{"pixel_values", Type::FLOAT32, shape, values}};
    std::vector<int64_t> places, restore;
    std::vector<float> fractions;
    Windows windows;
    if (graph.takes("patch_positions")) {
        places = pairs_of(patch_positions(pixels.grid, image.merge_size), read);
        inputs.emplace_back("patch_positions", std::vector<int64_t>{patches, 2}, places);
    }
    if (graph.takes("patch_fractions")) {
        fractions = pairs_of(patch_fractions(pixels.grid, image.merge_size), read);
        inputs.emplace_back("patch_fractions", std::vector<int64_t>{patches, 2}, fractions);
    }
    if (graph.takes("window_index")) {
        if (image.window_size == 0) throw Error(BUNDLE, "the bundle's vision graph takes windows of no size");
        windows = window_index(pixels.grid, image);
        if (!read.empty()) windows = windows_read(windows, read);
        restore = window_restore(windows.index, patches);
        inputs.emplace_back("window_index", std::vector<int64_t>{windows.count, windows.length}, windows.index);
        inputs.emplace_back("window_restore", std::vector<int64_t>{patches}, restore);
    }
    const int64_t width = manifest.hidden_size + deepstack_width;
    std::vector<float> features(size_t(tokens * width));
    std::vector<Tensor> outputs{
        {graph.outputs.at(0).name, Type::FLOAT32, {1, tokens / pixels.images, width}, features.data()}};
    // Tiles are run one by one: the processor's caches hold what is between the layers.
    for (int64_t i = 0; i < pixels.images; ++i) {
        inputs[0].data = values + i * (pixels.values.size() / pixels.images);
        outputs[0].data = features.data() + i * (features.size() / pixels.images);
        engine("vision").run(inputs, outputs, i + 1 < pixels.images ? Activations::KEEP : Activations::RELEASE);
    }
    require_finite(features.data(), int64_t(features.size()), "graph vision, of this image,");
    return features;
}

Vectors Embedder::embed(const Side &side, const Prompt &made, const Budget &budget) {
    const int64_t num_vectors = budget.num_vectors ? budget.num_vectors : side.num_vectors.value_or(0);
    if (!budget.loop && side.slots != Slots::FEEDBACK)
        return finish(side, single_pass(side, made, num_vectors), budget.dim, "text");
    State state(*this, side, made, num_vectors);
    state.grow(num_vectors);
    return finish(side, state.states(num_vectors), budget.dim, "text_step");
}

std::vector<float> Embedder::single_pass(const Side &side, const Prompt &made, int64_t num_vectors) {
    const int64_t slots = num_vectors ? side.num_slots(num_vectors) : 0, length = made.length + slots;
    const int64_t rows = num_vectors ? num_vectors : side.pooling == Pooling::LAST ? 1 : length;
    const int64_t axes = manifest.positions.axes;
    check_length(length);
    const auto after = cembed::slot_positions(made.positions, axes, slots, side.slot_positions);
    std::vector<int64_t> positions;
    for (int64_t axis = 0; axis < axes; ++axis) {
        positions.insert(positions.end(), &made.positions[size_t(axis * made.length)],
                         &made.positions[size_t(axis * made.length)] + made.length);
        positions.insert(positions.end(), after.begin() + axis * slots, after.begin() + (axis + 1) * slots);
    }
    std::vector<float> embeds = made.embeds, deepstack = made.deepstack;
    add_slot_rows(side, 0, slots, embeds);
    deepstack.resize(size_t(length * deepstack_width));
    std::vector<int64_t> indices(static_cast<size_t>(rows));
    std::iota(indices.begin(), indices.end(), length - rows);
    const std::vector<int64_t> prompt_length{made.length};
    const Graph &graph = bundle.graph("text");
    std::vector<Tensor> inputs{{"inputs_embeds", {1, length, manifest.hidden_size}, embeds},
                               {"position_ids", {axes, 1, length}, positions},
                               {"slot_indices", {1, rows}, indices}};
    if (deepstack_width)
        inputs.emplace_back(DEEPSTACK, std::vector<int64_t>{1, length, deepstack_width}, deepstack);
    if (graph.takes("prompt_length")) inputs.emplace_back("prompt_length", std::vector<int64_t>{1}, prompt_length);
    std::vector<float> states(size_t(rows * manifest.dim));
    const std::vector<Tensor> outputs{{graph.outputs.at(0).name, {1, rows, manifest.dim}, states}};
    engine("text").run(inputs, outputs, made.after);
    return states;
}

void Embedder::add_slot_rows(const Side &side, int64_t first, int64_t count, std::vector<float> &to) const {
    const bool learned = side.slots == Slots::LEARNED;
    for (int64_t i = 0; i < count; ++i) {
        to.resize(to.size() + size_t(manifest.hidden_size));
        float *row = &to[to.size() - size_t(manifest.hidden_size)];
        learned ? slots_->read((*side.slot_rows)[0] + first + i, row)
                : tokens_.read(side.latent_token_id.value_or(-1), row);
    }
}

Vectors Embedder::finish(const Side &side, std::vector<float> states, int64_t dim, const std::string &graph) const {
    const std::string source = "graph " + graph + (&side == &manifest.document ? ", of this image," : ", of this query,");
    const int64_t count = int64_t(states.size()) / manifest.dim;
    Vectors vectors;
    vectors.rows = pool(states, count, manifest.dim, side.pooling);
    const int64_t length = side.pooling == Pooling::CONCAT ? int64_t(states.size()) : manifest.dim;
    vectors.dim = dim ? dim : length;
    vectors.values.resize(size_t(vectors.rows * vectors.dim));
    const std::vector<double> squares = squares_of(states, length, vectors.dim, source);
    for (int64_t i = 0; i < vectors.rows; ++i)
        normalise(&states[size_t(i * length)], vectors.dim, squares[size_t(i)], &vectors.values[size_t(i * vectors.dim)]);
    return vectors;
}

const Engine &Embedder::engine(const std::string &graph) {
    std::unique_lock<std::mutex> all(lock_);
    Opened &opened = engines_[graph];
    all.unlock();
    const std::lock_guard<std::mutex> guard(opened.lock);
    if (!opened.engine) opened.engine = open_(graph);
    return *opened.engine;
}

}  // namespace cembed
