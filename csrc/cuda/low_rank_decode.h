// A layer of low-rank experts for few tokens on a GPU: one launch, on raw pointers.
//
// For token t with surviving pairs (e, w):
//
//     z_e = B x + U_e (V_e x)            B only where group[e] >= 0
//     h_e = f(z_e[:I]) * z_e[I:]         f(z_e) where there is no gate
//     y   = B' (sum_e w_e h_e) + sum_e U'_e (V'_e (w_e h_e))
//
// All pointers are device memory, 16-byte aligned, and tensors contiguous; the dtype of x, of the weights and of y is
// the same. Weight layouts as in FactoredExperts (resmoe_kernels/factored.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace resmoe::cuda {

enum class Element { bfloat16, float16 };
enum class Real { float32, bfloat16, float16 };
enum class Function { silu, gelu, gelu_tanh, relu, relu2, identity };

struct LowRankMatrix {
  const void* base;             // (N, K), null if there is none
  const void* u;                // (R, N), null if there is no low rank
  const void* v;                // (R, K)
  const int32_t* rank_offsets;  // (E + 1,)
  int32_t total_rank;           // R
};

struct LowRankCall {
  Element element;
  const void* x;              // (T, H)
  const void* top_k_index;    // (T, top_k) int32 or int64; ids outside [0, E) skip their slot
  bool index_is_64;
  const void* top_k_weights;  // (T, top_k)
  Real weights_type;
  int32_t tokens, top_k, experts, hidden, inner;
  bool gated;
  Function function;
  const int32_t* group;  // (E,), null if there is no base
  LowRankMatrix gate_up, down;
  void* workspace;  // workspace_bytes(call), 256-byte aligned; contents do not matter
  void* y;          // (T, H)
};

constexpr int32_t kMaxTokens = 16;
constexpr int32_t kMaxPairs = 256;     // T top_k
constexpr int32_t kMaxExperts = 1024;  // E

// Why the kernel does not take a call of these sizes, null if it does: "hidden size 100, which is not a multiple of 32".
// The text is static. Reads no device memory.
const char* declines(const LowRankCall& call);

size_t workspace_bytes(const LowRankCall& call);

// Clears the flags and starts the kernel on a stream (a cudaStream_t) of the current device; both may be captured in a
// graph. Returns null, or what the driver said, with the kernel's name and configuration: static until the next call of
// this thread.
const char* low_rank_decode(const LowRankCall& call, void* stream);

}  // namespace resmoe::cuda
