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

// Bulk copies and the barriers that count their bytes, from sm_90 on. What calls them stands in #if, as
// functions for older GPUs must not.
#ifndef RESMOE_BULK_COPIES
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define RESMOE_BULK_COPIES 0
#else
#define RESMOE_BULK_COPIES 1
#endif
#endif

#ifdef RESMOE_EMULATE_CUDA
#include "cuda_emulation.h"
#else

// The shared memory whose size the launch says, 128-byte aligned; and a variable of a block, without initial
// value.
#define RESMOE_SHARED_MEMORY(name) extern __shared__ __align__(128) uint8_t name[]
#define RESMOE_SHARED_VARIABLE(type, name) __shared__ type name

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
// 4 i + q gets elements 2 q and 2 q + 1 of row i of every matrix, or, transposed, of column i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

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

// ---- bulk copies

#if RESMOE_BULK_COPIES
// A barrier in shared memory, 8-byte aligned. Its phase ends when `arrivals` threads have arrived and all
// expected bytes have. One thread initializes, then calls barriers_initialized, then the block passes a
// __syncthreads.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barriers_initialized() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, after this phase has been told to wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  while (over == 0) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// One thread copies many bytes from global to shared memory: both ends and the number multiples of 16. Each
// byte that arrives counts on the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
#endif

}  // namespace resmoe::ptx

#endif
