// A layer of block-sparse experts for few tokens on a GPU: one launch, on raw pointers.
//
// For token t with surviving pairs (e, w):
//
//     z_e = B x + S_e x                  B only where group[e] >= 0
//     h_e = f(z_e[:I]) * z_e[I:]         f(z_e) where there is no gate
//     y   = B' (sum_e w_e h_e) + sum_e S'_e (w_e h_e)
//
// Weight layouts as in FactoredExperts (resmoe_kernels/factored.py), block layout: every word of a mask has
// exactly n bits. With other masks y is anything, but no memory is touched that should not be.
#pragma once

#include "cuda/decode_call.h"

namespace resmoe::cuda {

struct BlockSparseMatrix {
  const void* base;      // (N, K), null if there is none
  const uint32_t* mask;  // (E, N, K / 32)
  const void* values;    // (E, N, K / 32, n)
  int32_t n;             // 4, 8, 12 or 16
};

struct BlockSparseCall : DecodeCall {
  BlockSparseMatrix gate_up, down;
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
