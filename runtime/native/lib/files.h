// Plain files: read whole or mapped into memory, never through a link.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace cembed {

// An open plain file. Throws Error(code): not there, a link, a folder, a device.
class File {
  public:
    File(const std::string &path, int code);
    ~File();
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    int handle() const { return handle_; }
    int64_t size() const { return size_; }
    // All of it. Throws Error(code) if it has more than `limit` bytes or cannot be read.
    std::string read(int64_t limit) const;

  private:
    std::string path_;
    int code_, handle_;
    int64_t size_;
};

// The first bytes of a file, read when they are used; a file that shrinks meanwhile ends the process.
class Mapping {
  public:
    Mapping() = default;
    // Throws Error(MEMORY): it cannot be mapped.
    Mapping(const File &file, int64_t size);
    ~Mapping();
    Mapping(Mapping &&other) noexcept;
    Mapping &operator=(Mapping &&other) noexcept;

    const uint8_t *data() const { return data_; }
    int64_t size() const { return size_; }
    // Gives back the memory that was used so far; the bytes can be read again.
    void release() const;

  private:
    const uint8_t *data_ = nullptr;
    int64_t size_ = 0;
};

// In lower-case hexadecimal digits.
std::string sha256(std::string_view bytes);
std::string sha256(const File &file);

}  // namespace cembed
