// The PTX instructions that the kernels use, as functions.
//
// nvcc gets the instructions. With RESMOE_EMULATE_CUDA any C++ compiler gets functions that do the same on
// the CPU, for tests on machines without a GPU (tests/cpp/cuda_emulation.h). So kernels have no assembly of
// their own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef RESMOE_EMULATE_CUDA
#include "cuda_emulation.h"
#else

// The shared memory whose size the launch says, 128-byte aligned.
#define RESMOE_SHARED_MEMORY(name) extern __shared__ __align__(128) uint8_t name[]

namespace resmoe::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- copies of a thread

// 16 bytes from global to shared memory, past L1; zeros where !valid, and nothing is read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of copies. wait_copies<N> returns when all but this thread's N youngest groups have arrived;
// other threads see them behind a barrier.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- shared memory and products, by all lanes of a warp

// Four 8x8 matrices of 16-bit elements. Lane 8 m + i says where row i of matrix m lies, 16-byte aligned; lane
// 4 i + q gets elements 2 q and 2 q + 1 of column i of every matrix.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8), T __nv_bfloat16 or __half, d float32. Of pairs with the first in the low
// half, lane 4 g + q holds
//     a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8, columns 2 q and 2 q + 1, from a[2] on 8 more
//     b[0], b[1]               column g, rows 2 q and 2 q + 1, in b[1] 8 more
//     d[0] ... d[3]            rows g, g, g + 8, g + 8, columns 2 q, 2 q + 1, 2 q, 2 q + 1
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A plain load, as one function so that the emulation counts bank conflicts.
__device__ __forceinline__ uint4 load_shared_16(const void* shared) {
  return *static_cast<const uint4*>(shared);
}

// ---- bits

// The place of a word's highest bit; -1 where it has none.
__device__ __forceinline__ int highest_bit(uint32_t bits) { return 31 - __clz(static_cast<int>(bits)); }

// By `places` modulo 32, so that -1 is 31.
__device__ __forceinline__ uint32_t rotate_left(uint32_t bits, int places) {
  return __funnelshift_l(bits, bits, static_cast<unsigned>(places));
}

// ---- between blocks of one launch

// Loads past L1 of what other blocks of this launch wrote. Volatile: they stay behind the acquire.
__device__ __forceinline__ uint4 load_l2_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

__device__ __forceinline__ float load_l2(const float* global) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(global));
  return value;
}

// A thread that acquired a flag sees all that came before the release_adds it counts: what the releasing
// thread did, and what others did before the barrier (__syncthreads, __syncwarp) they and it passed. After a
// barrier so do the others.
__device__ __forceinline__ uint32_t acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void release_add(uint32_t* flag, uint32_t n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(n) : "memory");
}

// In every loop that polls a flag.
__device__ __forceinline__ void pause() { asm volatile("nanosleep.u32 20;" ::: "memory"); }

}  // namespace resmoe::ptx

#endif
