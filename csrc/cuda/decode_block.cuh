// What a block of the decode kernels does whatever the residual: sums of its warps on the tensor cores, the
// activation, the hand-off to other blocks.
#pragma once

#include "cuda/decode_call.h"
#include "cuda/ptx.h"

namespace resmoe::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct Shape {
  int T, top_k, E, H, I, N;
};

__host__ __device__ inline Shape shape_of(const DecodeCall& call) {
  return {call.tokens, call.top_k, call.experts, call.hidden, call.inner, (call.gated ? 2 : 1) * call.inner};
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half(value);
}

__device__ __forceinline__ float apply(Function f, float z) {
  switch (f) {
    case Function::silu:
      return z / (1.0f + expf(-z));
    case Function::gelu:
      return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
    case Function::gelu_tanh:
      return z / (1.0f + expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
    case Function::relu:
      return fmaxf(z, 0.0f);
    case Function::relu2:
      return fmaxf(z, 0.0f) * fmaxf(z, 0.0f);
    case Function::identity:
      break;
  }
  return z;
}

// Of all experts hit, the warps that share one: 1 where there are enough experts for all warps. More than one
// only where every expert has a warp to begin with, so that a warp then has one expert at most.
__device__ __forceinline__ int ways_of(int hits) { return hits > 4 ? 1 : hits > 2 ? 2 : hits > 1 ? 4 : 8; }

// Sums of one warp in the layout of mma.m16n8k16: lane 4 g + q holds rows g, g + 8 and tokens 2 q, 2 q + 1 of
// 8 tokens.
template <int TokenTiles>
struct Sums {
  float of[TokenTiles][4];
  __device__ void clear() {
    for (auto& tile : of) {
      for (float& sum : tile) sum = 0.0f;
    }
  }
};

template <typename T>
__device__ __forceinline__ void multiply_pair(float (&sums)[4], const uint4& low, const uint4& high,
                                              const uint4& token) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
  const uint32_t first_token[2] = {token.x, token.y}, second_token[2] = {token.z, token.w};
  ptx::mma_m16n8k16<T>(sums, first, first_token);
  ptx::mma_m16n8k16<T>(sums, second, second_token);
}

// ---- flags: counters that the launch clears

// What this block has stored is there for whoever waits for the flag; shared memory may be used again.
__device__ __forceinline__ void publish(uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) ptx::release_add(flag, 1);
}

// By a warp.
__device__ __forceinline__ void wait_for(const uint32_t* flag, uint32_t count) {
  if (threadIdx.x % 32 == 0) {
    while (ptx::acquire(flag) < count) ptx::pause();
  }
  __syncwarp();
}

}  // namespace resmoe::cuda
