// Which parts of a page are not blank paper, as runtime/embed/blank.py, to the last part.
#pragma once

#include <cstdint>
#include <vector>

#include "image.h"

namespace cembed {

// What is read of pixels [height, width, 3] in their final size: visual tokens [rows, columns], or tiles where the page
// comes in tiles.
std::vector<bool> parts_to_read(const std::vector<uint8_t> &pixels, Size size, const ImageProcessing &spec);

}  // namespace cembed
