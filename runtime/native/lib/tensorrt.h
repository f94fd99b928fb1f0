// TensorRT engines that `cembed build-engine` has made beside a bundle, as runtime/engines/build.py and trt_session.py.
#pragma once

#include "bundle.h"
#include "engine.h"

namespace cembed {

// What opens the engine of a graph; the bundle outlives it. Throws Error(ENGINE): this library was built without
// TensorRT, there is none here or another one, no GPU, no engines for them.
Engines tensorrt_engines(Bundle &bundle);

}  // namespace cembed
