// A server for a few routes: one thread reads and writes, a few others compute.
//
// What clients send, or leave undone, takes no more than the limits of http.hpp. A request is judged by its header, and
// refused before its body is read. Where connections or memory run out, the client that has kept the server waiting
// for longest is dropped; never one that has its place in the queue. A body has no place there before it is whole, so
// that slow ones keep nobody out. Who was refused, or does not wait for an answer, is not read for a tenth of a second:
// else they would take all the time.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <poll.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>

#include "http.hpp"

namespace web {

class Server {
    using tcp = asio::ip::tcp;
    using Clock = std::chrono::steady_clock;

  public:
    struct Counts {
        std::map<unsigned, uint64_t> answers;  // by status, without those that were right and at once
        double seconds = 0;                    // until these
        uint64_t dropped = 0;                  // connections
    };

    // So many callers compute at once; so many requests more wait, each for so long.
    Server(size_t callers, size_t queue, seconds patience)
        : pool_(callers),
          places_(callers + queue),
          times_{IDLE_TIME, HEADER_TIME, BODY_TIME, patience, WRITE_TIME, seconds(0), GRACE} {}

    Hosts hosts;
    std::map<std::string, Route> routes;
    std::function<void()> alive = [] {};     // called while requests are read and a caller takes them, not else
    std::function<void()> stopping = [] {};  // once SIGTERM or SIGINT came

    bool draining() const { return draining_; }
    const Counts &counts() const { return counts_; }
    size_t connections() const { return sessions_.size(); }
    size_t held() const { return held_; }

    // Throws boost::system::system_error.
    void listen(const tcp::endpoint &here) {
        acceptor_.open(here.protocol());
        acceptor_.set_option(tcp::acceptor::reuse_address(true));
        acceptor_.set_option(asio::socket_base::send_buffer_size(KERNEL_BUFFER));
        acceptor_.set_option(asio::socket_base::receive_buffer_size(KERNEL_BUFFER));
        acceptor_.bind(here);
        acceptor_.listen();
        acceptor_.non_blocking(true);
    }

    // Returns when all that SIGTERM or SIGINT found has been answered.
    void run() {
        signals_.async_wait([this](error_code error, int) {
            if (!error) drain();
        });
        accept();
        tick();
        while (!run_on()) continue;
        pool_.join();
    }

  private:
    enum State { IDLE, HEADER, BODY, WAITING, WRITING, PAUSED, LEAVING };

    static constexpr unsigned CLIENT_LEFT = 499;  // is counted, and not sent

    // What a caller computes; either it begins with it, or the wait ends before.
    struct Job {
        Job(Request request_, const Route &route_) : request(std::move(request_)), route(route_) {}
        Request request;
        const Route &route;
        std::atomic<bool> begun{false};
    };

    class Session : public std::enable_shared_from_this<Session> {
      public:
        Session(Server &server, tcp::socket socket) : server_(server), socket_(std::move(socket)) {}

        void start(std::list<std::shared_ptr<Session>>::iterator place) {
            error_code error;
            place_ = place;
            socket_.non_blocking(true, error);
            socket_.set_option(tcp::no_delay(true), error);
            enter(IDLE);
            guard([this] { take(); });
        }

        bool is_late(Clock::time_point now) const { return now > deadline_; }
        bool has_place() const { return state_ == WAITING; }
        bool is_slow(Clock::time_point now) const { return !has_place() && now - since_ >= GRACE; }
        Clock::time_point accepted() const { return accepted_; }

        void be_late() {
            guard([this] {
                if (state_ == PAUSED) return read_header();
                if (state_ == HEADER || state_ == BODY) return give_up(refusal(408, "too slow"));
                if (!has_place()) return state_ == WRITING ? drop() : close();
                deadline_ = Clock::time_point::max();
                if (job_->begun.exchange(true)) return;
                job_->request = {};  // a caller may keep the job for longer
                computed(refusal(503, "overloaded: try again"));
            });
        }

        void hurry() {
            const auto soon = Clock::now() + (state_ == IDLE ? GRACE : DRAIN);
            if (!has_place()) deadline_ = std::min(deadline_, soon);
        }

        void drop() {
            ++server_.counts_.dropped;
            close();
        }

        size_t held = 0;

      private:
        void enter(State state) {
            server_.taken_ += (state == WAITING) - has_place();
            state_ = state;
            since_ = Clock::now();
            deadline_ = since_ + server_.times_[state];
            if (server_.draining_) hurry();
            server_.sessions_.splice(server_.sessions_.end(), server_.sessions_, place_);
        }

