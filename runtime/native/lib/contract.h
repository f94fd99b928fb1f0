// What the fields of a manifest must have to do with each other, as runtime/bundle/contract.py.
#pragma once

#include "manifest.h"

namespace cembed {

// Throws Error(BUNDLE) that names the fields which do not fit each other.
void check_contract(const Manifest &manifest);

}  // namespace cembed
