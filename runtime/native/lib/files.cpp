#include "files.h"

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

namespace cembed {
namespace {

constexpr size_t CHUNK = 1 << 20;

class Digest {
  public:
    Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1)
            throw Error(INTERNAL, "libcrypto has no sha256");
    }

    void add(const void *bytes, size_t size) { EVP_DigestUpdate(context_.get(), bytes, size); }

    std::string hex() {
        unsigned char bytes[EVP_MAX_MD_SIZE];
        unsigned int size = 0;
        EVP_DigestFinal_ex(context_.get(), bytes, &size);
        std::string text;
        for (unsigned int i = 0; i < size; ++i) {
            text += "0123456789abcdef"[bytes[i] >> 4];
            text += "0123456789abcdef"[bytes[i] & 15];
        }
        return text;
    }

  private:
    std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX *)> context_;
};

}  // namespace

File::File(const std::string &path, int code) : path_(path), code_(code) {
    handle_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (handle_ < 0) {
        const std::string reason = errno == ELOOP ? "it is a link" : std::strerror(errno);
        throw Error(code, "cannot open " + path + ": " + reason);
    }
    struct stat status{};
    if (fstat(handle_, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(handle_);
        throw Error(code, path + " is not a plain file");
    }
    size_ = status.st_size;
}

File::~File() { close(handle_); }

std::string File::read(int64_t limit) const {
    if (size_ > limit) throw Error(code_, path_ + " has " + std::to_string(size_) + " bytes, more than any such file");
    std::string bytes(size_t(size_), '\0');
    for (size_t at = 0; at < bytes.size();) {
        const ssize_t count = pread(handle_, &bytes[at], bytes.size() - at, off_t(at));
        if (count <= 0) throw Error(code_, "cannot read " + path_);
        at += size_t(count);
    }
    return bytes;
}

Mapping::Mapping(const File &file, int64_t size) : size_(size) {
    if (size == 0) return;
    void *memory = mmap(nullptr, size_t(size), PROT_READ, MAP_SHARED, file.handle(), 0);
    if (memory == MAP_FAILED)
        throw Error(MEMORY, std::string("a file cannot be mapped into memory: ") + std::strerror(errno));
    data_ = static_cast<const uint8_t *>(memory);
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(const_cast<uint8_t *>(data_), size_t(size_));
}

Mapping::Mapping(Mapping &&other) noexcept { *this = std::move(other); }

Mapping &Mapping::operator=(Mapping &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

void Mapping::release() const {
    if (data_ != nullptr) madvise(const_cast<uint8_t *>(data_), size_t(size_), MADV_DONTNEED);
}

std::string sha256(std::string_view bytes) {
    Digest digest;
    digest.add(bytes.data(), bytes.size());
    return digest.hex();
}

std::string sha256(const File &file) {
    Digest digest;
    std::vector<char> chunk(CHUNK);
    ssize_t count;
    for (off_t at = 0; (count = pread(file.handle(), chunk.data(), chunk.size(), at)) > 0; at += count)
        digest.add(chunk.data(), size_t(count));
    return count < 0 ? "" : digest.hex();
}

}  // namespace cembed
