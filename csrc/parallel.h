// How the kernels without threads of their own are given some.
#pragma once

#include <cstdint>
#include <functional>

namespace resmoe {

// Calls body(begin, end) for parts of [0, count), on as many threads as the caller likes. body does not
// throw.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace resmoe
