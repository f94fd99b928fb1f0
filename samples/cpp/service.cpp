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
#include <charconv>
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
#include <string_view>
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
class Connections : public httplib::TaskQueue {
    using Answer = decltype(std::declval<httplib::TaskQueue &>().enqueue({}));  // depends on the version

  public:
    explicit Connections(std::atomic<int> &open) : open_(open) {}

    Answer enqueue(std::function<void()> serve) override {
        ++open_;
        return threads_.enqueue([this, serve = std::move(serve)] {
            serve();
            --open_;
        });
    }

    void shutdown() override { threads_.shutdown(); }

  private:
    httplib::ThreadPool threads_{CONNECTIONS};
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

struct Number {
    int value, least, most;

    bool read(std::string_view text) {
        const auto [rest, error] = std::from_chars(text.begin(), text.end(), value);
        return error == std::errc() && rest == text.end() && value >= least && value <= most;
    }
};

class Service {
  public:
    Service(cembed::Bundle bundle, int callers, int queue, int seconds)
        : bundle_(std::move(bundle)),
          workers_(callers, queue, std::chrono::seconds(seconds)) {
        set_limits();
        set_answers();
    }

    bool bind(int port) {
        return server_.bind_to_port("127.0.0.1", port) && listen(socket_, SOMAXCONN) == 0;  // httplib's backlog is 5
    }

    void serve() { server_.listen_after_bind(); }

    // Takes no more connections; serve() returns when those that are open have their answers.
    void drain() {
        draining_ = true;
        server_.stop();
        do {
            std::this_thread::sleep_for(IDLE);
        } while (!workers_.idle());
        std::this_thread::sleep_for(IDLE);
        std::_Exit(0);  // what is still open sends its request a byte at a time
    }

  private:
    void set_limits() {
        server_.new_task_queue = [this] { return new Connections(open_); };
        server_.set_socket_options([this](socket_t made) {  // httplib's own would let two services share a port
            const int yes = 1;
            setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
            socket_ = made;
        });
        server_.set_tcp_nodelay(true);
        server_.set_payload_max_length(MAX_BODY);
        server_.set_read_timeout(IDLE);
        server_.set_write_timeout(IDLE);
        server_.set_keep_alive_timeout(IDLE.count());
        server_.set_keep_alive_max_count(1000);
    }

    void set_answers() {
        server_.Post("/embed", [this](const httplib::Request &request, httplib::Response &response) {
            const auto start = Clock::now();
            response.status = 200;
            admit(workers_, bundle_, request, response);
            metrics_.count(response.status, std::chrono::duration<double>(Clock::now() - start).count());
        });
        server_.Get("/health", [this](const httplib::Request &, httplib::Response &response) {
            draining_ ? refuse(response, 503, "draining") : response.set_content("ok\n", "text/plain");
        });
        server_.Get("/metrics", [this](const httplib::Request &, httplib::Response &response) {
            response.set_content(metrics_.text(), "text/plain; version=0.0.4");
        });
        server_.set_post_routing_handler([this](const httplib::Request &, httplib::Response &response) {
            if (draining_ || open_ > CONNECTIONS) response.set_header("Connection", "close");
        });
    }

    cembed::Bundle bundle_;
    Workers workers_;
    Metrics metrics_;
    std::atomic<bool> draining_{false};
    std::atomic<int> open_{0};
    socket_t socket_ = INVALID_SOCKET;
    httplib::Server server_;
};

}  // namespace

int main(int argc, char **argv) {
    Number port{8080, 1, 65535}, callers{2, 1, 256}, queue{32, 0, CONNECTIONS}, seconds{10, 1, 3600};
    Number *numbers[] = {&port, &callers, &queue, &seconds};
    bool right = argc >= 2 && argc <= 6;
    for (int i = 2; right && i < argc; ++i) right = numbers[i - 2]->read(argv[i]);
    if (!right) {
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
    Service service(std::move(*bundle), callers.value, queue.value, seconds.value);
    if (!service.bind(port.value)) {
        std::fprintf(stderr, "cembed-service: port %d is taken\n", port.value);
        return 1;
    }
    std::thread([&service, stop] {
        int signal = 0;
        sigwait(&stop, &signal);
        service.drain();
    }).detach();
    std::printf("listening on 127.0.0.1:%d\n", port.value);
    std::fflush(stdout);
    service.serve();
    std::_Exit(0);  // the thread above may still look at the service, which must not go before it
}
