// cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]] [--host ADDRESS] [--allow-host NAME]...: vectors over HTTP.
//
//     POST /embed    image/png, image/jpeg or text/plain; the answer is float32 [rows, dim], little-endian, with
//                    Cembed-Rows and Cembed-Dim
//     GET /health    200, or 503 while it drains
//     GET /metrics   for Prometheus
//
// CALLERS requests run at once, QUEUE more wait for up to SECONDS; any other is refused at once (429), as is one whose
// wait was too long (503). It listens on 127.0.0.1, and answers requests to localhost or a loopback address; to others
// it does with --host and --allow-host. SIGTERM drains. What a client may take is in http.hpp.
//
// For systemd it is of Type=notify; its watchdog hears of it as long as requests are read and computed.
#include <charconv>
#include <cstdio>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <malloc.h>

#include <cembed.hpp>

#include "notify.hpp"
#include "picture.hpp"
#include "server.hpp"

namespace {

struct Number {
    int value, least, most;

    bool read(std::string_view text) {
        const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        return error == std::errc() && rest == text.data() + text.size() && value >= least && value <= most;
    }
};

struct Arguments {
    std::string bundle;
    Number port{8080, 1, 65535}, callers{2, 1, 256}, queue{32, 0, 512}, seconds{10, 1, 3600};
    boost::asio::ip::address host = boost::asio::ip::address_v4::loopback();
    std::vector<std::string> names;

    bool read(const std::vector<std::string> &words) {
        size_t place = 0;
        bool right = true;
        for (size_t i = 0; i < words.size() && right; ++i) {
            const bool is_option = words[i].substr(0, 2) == "--";
            right = is_option ? i + 1 < words.size() && option(words[i], words[i + 1]) : argument(place++, words[i]);
            i += is_option;
        }
        return right && !bundle.empty();
    }

  private:
    bool option(const std::string &name, const std::string &value) {
        boost::system::error_code error;
        if (name == "--allow-host") names.push_back(value);
        if (name == "--host") host = boost::asio::ip::make_address(value, error);
        return !error && (name == "--allow-host" || name == "--host");
    }

    bool argument(size_t place, const std::string &word) {
        Number *const numbers[] = {&port, &callers, &queue, &seconds};
        if (place == 0) bundle = word;
        return place == 0 || (place <= 4 && numbers[place - 1]->read(word));
    }
};

web::Reply refusal(const cembed::Error &error) {
    if (error.status == CEMBED_ARGUMENT) return web::refusal(422, error.message);
    if (error.status == CEMBED_MEMORY) return web::refusal(503, "out of memory");
    std::fprintf(stderr, "cembed-service: %s\n", error.message.c_str());  // it may name files, which are no client's
    return web::refusal(500, "the model failed");
}

web::Reply give(cembed::Result<cembed::Vectors> vectors) {
    if (!vectors) return refusal(vectors.error());
    const auto flat = vectors->flat();
    return {200,
            {reinterpret_cast<const char *>(flat.data), flat.size * sizeof(float)},
            "application/octet-stream",
            {{"Cembed-Rows", std::to_string(vectors->rows())}, {"Cembed-Dim", std::to_string(vectors->dim())}}};
}

web::Reply vectors_of(cembed::Bundle &bundle, const web::Request &request) {
    if (web::media_type(request) == "text/plain") return give(bundle.embed(request.body()));
    const Picture picture(request.body());
    return picture.fault() ? web::refusal(422, picture.fault()) : give(bundle.embed(picture.image()));
}

web::Reply embed(cembed::Bundle &bundle, const web::Request &request) {
    try {
        return vectors_of(bundle, request);
    } catch (const std::bad_alloc &) {
        return web::refusal(503, "out of memory");
    }
}

web::Reply metrics(const web::Server &server) {
    std::string text = "# TYPE cembed_answers_total counter\n";
    for (const auto &[status, count] : server.counts().answers)
        text += "cembed_answers_total{status=\"" + std::to_string(status) + "\"} " + std::to_string(count) + "\n";
    const std::pair<const char *, std::string> others[] = {
        {"cembed_seconds_total counter", std::to_string(server.counts().seconds)},
        {"cembed_dropped_total counter", std::to_string(server.counts().dropped)},
        {"cembed_connections gauge", std::to_string(server.connections())},
        {"cembed_held_bytes gauge", std::to_string(server.held())}};
    for (const auto &[name, value] : others) {
        const std::string type = name;
        text += "# TYPE " + type + "\n" + type.substr(0, type.find(' ')) + " " + value + "\n";
    }
    return {200, text, "text/plain; version=0.0.4"};
}

void set_routes(web::Server &server, cembed::Bundle &bundle) {
    using boost::beast::http::verb;
    const auto vectors = [&bundle](const web::Request &request) { return embed(bundle, request); };
    const auto health = [&server](const web::Request &) {
        return server.draining() ? web::refusal(503, "draining") : web::Reply(200, "ok\n");
    };
    const auto numbers = [&server](const web::Request &) { return metrics(server); };
    const size_t page = web::MOST_BODY, text = web::MOST_TEXT;
    server.routes["/embed"] = {verb::post, vectors, {{"image/jpeg", page}, {"image/png", page}, {"text/plain", text}}};
    server.routes["/health"] = {verb::get, health, {}};
    server.routes["/metrics"] = {verb::get, numbers, {}};
}

int serve(const Arguments &arguments, cembed::Bundle &bundle) {
    web::Server server(size_t(arguments.callers.value), size_t(arguments.queue.value),
                       web::seconds(arguments.seconds.value));
    const std::string address = arguments.host.to_string();
    const std::string host = arguments.host.is_v6() ? "[" + address + "]" : address;
    server.hosts.allow(host);
    for (const std::string &name : arguments.names) server.hosts.allow(name);
    set_routes(server, bundle);
    const int port = arguments.port.value;
    try {
        server.listen({arguments.host, uint16_t(port)});
    } catch (const boost::system::system_error &error) {
        const bool taken = error.code() == boost::asio::error::address_in_use;
        std::fprintf(stderr, "cembed-service: port %d %s\n", port, taken ? "is taken" : error.what());
        return 1;
    }
    std::printf("listening on %s:%d\n", host.c_str(), port);
    std::fflush(stdout);
    Notifier notifier;
    server.alive = [&notifier] { notifier.alive(); };
    server.stopping = [&notifier] { notifier.stopping(); };
    notifier.ready("listening on " + host + ":" + std::to_string(port));
    server.run();
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    Arguments arguments;
    if (!arguments.read({argv + 1, argv + argc})) {
        std::fprintf(stderr, "usage: cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]] [--host ADDRESS] "
                             "[--allow-host NAME]...\n");
        return 2;
    }
    mallopt(M_MMAP_THRESHOLD, 1 << 20);  // else pages leave ever more holes: 2 GB after 300, and 80 MB with it
    auto bundle = cembed::Bundle::open(arguments.bundle);
    if (!bundle || cembed_load(bundle->get(), 1, 1) != CEMBED_OK) {
        std::fprintf(stderr, "cembed-service: %s\n", bundle ? cembed_error() : bundle.error().message.c_str());
        return 1;
    }
    return serve(arguments, *bundle);
}
