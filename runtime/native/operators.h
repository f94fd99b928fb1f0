// Operators of cembed for ONNX Runtime, as a library that a session registers.
#pragma once

#include "onnxruntime.h"

#define OPERATORS_API __attribute__((visibility("default")))

extern "C" {

OPERATORS_API int multiplies_bfloat16();  // whether this processor does; without it there is nothing to register

// For OrtSessionOptions: returns null, or an OrtStatus.
OPERATORS_API void *RegisterCustomOps(void *options, const onnxruntime_abi::Base *base);
}
