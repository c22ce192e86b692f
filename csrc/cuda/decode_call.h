// What calls of the decode kernels have in common, whatever the residual: few tokens, on raw pointers. No
// CUDA headers: for callers that a plain C++ compiler compiles.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resmoe::cuda {

enum class Element { bfloat16, float16 };
enum class Real { float32, bfloat16, float16 };
enum class Function { silu, gelu, gelu_tanh, relu, relu2, identity };

constexpr int32_t kMaxTokens = 16;
constexpr int32_t kMaxPairs = 256;     // T top_k
constexpr int32_t kMaxExperts = 1024;  // E

// All pointers are device memory, 16-byte aligned, and tensors contiguous; the dtype of x, of the weights and
// of y is the same.
struct DecodeCall {
  Element element;
  const void* x;            // (T, H)
  const void* top_k_index;  // (T, top_k) int32 or int64; ids outside [0, E) skip their slot
  bool index_is_64;
  const void* top_k_weights;  // (T, top_k)
  Real weights_type;
  int32_t tokens, top_k, experts, hidden, inner;
  bool gated;
  Function function;
  const int32_t* group;  // (E,), null if there is no base
  void* workspace;       // workspace_bytes(call), 256-byte aligned; contents do not matter
  void* y;               // (T, H)
};

// Why no decode kernel takes a call of these sizes, null if they do. The text is static.
inline const char* declines_sizes(const DecodeCall& call) {
  static_assert(kMaxTokens == 16 && kMaxPairs == 256 && kMaxExperts == 1024);
  if (call.tokens > kMaxTokens) return "more than 16 tokens";
  if (call.tokens * call.top_k > kMaxPairs) return "more than 256 token-expert pairs";
  if (call.experts > kMaxExperts) return "more than 1024 experts";
  if (call.hidden % 32 != 0) return "a hidden size that is not a multiple of 32";
  return nullptr;
}

}  // namespace resmoe::cuda
