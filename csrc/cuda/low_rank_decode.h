// A layer of low-rank experts for few tokens on a GPU: one launch, on raw pointers.
//
// For token t with surviving pairs (e, w):
//
//     z_e = B x + U_e (V_e x)            B only where group[e] >= 0
//     h_e = f(z_e[:I]) * z_e[I:]         f(z_e) where there is no gate
//     y   = B' (sum_e w_e h_e) + sum_e U'_e (V'_e (w_e h_e))
//
// Weight layouts as in FactoredExperts (resmoe_kernels/factored.py).
#pragma once

#include "cuda/decode_call.h"

namespace resmoe::cuda {

struct LowRankMatrix {
  const void* base;             // (N, K), null if there is none
  const void* u;                // (R, N), null if there is no low rank
  const void* v;                // (R, K)
  const int32_t* rank_offsets;  // (E + 1,)
  int32_t total_rank;           // R
};

struct LowRankCall : DecodeCall {
  LowRankMatrix gate_up, down;
};

// Why the kernel does not take a call of these sizes, null if it does: "a hidden size that is not a multiple
// of 32". The text is static. Reads no device memory.
const char* declines(const LowRankCall& call);

size_t workspace_bytes(const LowRankCall& call);

// Clears the flags and starts the kernel on a stream (a cudaStream_t) of the current device; both may be
// captured in a graph. Returns null, or what the driver said, with the kernel's name and configuration:
// static until the next call of this thread.
const char* low_rank_decode(const LowRankCall& call, void* stream);

}  // namespace resmoe::cuda
