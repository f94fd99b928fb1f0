// What the fields of a manifest must have to do with each other, as runtime/bundle/contract.py.
#pragma once

#include <cstdint>
#include <string>

#include "manifest.h"

namespace cembed {

// Throws Error(BUNDLE) that names the fields which do not fit each other.
void check_contract(const Manifest &manifest);

constexpr const char *DEEPSTACK = "deepstack_embeds";

// Numbers of a row of deepstack_embeds, a multiple of hidden_size; 0 where text graphs take none.
int64_t deepstack_width(const Manifest &manifest);

// What goes from step to step, as runtime/bundle/graph_tensors.py: whether an input is such a state, which output
// replaces it, and whether it has a row a position or is of fixed size.
bool is_past(const std::string &name);
std::string present_of(const std::string &past);
bool grows(const std::string &past);

}  // namespace cembed