        void close() {
            if (!socket_.is_open()) return;
            const auto self = shared_from_this();
            error_code error;
            if (state_ == WRITING) socket_.set_option(asio::socket_base::linger(true, 0), error);  // forgets the rest
            socket_.close(error);
            server_.taken_ -= has_place();
            server_.hold(*this, 0);
            server_.sessions_.erase(place_);
        }

        // All that is done for an event is done in here.
        template <class Step>
        void guard(const Step &step) {
            try {
                if (socket_.is_open()) step();
            } catch (const std::bad_alloc &) {
                drop();
            }
        }

        void wait() {
            if (std::exchange(reading_, true)) return;
            socket_.async_wait(tcp::socket::wait_read, [self = shared_from_this()](error_code error) {
                self->reading_ = false;
                if (!error) self->guard([&] { self->take(); });
            });
        }

        void take() {
            if (has_place() || state_ == WRITING || state_ == PAUSED) return;  // it was late
            std::array<char, MOST_HEADER> bytes;
            const size_t room = bytes.size() - (state_ == HEADER ? input_.size() : 0);
            error_code error;
            const size_t size = socket_.read_some(asio::buffer(bytes.data(), room), error);
            if (error && error != asio::error::would_block) return close();
            if (error || state_ == LEAVING) return wait();
            input_.append(bytes.data(), size);
            state_ == BODY ? read_body() : read_header();
        }

        void read_header() {
            if (state_ != HEADER) enter(input_.empty() ? IDLE : HEADER);
            if (input_.empty()) return wait();
            if (input_[0] < 'A' || input_[0] > 'Z') return give_up(refusal(400, "no HTTP"));
            const size_t end = input_.find("\r\n\r\n");
            if (end == input_.npos && input_.size() < MOST_HEADER) return wait();
            if (end > MOST_HEADER || std::count(input_.begin(), input_.begin() + long(end), '\n') >= MOST_LINES)
                return give_up(refusal(431, "the header is too long"));
            parse(end + 4);
        }

        void parse(size_t size) {
            error_code error;
            parser_.emplace();
            parser_->body_limit(MOST_BODY);
            parser_->put(asio::buffer(input_.data(), size), error);
            input_.erase(0, size);
            if (error == http::error::body_limit) return give_up(refusal(413, "the body is too large"));
            if (error || !parser_->is_header_done()) return give_up(refusal(400, "malformed"));
            const Request &request = parser_->get();
            begun_ = Clock::now();
            keep_ = parser_->keep_alive();
            version_ = request.version();
            is_head_ = request.method() == http::verb::head;
            route_ = nullptr;
            if (auto refused = server_.judge(request, route_)) return answer(std::move(*refused));
            if (route_->types.empty()) return answer(route_->answer(request));
            admit(text(request[http::field::expect]));
        }

        void admit(const std::string &expected) {
            if (!expected.empty() && lower(expected) != "100-continue")
                return answer(refusal(417, "100-continue is all that can be expected"));
            const size_t most = route_->types.at(media_type(parser_->get()));
            parser_->body_limit(most);  // for chunks; the length was looked at already
            if (parser_->content_length().value_or(0) > most) return answer(refusal(413, "the body is too large"));
            if (server_.is_full()) return answer(refusal(429, "too many requests: try again"));
            enter(BODY);
            if (!expected.empty() && input_.empty() && !say_continue()) return drop();
            read_body();
        }

        bool say_continue() {
            const std::string line = "HTTP/1.1 100 Continue\r\n\r\n";
            error_code error;
            return socket_.write_some(asio::buffer(line), error) == line.size();
        }

        void read_body() {
            const error_code error = feed();
            const bool done = parser_->is_done();
            if (error == http::error::body_limit) return give_up(refusal(413, "the body is too large"));
            if (error || (!done && input_.size() >= MOST_HEADER)) return give_up(refusal(400, "malformed"));
            if (!server_.hold(*this, parser_->get().body().size()))
                return give_up(refusal(503, "too many bytes: try again"));
            if (!done) return wait();
            if (server_.is_full()) return answer(refusal(429, "too many requests: try again"));
            compute();
        }

        error_code feed() {
            error_code error;
            size_t used = 0;
            while (used < input_.size() && !parser_->is_done() && !error)
                used += parser_->put(asio::buffer(input_.data() + used, input_.size() - used), error);
            input_ = input_.substr(used);
            return error == http::error::need_more ? error_code() : error;
        }

