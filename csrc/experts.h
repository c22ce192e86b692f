// The expert layer on the CPU, on one packed layer (packed.h) and raw pointers.
//
// For token t with surviving pairs (e, w), g = g(e):
//
//     z_e = B_gate_up[g] x + U_e (V_e x) + S_e x + bias_gate_up[e]
//     h_e = f(z_e[:I]) * z_e[I:]                                       f(z_e) where there is no gate
//     y   = sum_g B_down[g] (sum_{e in g} w_e h_e)
//         + sum_e w_e (U'_e (V'_e h_e) + S'_e h_e + bias_down[e])
//
// in at most four phases, each of tasks that write disjoint memory:
//
//     shrink       V_e x of every pair        one task per expert hit and 64 of its ranks
//     gate_up      z, h and sum w h           one per 32 columns of I (64 without a gate), over all experts
//     shrink_down  V'_e (w h) of every pair   one per expert hit and 64 of its ranks
//     down         y                          one per 64 columns of H, over all groups and experts
//
// Weights are read once a call (once in 512 tokens), B once for all tokens of a group. What a task does and
// in which order it adds depends on the call alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "packed.h"

namespace resmoe {

struct ExpertsCall {
  const void* x;            // (T, H), rows contiguous
  int64_t x_stride;         // elements from one row to the next
  Dtype dtype;              // of x and y
  const void* top_k_index;  // (T, top_k) contiguous int32 or int64; ids outside [0, E) skip their slot
  bool index_is_64;
  const float* top_k_weights;  // (T, top_k) contiguous
  int64_t tokens, top_k;
  Activation activation;
  void* y;  // (T, H) contiguous
};

// Calls body(context) `participants` times, on as many threads as there are; how many run at a time, and
// whether they do at all, does not matter.
using Parallel = void (*)(int64_t participants, void (*body)(void* context), void* context);

// Throws std::bad_alloc where there is no memory for the intermediate results.
void experts_packed(const PackedHeader& layer, const ExpertsCall& call, const Kernels& kernels,
                    int64_t threads, Parallel parallel);

}  // namespace resmoe
