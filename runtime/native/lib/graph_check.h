// An ONNX file looked through before an engine sees it, as runtime/bundle/graph_check.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "manifest.h"

namespace cembed {

// Throws Error(BUNDLE) if the file of `graph`, whose data files have `sizes`, holds what no export of cembed holds.
void check_graph(const std::string &path, const Graph &graph, const std::map<std::string, int64_t> &sizes);

// The same of a file's bytes.
void check_model(std::string_view data, const Graph &graph, const std::map<std::string, int64_t> &sizes);

}  // namespace cembed
