// What systemd is told of a service (sd_notify(3)), and nothing where nobody listens: without NOTIFY_SOCKET.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

class Notifier {
    using Clock = std::chrono::steady_clock;

  public:
    Notifier() : path_(variable("NOTIFY_SOCKET")) {
        const std::string process = variable("WATCHDOG_PID"), limit = variable("WATCHDOG_USEC");
        const bool is_ours = process.empty() || process == std::to_string(getpid());
        if (is_ours) every_ = std::chrono::microseconds(std::strtoll(limit.c_str(), nullptr, 10) / 3);
    }

    void ready(const std::string &status) const { send("READY=1\nSTATUS=" + status, 0); }
    void stopping() const { send("STOPPING=1\nSTATUS=draining", 0); }

    // To be called again and again by what must not hang; it does not wait for systemd.
    void alive() {
        if (every_ <= Clock::duration::zero() || Clock::now() < last_ + every_) return;
        last_ = Clock::now();
        send("WATCHDOG=1", MSG_DONTWAIT);
    }

  private:
    static std::string variable(const char *name) {
        const char *value = std::getenv(name);
        return value == nullptr ? "" : value;
    }

    void send(const std::string &message, int flags) const {
        sockaddr_un address{};
        if (path_.empty() || path_.size() >= sizeof(address.sun_path)) return;
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path_.data(), path_.size());
        if (path_[0] == '@') address.sun_path[0] = '\0';  // a name that is in no folder
        const int sender = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (sender < 0) return;
        const auto size = socklen_t(offsetof(sockaddr_un, sun_path) + path_.size());
        const auto to = reinterpret_cast<const sockaddr *>(&address);
        sendto(sender, message.data(), message.size(), flags | MSG_NOSIGNAL, to, size);
        close(sender);
    }

    std::string path_;
    Clock::duration every_{};
    Clock::time_point last_{};
};
