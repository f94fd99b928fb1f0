// What is read and answered over HTTP/1.1, by Boost.Beast's parser, and the most that a client can take.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/address_v4.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/http.hpp>

namespace web {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using std::chrono::seconds;

constexpr size_t MOST_HEADER = 8 << 10;
constexpr long MOST_LINES = 100;
constexpr size_t SMALL_BODY = 4 << 10, MIDDLE_BODY = 2 << 20, MOST_BODY = 32 << 20;
constexpr size_t MOST_TEXT = 64 << 10;    // a tokenizer takes some 40 times as much
constexpr size_t MOST_HELD = 36 << 20;    // bodies and answers of all connections together, but for small ones
constexpr size_t MOST_CONNECTIONS = 900;  // a process may have 1024 files
constexpr int KERNEL_BUFFER = 128 << 10;  // of a connection, each way
constexpr seconds IDLE_TIME(5), HEADER_TIME(5), BODY_TIME(30), WRITE_TIME(10);
constexpr seconds GRACE(1);  // before a client that is in the way goes, and after SIGTERM for those that come
constexpr seconds DRAIN(5);  // after SIGTERM, for what is left of a request or an answer

// Text whose memory grows as bytes arrive: to announce many takes nothing. What is not small gets pages of its own, of
// which those that are not written to take no memory, and which leave no holes among other things.
struct Body {
    using value_type = std::string;

    class reader {
      public:
        template <class Header>
        reader(Header &, std::string &body) : body_(body) {}

        template <class Length>
        void init(const Length &, error_code &error) {
            error = {};
        }

        size_t put(asio::const_buffer bytes, error_code &error) {
            error = {};
            const size_t size = body_.size() + bytes.size();
            const size_t room = size <= SMALL_BODY ? 0 : size <= MIDDLE_BODY ? MIDDLE_BODY : MOST_BODY;
            if (body_.capacity() < room) body_.reserve(room);
            body_.append(static_cast<const char *>(bytes.data()), bytes.size());
            return bytes.size();
        }

        void finish(error_code &error) { error = {}; }

      private:
        std::string &body_;
    };
};

using Request = http::request<Body>;

struct Reply {
    using Fields = std::vector<std::pair<std::string, std::string>>;

    Reply(unsigned status_, std::string body_, std::string type_ = "text/plain", Fields fields_ = {})
        : status(status_),
          body(std::move(body_)),
          type(std::move(type_)),
          fields(std::move(fields_)) {}

    unsigned status;
    std::string body, type;
    Fields fields;
};

inline Reply refusal(unsigned status, const std::string &why) { return {status, why + "\n"}; }

// Of a path. With Content-Types that it takes, it has a body and is computed in turn; else it is answered at once.
// A type comes with the most bytes of its bodies.
struct Route {
    http::verb method;
    std::function<Reply(const Request &)> answer;
    std::map<std::string, size_t> types;
};

inline std::string text(boost::beast::string_view view) { return {view.data(), view.size()}; }

inline std::string lower(std::string name) {
    for (char &letter : name)
        if (letter >= 'A' && letter <= 'Z') letter = char(letter + 'a' - 'A');
    return name;
}

// The Content-Type without its parameters.
inline std::string media_type(const Request &request) {
    const std::string type = lower(text(request[http::field::content_type]));
    return type.substr(0, type.find_first_of("; "));
}

// Who may be asked for: a page of another site could have its own name mean this machine, and ask.
class Hosts {
  public:
    void allow(const std::string &name) { names_.insert(lower(name)); }

    // A Host header, such as localhost:8080 or [::1].
    bool allowed(const std::string &host) const {
        const size_t colon = host.find(':', host[0] == '[' ? host.find(']') : 0);
        const std::string name = lower(host.substr(0, colon));
        error_code error;
        return names_.count(name) || (asio::ip::make_address_v4(name, error).is_loopback() && !error);
    }

  private:
    std::set<std::string> names_{"localhost", "[::1]"};
};

}  // namespace web