        void compute() {
            job_ = std::make_shared<Job>(parser_->release(), *route_);
            parser_.reset();
            enter(WAITING);
            asio::post(server_.pool_, [self = shared_from_this(), job = job_] {
                if (job->begun.exchange(true)) return;
                Reply reply = self->has_left() ? Reply(CLIENT_LEFT, "") : job->route.answer(job->request);
                asio::post(self->server_.io_, [self, reply = std::move(reply)]() mutable {
                    self->guard([&] { self->computed(std::move(reply)); });
                });
            });
        }

        // Closed, or half closed: the two look the same.
        bool has_left() {
            pollfd connection{socket_.native_handle(), POLLRDHUP, 0};
            return poll(&connection, 1, 0) > 0;
        }

        void computed(Reply reply) {
            job_.reset();
            if (reply.status != CLIENT_LEFT) return answer(std::move(reply));
            server_.count(CLIENT_LEFT, begun_);
            close();
        }

        // Answers what cannot be read on.
        void give_up(Reply reply) {
            begun_ = Clock::now();
            parser_.reset();
            route_ = nullptr;
            keep_ = is_head_ = false;
            answer(std::move(reply));
        }

        void answer(Reply reply) {
            const bool is_read = !parser_ || parser_->is_done() || (!feed() && parser_->is_done());
            const bool goes_on = reply.status == 200 || input_.empty();  // who is refused does not ask on unasked
            keep_ = keep_ && is_read && goes_on && !server_.draining_;
            if (reply.status != 200 || !route_->types.empty()) server_.count(reply.status, begun_);
            parser_.reset();
            response_.emplace(http::status(reply.status), version_);
            response_->set(http::field::content_type, reply.type);
            if (reply.status == 429 || reply.status == 503) response_->set(http::field::retry_after, "1");
            for (const auto &[name, value] : reply.fields) response_->set(name, value);
            response_->content_length(reply.body.size());
            response_->keep_alive(keep_);
            if (!is_head_) response_->body() = std::move(reply.body);
            enter(WRITING);
            server_.hold(*this, response_->body().size());
            http::async_write(socket_, *response_, [self = shared_from_this()](error_code error, size_t) {
                self->guard([&] { self->written(error); });
            });
        }

        void written(error_code error) {
            const bool is_refused = response_->count(http::field::retry_after);
            response_.reset();
            server_.hold(*this, 0);
            if (error) return close();
            if (keep_) return is_refused || !input_.empty() ? enter(PAUSED) : read_header();
            socket_.shutdown(tcp::socket::shutdown_send, error);
            enter(LEAVING);  // reads on: an end with bytes unread is a reset, and the answer may be lost
            wait();
        }

        Server &server_;
        tcp::socket socket_;
        std::list<std::shared_ptr<Session>>::iterator place_;
        State state_ = IDLE;
        const Clock::time_point accepted_ = Clock::now();
        Clock::time_point since_, deadline_, begun_;
        bool reading_ = false, keep_ = false, is_head_ = false;
        unsigned version_ = 11;
        std::string input_;  // not parsed yet
        std::optional<http::request_parser<Body>> parser_;
        const Route *route_ = nullptr;
        std::shared_ptr<Job> job_;
        std::optional<http::response<http::string_body>> response_;
    };

    bool run_on() {
        try {
            io_.run();
            return true;
        } catch (const std::bad_alloc &) {  // for a connection that was about to begin
            return false;
        }
    }

    void accept() {
        acceptor_.async_wait(tcp::acceptor::wait_read, [this](error_code error) {
            if (error) return;
            accept();
            for (size_t i = 0; i < MOST_CONNECTIONS && welcome(); ++i) continue;  // who came last is soon answered, too
        });
    }

    bool welcome() {
        tcp::socket socket(io_);
        error_code error;
        acceptor_.accept(socket, error);
        if (error) return error != asio::error::would_block && drop_one();  // too many files
        if (sessions_.size() >= MOST_CONNECTIONS && !drop_one()) return true;
        const auto session = std::make_shared<Session>(*this, std::move(socket));
        session->start(sessions_.insert(sessions_.end(), session));
        return true;
    }

