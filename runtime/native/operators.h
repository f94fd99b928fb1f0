// Operators of cembed for ONNX Runtime, as a library that a session registers.
#pragma once

#include "onnxruntime.h"

#define OPERATORS_API __attribute__((visibility("default")))

extern "C" {

// Whether this processor has what an operator needs. None has both.
OPERATORS_API int multiplies_bfloat16();
OPERATORS_API int multiplies_bytes();

OPERATORS_API int adds_bytes_exactly();  // whether ONNX Runtime's sums of products of bytes are exact here

// For OrtSessionOptions: returns null, or an OrtStatus.
OPERATORS_API void *RegisterCustomOps(void *options, const onnxruntime_abi::Base *base);
}
