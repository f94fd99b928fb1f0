// cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]]: vectors over HTTP, on the loopback interface.
//
//     POST /embed    image/png, image/jpeg or text/plain; float32 [rows, dim], little-endian, with Cembed-Rows and Cembed-Dim
//     GET /health    200, or 503 while it drains
//     GET /metrics   for Prometheus
//
// CALLERS requests run at once, QUEUE more wait for up to SECONDS; any other is refused at once (429), as is one whose
// wait was too long (503). A connection has a thread of its own, so that slow ones cost no caller. SIGTERM drains.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include <cembed.hpp>
#include <httplib.h>

#include "picture.hpp"

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t CONNECTIONS = 900;  // select() takes 1024 files
constexpr size_t MAX_BODY = 32 << 20;
constexpr int IDLE_SECONDS = 5;

// Lets so many run at once, and so many more wait.
class Gate {
  public:
    enum Answer { ENTERED, FULL, LATE };

    Gate(int callers, int queue, std::chrono::seconds patience) : free_(callers), places_(queue), patience_(patience) {}

    Answer enter() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (free_ == 0 && places_ == 0) return FULL;
        if (free_ == 0) {
            --places_;
            const bool in_time = turn_.wait_for(lock, patience_, [this] { return free_ > 0; });
            ++places_;
            if (!in_time) return LATE;
        }
        --free_;
        return ENTERED;
    }

    void leave() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ++free_;
        }
        turn_.notify_one();
    }

  private:
    std::mutex mutex_;
    std::condition_variable turn_;
    int free_, places_;
    const std::chrono::seconds patience_;
};

class Metrics {
  public:
    void count(int status, double seconds) {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++answers_[status];
        seconds_ += seconds;
    }

    std::string text() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string text = "# TYPE cembed_answers_total counter\n";
        for (const auto &[status, count] : answers_)
            text += "cembed_answers_total{status=\"" + std::to_string(status) + "\"} " + std::to_string(count) + "\n";
        return text + "# TYPE cembed_seconds_total counter\ncembed_seconds_total " + std::to_string(seconds_) + "\n";
    }

  private:
    std::mutex mutex_;
    std::map<int, long> answers_;
    double seconds_ = 0;
};

void refuse(httplib::Response &response, int status, const std::string &why) {
    response.status = status;
    response.set_content(why + "\n", "text/plain");
    if (status == 429 || status == 503) response.set_header("Retry-After", "1");
}

int status_of(const cembed::Error &error) {
    return error.status == CEMBED_ARGUMENT ? 422 : error.status == CEMBED_MEMORY ? 503 : 500;
}

void give(const cembed::Vectors &vectors, httplib::Response &response) {
    response.set_header("Cembed-Rows", std::to_string(vectors.rows()));
    response.set_header("Cembed-Dim", std::to_string(vectors.dim()));
    const auto flat = vectors.flat();
    response.set_content(reinterpret_cast<const char *>(flat.data), flat.size * sizeof(float), "application/octet-stream");
}

// What is decoded is decoded by a caller: images of all who wait would take much memory.
void embed(cembed::Bundle &bundle, const httplib::Request &request, httplib::Response &response) {
    const std::string type = request.get_header_value("Content-Type");
    const bool is_image = type == "image/png" || type == "image/jpeg";
    if (!is_image && type.rfind("text/plain", 0) != 0)
        return refuse(response, 415, "send image/png, image/jpeg or text/plain");
    const auto picture = is_image ? Picture::decode(request.body) : std::nullopt;
    if (is_image && !picture) return refuse(response, 422, "no PNG or JPEG that can be read");
    auto vectors = is_image ? bundle.embed(picture->image()) : bundle.embed(request.body);
    vectors ? give(*vectors, response) : refuse(response, status_of(vectors.error()), vectors.error().message);
}

void admit(Gate &gate, cembed::Bundle &bundle, const httplib::Request &request, httplib::Response &response) {
    switch (gate.enter()) {
        case Gate::FULL: return refuse(response, 429, "too many requests: try again");
        case Gate::LATE: return refuse(response, 503, "overloaded: try again");
        case Gate::ENTERED: break;
    }
    struct Leave {
        Gate &gate;
        ~Leave() { gate.leave(); }
    } leave{gate};
    embed(bundle, request, response);
}

int number(int argc, char **argv, int i, int otherwise) { return argc > i ? std::max(0, std::atoi(argv[i])) : otherwise; }

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]]\n");
        return 2;
    }
    sigset_t stop;  // taken by the one thread that waits for them
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    pthread_sigmask(SIG_BLOCK, &stop, nullptr);
    auto bundle = cembed::Bundle::open(argv[1]);
    if (!bundle || cembed_load(bundle->get(), 1, 1) != CEMBED_OK) {
        std::fprintf(stderr, "cembed-service: %s\n", bundle ? cembed_error() : bundle.error().message.c_str());
        return 1;
    }
    Gate gate(std::max(1, number(argc, argv, 3, 2)), number(argc, argv, 4, 32), std::chrono::seconds(number(argc, argv, 5, 10)));
    Metrics metrics;
    std::atomic<bool> draining{false};
    httplib::Server server;
    server.new_task_queue = [] { return new httplib::ThreadPool(CONNECTIONS); };
    server.set_payload_max_length(MAX_BODY);
    server.set_read_timeout(IDLE_SECONDS);
    server.set_write_timeout(IDLE_SECONDS);
    server.set_keep_alive_timeout(IDLE_SECONDS);
    server.set_keep_alive_max_count(1000);
    server.Post("/embed", [&](const httplib::Request &request, httplib::Response &response) {
        const auto start = Clock::now();
        response.status = 200;
        admit(gate, *bundle, request, response);
        metrics.count(response.status, std::chrono::duration<double>(Clock::now() - start).count());
    });
    server.Get("/health", [&](const httplib::Request &, httplib::Response &response) {
        draining ? refuse(response, 503, "draining") : response.set_content("ok\n", "text/plain");
    });
    server.Get("/metrics", [&](const httplib::Request &, httplib::Response &response) {
        response.set_content(metrics.text(), "text/plain; version=0.0.4");
    });
    const int port = number(argc, argv, 2, 8080);
    if (!server.bind_to_port("127.0.0.1", port)) {
        std::fprintf(stderr, "cembed-service: port %d is taken\n", port);
        return 1;
    }
    std::thread([&server, &draining, stop] {
        int signal = 0;
        sigwait(&stop, &signal);
        draining = true;
        server.stop();  // takes no more connections; those that are open get their answers
    }).detach();
    std::printf("listening on 127.0.0.1:%d\n", port);
    std::fflush(stdout);
    server.listen_after_bind();
    return 0;
}
