// cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]]: vectors over HTTP, on the loopback interface.
//
//     POST /embed    image/png, image/jpeg or text/plain; the answer is float32 [rows, dim], little-endian, with
//                    Cembed-Rows and Cembed-Dim
//     GET /health    200, or 503 while it drains
//     GET /metrics   for Prometheus
//
// CALLERS requests run at once, QUEUE more wait for up to SECONDS; any other is refused at once (429), as is one whose
// wait was too long (503). A connection has a thread of its own, so that slow ones cost no caller; where there are more
// connections than threads, each is closed after an answer, so that all get their turn. SIGTERM drains.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <malloc.h>
#include <sys/socket.h>

#include <cembed.hpp>
#include <httplib.h>

#include "picture.hpp"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int CONNECTIONS = 900;  // an httplib that calls select() takes 1024 files
constexpr size_t MAX_BODY = 32 << 20;
constexpr std::chrono::seconds IDLE(5);

// Runs jobs in so many threads, and lets so many more wait.
class Workers {
  public:
    enum Answer { DONE, FULL, LATE };

    Workers(int callers, int queue, std::chrono::seconds patience)
        : places_(size_t(callers + queue)),
          patience_(patience) {
        for (int i = 0; i < callers; ++i) threads_.emplace_back([this] { work(); });
    }

    ~Workers() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        work_there_.notify_all();
        for (auto &thread : threads_) thread.join();
    }

    Answer run(std::function<void()> call) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (waiting_.size() + running_ >= places_) return FULL;
        Job job{std::move(call), WAITING};
        waiting_.push_back(&job);
        work_there_.notify_one();
        progress_.wait_for(lock, patience_, [&] { return job.state != WAITING; });
        if (job.state == WAITING) {
            waiting_.remove(&job);
            return LATE;
        }
        progress_.wait(lock, [&] { return job.state == ENDED; });
        return DONE;
    }

    bool idle() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return waiting_.empty() && running_ == 0;
    }

  private:
    enum State { WAITING, RUNNING, ENDED };
    struct Job {
        std::function<void()> call;
        State state;
    };

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_there_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
            if (stop_) return;
            Job *job = waiting_.front();
            waiting_.pop_front();
            job->state = RUNNING;
            ++running_;
            lock.unlock();
            job->call();
            lock.lock();
            job->state = ENDED;
            --running_;
            progress_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_there_, progress_;
    std::list<Job *> waiting_;
    std::vector<std::thread> threads_;
    size_t running_ = 0;
    const size_t places_;
    const std::chrono::seconds patience_;
    bool stop_ = false;
};

// Threads for connections; how many there are is counted, with those that wait for a thread.
class Connections : public httplib::ThreadPool {
    using Answer = decltype(std::declval<httplib::ThreadPool &>().enqueue({}));  // depends on the version

  public:
    explicit Connections(std::atomic<int> &open) : ThreadPool(CONNECTIONS), open_(open) {}

    Answer enqueue(std::function<void()> serve) override {
        ++open_;
        return ThreadPool::enqueue([this, serve = std::move(serve)] {
            serve();
            --open_;
        });
    }

  private:
    std::atomic<int> &open_;
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
    response.set_content(reinterpret_cast<const char *>(flat.data), flat.size * sizeof(float),
                         "application/octet-stream");
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

void admit(Workers &workers, cembed::Bundle &bundle, const httplib::Request &request, httplib::Response &response) {
    const auto answer = workers.run([&] {
        try {
            embed(bundle, request, response);
        } catch (const std::bad_alloc &) {
            refuse(response, 503, "out of memory");
        }
    });
    if (answer == Workers::FULL) refuse(response, 429, "too many requests: try again");
    if (answer == Workers::LATE) refuse(response, 503, "overloaded: try again");
}

int number(int argc, char **argv, int i, int otherwise) {
    return argc > i ? std::max(0, std::atoi(argv[i])) : otherwise;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: cembed-service BUNDLE [PORT [CALLERS [QUEUE [SECONDS]]]]\n");
        return 2;
    }
    mallopt(M_MMAP_THRESHOLD, 1 << 20);  // else pages leave ever more holes: 2 GB after 300, and 80 MB with it
    sigset_t stop;                       // taken by the one thread that waits for them
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    pthread_sigmask(SIG_BLOCK, &stop, nullptr);
    auto bundle = cembed::Bundle::open(argv[1]);
    if (!bundle || cembed_load(bundle->get(), 1, 1) != CEMBED_OK) {
        std::fprintf(stderr, "cembed-service: %s\n", bundle ? cembed_error() : bundle.error().message.c_str());
        return 1;
    }
    Workers workers(std::max(1, number(argc, argv, 3, 2)), number(argc, argv, 4, 32),
                    std::chrono::seconds(number(argc, argv, 5, 10)));
    Metrics metrics;
    std::atomic<bool> draining{false};
    std::atomic<int> open{0};
    socket_t listener = INVALID_SOCKET;
    httplib::Server server;
    server.new_task_queue = [&open] { return new Connections(open); };
    server.set_socket_options([&listener](socket_t made) {  // not SO_REUSEPORT, httplib's own: two would share a port
        const int yes = 1;
        setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        listener = made;
    });
    server.set_tcp_nodelay(true);
    server.set_payload_max_length(MAX_BODY);
    server.set_read_timeout(IDLE);
    server.set_write_timeout(IDLE);
    server.set_keep_alive_timeout(IDLE.count());
    server.set_keep_alive_max_count(1000);
    server.Post("/embed", [&](const httplib::Request &request, httplib::Response &response) {
        const auto start = Clock::now();
        response.status = 200;
        admit(workers, *bundle, request, response);
        metrics.count(response.status, std::chrono::duration<double>(Clock::now() - start).count());
    });
    server.Get("/health", [&](const httplib::Request &, httplib::Response &response) {
        draining ? refuse(response, 503, "draining") : response.set_content("ok\n", "text/plain");
    });
    server.Get("/metrics", [&](const httplib::Request &, httplib::Response &response) {
        response.set_content(metrics.text(), "text/plain; version=0.0.4");
    });
    server.set_post_routing_handler([&](const httplib::Request &, httplib::Response &response) {
        if (draining || open > CONNECTIONS) response.set_header("Connection", "close");
    });
    const int port = number(argc, argv, 2, 8080);
    if (!server.bind_to_port("127.0.0.1", port) || listen(listener, SOMAXCONN) != 0) {  // httplib's backlog is 5
        std::fprintf(stderr, "cembed-service: port %d is taken\n", port);
        return 1;
    }
    std::thread([&, stop] {
        int signal = 0;
        sigwait(&stop, &signal);
        draining = true;
        server.stop();  // takes no more connections, and main() goes on when those that are open have their answers
        do {
            std::this_thread::sleep_for(IDLE);
        } while (!workers.idle());
        std::this_thread::sleep_for(IDLE);
        std::_Exit(0);  // what is still open sends its request a byte at a time
    }).detach();
    std::printf("listening on 127.0.0.1:%d\n", port);
    std::fflush(stdout);
    server.listen_after_bind();
    return 0;
}
