// Where the tensors of an ONNX file keep their data, as runtime/bundle/external_data.py: looked up before an engine follows it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace cembed {

// `sizes` has the bytes of each file that data may be in. Throws Error(BUNDLE): data in another file, or not within it;
// no ONNX file.
void check_external_data(const std::string &path, const std::map<std::string, int64_t> &sizes);

// The same of a file's bytes.
void check_external_bytes(std::string_view bytes, const std::map<std::string, int64_t> &sizes);

}  // namespace cembed
