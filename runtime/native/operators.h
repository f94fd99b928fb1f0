// Operators of cembed for ONNX Runtime, as a library that a session registers.
#pragma once

#include "onnxruntime.h"

#define CEMBED_PUBLIC __attribute__((visibility("default")))

extern "C" {

CEMBED_PUBLIC int multiplies_bfloat16();  // whether this processor does; without it there is nothing to register

// For OrtSessionOptions: returns null, or an OrtStatus.
CEMBED_PUBLIC void *RegisterCustomOps(void *options, const onnxruntime_abi::Base *base);
}
