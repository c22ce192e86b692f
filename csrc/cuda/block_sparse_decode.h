// A layer of block-sparse experts for few tokens on a GPU: one launch, on raw pointers.
//
// For token t with surviving pairs (e, w):
//
//     z_e = B x + S_e x                  B only where group[e] >= 0
//     h_e = f(z_e[:I]) * z_e[I:]         f(z_e) where there is no gate
//     y   = B' (sum_e w_e h_e) + sum_e S'_e (w_e h_e)
//
// All pointers are device memory, 16-byte aligned, and tensors contiguous; the dtype of x, of the weights and
// of y is the same. Weight layouts as in FactoredExperts (resmoe_kernels/factored.py), block layout: every
// word of a mask has exactly n bits. With other masks y is anything, but no memory is touched that should not
// be.
#pragma once

#include "cuda/low_rank_decode.h"

namespace resmoe::cuda {

struct BlockSparseMatrix {
  const void* base;      // (N, K), null if there is none
  const uint32_t* mask;  // (E, N, K / 32)
  const void* values;    // (E, N, K / 32, n)
  int32_t n;             // 4, 8, 12 or 16
};

struct BlockSparseCall {
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
  BlockSparseMatrix gate_up, down;
  void* workspace;  // workspace_bytes(call), 256-byte aligned; contents do not matter
  void* y;          // (T, H)
};

// Why the kernel does not take a call of these sizes, null if it does. The text is static. Reads no device
// memory.
const char* declines(const BlockSparseCall& call);

size_t workspace_bytes(const BlockSparseCall& call);

// Clears the flag and starts the kernel on a stream (a cudaStream_t) of the current device; both may be
// captured in a graph. Returns null, or what the driver said, with the kernel's name and configuration:
// static until the next call of this thread.
const char* block_sparse_decode(const BlockSparseCall& call, void* stream);

}  // namespace resmoe::cuda
