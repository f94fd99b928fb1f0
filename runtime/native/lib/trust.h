// Who signed a bundle, and whether that will do here: runtime/bundle/trust.py has the words, and does the same.
#pragma once

#include <string>

namespace cembed {

// Returns if every demand is met: the device's policy, that of $CEMBED_TRUST, and that of `trusted`, a public key or a
// folder of them, or empty. Throws Error(BUNDLE): one is not, or what it stands in cannot be read.
void check_trust(const std::string &root, const std::string &manifest, const std::string &trusted);

}  // namespace cembed