    // The client whose last step is longest ago; where all are quick, the one that has been here for longest.
    bool drop_one() {
        const auto now = Clock::now();
        auto chosen = std::find_if(sessions_.begin(), sessions_.end(),
                                   [now](const auto &session) { return session->is_slow(now); });
        const auto rank = [](const auto &session) { return std::make_pair(session->has_place(), session->accepted()); };
        if (chosen == sessions_.end())
            chosen = std::min_element(sessions_.begin(), sessions_.end(),
                                      [rank](const auto &a, const auto &b) { return rank(a) < rank(b); });
        if (chosen == sessions_.end() || (*chosen)->has_place()) return false;
        (*chosen)->drop();
        return true;
    }

    // A refusal, or the route.
    std::optional<Reply> judge(const Request &request, const Route *&route) const {
        const std::string host = text(request[http::field::host]), origin = text(request[http::field::origin]);
        if (request.count(http::field::host) != 1 || host.empty()) return refusal(400, "one Host is needed");
        if (!hosts.allowed(host)) return refusal(403, "this host is not served: see --allow-host");
        if (request.count(http::field::origin) && origin != "http://" + host && origin != "https://" + host)
            return refusal(403, "pages of other sites are not served");
        const std::string coding = lower(text(request[http::field::transfer_encoding]));
        if (request.count(http::field::transfer_encoding) && coding != "chunked")
            return refusal(400, "chunked is the only transfer coding");
        const std::string target = text(request.target());
        const auto found = routes.find(target.substr(0, target.find('?')));
        if (found == routes.end()) return refusal(404, "no such path");
        return judge(request, *(route = &found->second));
    }

    static std::optional<Reply> judge(const Request &request, const Route &route) {
        const bool is_head = request.method() == http::verb::head && route.method == http::verb::get;
        if (request.method() != route.method && !is_head)
            return Reply(405, "wrong method\n", "text/plain", {{"Allow", text(http::to_string(route.method))}});
        if (route.types.empty() || route.types.count(media_type(request))) return std::nullopt;
        std::string types;
        for (const auto &[type, most] : route.types) types += (types.empty() ? "send " : " or ") + type;
        return refusal(415, types);
    }

    bool is_full() const { return taken_ >= places_; }

    // Drops the slow ones that are in the way of so many bytes; false where that does not do.
    bool make_room(const Session &session, size_t bytes) {
        const auto now = Clock::now();
        for (auto next = sessions_.begin(); held_ + bytes > MOST_HELD && next != sessions_.end();) {
            const auto other = *next++;
            if (other.get() != &session && other->held && other->is_slow(now)) other->drop();
        }
        return held_ + bytes <= MOST_HELD;
    }

    bool hold(Session &session, size_t bytes) {
        if (bytes <= SMALL_BODY) bytes = 0;
        const bool fits = bytes <= session.held || make_room(session, bytes - session.held);
        held_ += bytes - session.held;
        session.held = bytes;
        return fits;
    }

    void count(unsigned status, Clock::time_point begun) {
        ++counts_.answers[status];
        counts_.seconds += std::chrono::duration<double>(Clock::now() - begun).count();
    }

    void tick() {
        ticker_.expires_after(std::chrono::milliseconds(100));
        ticker_.async_wait([this](error_code error) {
            const auto now = Clock::now();
            if (draining_ && now > closing_) acceptor_.close(error);
            if (acceptor_.is_open() || !sessions_.empty()) tick();
            std::vector<std::shared_ptr<Session>> late;
            std::copy_if(sessions_.begin(), sessions_.end(), std::back_inserter(late),
                         [now](const auto &session) { return session->is_late(now); });
            for (const auto &session : late) session->be_late();
            prove();
        });
    }

    // Through a caller and back: what hangs on the way ends it.
    void prove() {
        if (proving_) return;
        asio::post(pool_, [this] {
            asio::post(io_, [this] {
                proving_ = false;
                alive();
            });
        });
        proving_ = true;
    }

    void drain() {
        signals_.clear();  // a second one ends the process at once
        draining_ = true;
        closing_ = Clock::now() + GRACE;
        for (const auto &session : sessions_) session->hurry();
        stopping();
    }

    asio::io_context io_;
    asio::thread_pool pool_;
    tcp::acceptor acceptor_{io_};
    asio::signal_set signals_{io_, SIGTERM, SIGINT};
    asio::steady_timer ticker_{io_};
    std::list<std::shared_ptr<Session>> sessions_;  // who took the last step longest ago comes first
    Counts counts_;
    const size_t places_;                           // for requests that wait or are computed
    const std::array<seconds, LEAVING + 1> times_;  // that a state may last
    size_t taken_ = 0, held_ = 0;
    bool draining_ = false, proving_ = false;
    Clock::time_point closing_;
};

}  // namespace web
