// What the fields of a manifest must have to do with each other, as runtime/bundle/contract.py.
#pragma once

#include <string>

#include "manifest.h"

namespace cembed {

// Throws Error(BUNDLE) that names the fields which do not fit each other.
void check_contract(const Manifest &manifest);

// Whether what a layer keeps is a state of fixed size, which each position replaces; caches grow by position.
bool is_state(const std::string &name);

}  // namespace cembed
