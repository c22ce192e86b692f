// Which experts the tokens of a call go to. Every block works it out for itself, in shared memory.
#pragma once

#include "cuda/decode_block.cuh"
#include "cuda/decode_call.h"

namespace resmoe::cuda {

// i numbers the experts that were hit, in ascending order. Of each the tokens that go there have an entry,
// in ascending order too: no more in all than there are pairs.
struct Routing {
  int32_t hits;
  int16_t expert[kMaxPairs];
  uint16_t tokens[kMaxPairs];  // bit t: token t goes to the expert
  int16_t entries_before[kMaxPairs + 1];
  uint8_t has_base[kMaxPairs];
  uint8_t pairs[kMaxPairs];  // by entry: the first of the token's pairs with the expert, where its h is kept
  float weights[kMaxPairs];  // by entry: the sum over all of them

  __device__ bool takes(int i, int t) const { return (tokens[i] >> t & 1) != 0; }
  // Of a token that the expert takes.
  __device__ int entry(int i, int t) const { return entries_before[i] + __popc(tokens[i] & ((1u << t) - 1)); }
  __device__ int pair(int i, int t) const { return pairs[entry(i, t)]; }
};

// Read only until the routing is found.
struct RoutingScratch {
  int32_t index[kMaxPairs];  // -1: the slot is skipped
  float weights[kMaxPairs];
  uint32_t seen[kMaxExperts];  // the tokens of every expert; then, of one that was hit, its number
};

__device__ __forceinline__ float weight_of(const DecodeCall& call, int pair) {
  switch (call.weights_type) {
    case Real::bfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(call.top_k_weights)[pair]);
    case Real::float16:
      return __half2float(static_cast<const __half*>(call.top_k_weights)[pair]);
    case Real::float32:
      break;
  }
  return static_cast<const float*>(call.top_k_weights)[pair];
}

// before[i] = count(0) + ... + count(i - 1), for i from 0 to n; by a warp.
template <typename T, typename Count>
__device__ __forceinline__ void add_up_before(T* before, int n, const Count& count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int total = 0;
  for (int first = 0; first < n; first += 32) {
    const int i = first + lane, own = i < n ? count(i) : 0;
    int sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(~0u, sum, static_cast<unsigned>(step));
      if (lane >= step) sum += lower;
    }
    if (i < n) before[i] = static_cast<T>(total + sum - own);
    total += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) before[n] = static_cast<T>(total);
}

// The experts and their tokens; by all threads, and all may read them then.
__device__ inline void find_experts(const DecodeCall& call, RoutingScratch& scratch, Routing& routing) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  static_assert(kMaxPairs <= kThreads);
  for (int e = thread; e < call.experts; e += kThreads) scratch.seen[e] = 0;
  __syncthreads();
  if (thread < call.tokens * call.top_k) {
    const int64_t id = call.index_is_64 ? static_cast<const int64_t*>(call.top_k_index)[thread]
                                        : static_cast<const int32_t*>(call.top_k_index)[thread];
    const bool valid = id >= 0 && id < call.experts;
    scratch.index[thread] = valid ? static_cast<int32_t>(id) : -1;
    scratch.weights[thread] = weight_of(call, thread);
    if (valid) atomicOr(&scratch.seen[id], 1u << (thread / call.top_k));
  }
  __syncthreads();
  if (thread < 32) {
    int hits = 0;
    for (int first = 0; first < call.experts; first += 32) {
      const int e = first + lane;
      const uint32_t seen = e < call.experts ? scratch.seen[e] : 0;
      const uint32_t vote = __ballot_sync(~0u, seen != 0);
      if (seen != 0) {
        const int i = hits + __popc(vote & ((1u << lane) - 1));
        scratch.seen[e] = static_cast<uint32_t>(i);
        routing.expert[i] = static_cast<int16_t>(e);
        routing.tokens[i] = static_cast<uint16_t>(seen);
        routing.has_base[i] = call.group != nullptr && call.group[e] >= 0;
      }
      hits += __popc(vote);
    }
    if (lane == 0) routing.hits = hits;
    __syncwarp();
    add_up_before(routing.entries_before, hits, [&](int i) { return __popc(routing.tokens[i]); });
  }
  __syncthreads();
}

// The entries, behind find_experts; by all threads, who may read them behind a barrier.
__device__ inline void find_pairs(const DecodeCall& call, RoutingScratch& scratch, Routing& routing) {
  const int pair = static_cast<int>(threadIdx.x);
  if (pair >= call.tokens * call.top_k || scratch.index[pair] < 0) return;
  const int t = pair / call.top_k, e = scratch.index[pair];
  for (int earlier = t * call.top_k; earlier < pair; ++earlier) {
    if (scratch.index[earlier] == e) return;
  }
  float weight = 0.0f;
  for (int other = pair; other < (t + 1) * call.top_k; ++other) {
    if (scratch.index[other] == e) weight += scratch.weights[other];
  }
  const int at = routing.entry(static_cast<int>(scratch.seen[e]), t);
  routing.pairs[at] = static_cast<uint8_t>(pair);
  routing.weights[at] = weight;
}

}  // namespace resmoe::cuda
