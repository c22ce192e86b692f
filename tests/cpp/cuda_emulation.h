// CUDA on the CPU, for tests: what a kernel's source says of threads, and the bodies of csrc/cuda/ptx.h.
// Every CUDA thread is a fiber; all blocks of a grid run interleaved on one thread of the CPU, which changes
// fibers where one waits. Faults end the launch with a sentence (std::runtime_error):
//
//     every fiber waits and nothing can wake one
//     lanes of a warp, or threads of a block, that meet at different places or left the kernel
//     addresses not aligned, not in shared memory, copies nobody waited for, polling without ptx::pause
//     with ThreadSanitizer: races. Only barriers, __syncwarp, release_add and acquire order threads, as on a
//     GPU
//
// Others show in results: shared memory and the target of a copy that has not been waited for are NaN (bytes
// 0xFF), and the orders and arrivals of Config are the extremes of what a GPU may do. With AddressSanitizer a
// block's shared memory has an end.
//
// What it does not show: time; a weaker memory order than the one ThreadSanitizer knows; the rounding of the
// tensor cores' sums (here float32, one product after another); blocks whose size is no multiple of 32.
#pragma once

#if !defined(__x86_64__)
#error "the emulation of CUDA changes stacks in x86-64 assembly"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <vector>

#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ use_RESMOE_SHARED_MEMORY_as_all_blocks_run_at_once

#define RESMOE_SHARED_MEMORY(name) uint8_t* const name = ::resmoe::emulation::shared_memory()

inline constinit thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace resmoe::emulation {

using Place = std::source_location;

// Who goes on when several could: the lowest of threads, warps and blocks, until it waits; the highest; any.
enum class Order { forward, reverse, shuffled };
// When the bytes of an asynchronous copy are there: when it is waited for, and NaN until then; or at once.
enum class Arrival { late, early };

struct Config {
  Order order = Order::forward;
  Arrival copies = Arrival::late;
  unsigned seed = 0;  // of Order::shuffled
};

// All orders, so many of them shuffled, with both arrivals.
std::vector<Config> configs(unsigned shuffled);

// What all threads of a launch did; products and matrix_loads by warp. Bank conflicts: how many more passes
// than one the loads by load_shared_16 and load_matrix_x4 take, 8 lanes a pass.
struct Counts {
  uint64_t products, matrix_loads, shared_loads, bank_conflicts, copies, copied_bytes, barriers;
};

// Runs thread() as every thread of a grid.
Counts run(const Config& config, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& thread);

template <typename... Parameters>
Counts launch(const Config& config, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              std::type_identity_t<Parameters>... arguments) {
  return run(config, grid, block, shared_bytes, [&] { kernel(arguments...); });
}

// ---- what threads of a kernel call

uint8_t* shared_memory();
void require_aligned(const void* address, size_t bytes, const char* what);
void require_shared(const void* address, size_t bytes, const char* what);

void sync_threads(Place place);
void sync_warp(unsigned lanes, Place place);
uint64_t shuffle(unsigned lanes, uint64_t value, int source, Place place);
uint32_t ballot(unsigned lanes, bool vote, Place place);
void load_matrices_transposed(uint32_t (&r)[4], const void* address, const uint4& row, Place place);
template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place);
void count_shared_load(const void* address);

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int groups);

void polled(const void* flag);
void flag_changed();
void pause();

template <typename T>
T load(const void* address, const char* what) {
  require_aligned(address, sizeof(T), what);
  return *static_cast<const T*>(address);
}

template <typename T>
T shuffled(unsigned lanes, T value, int source, Place place) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(lanes, bits, source, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

}  // namespace resmoe::emulation

// ---- CUDA

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  resmoe::emulation::sync_threads(place);
}
inline void __syncwarp(unsigned lanes = ~0u, std::source_location place = std::source_location::current()) {
  resmoe::emulation::sync_warp(lanes, place);
}
template <typename T>
T __shfl_sync(unsigned lanes, T value, int source,
              std::source_location place = std::source_location::current()) {
  return resmoe::emulation::shuffled(lanes, value, source & 31, place);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask,
                  std::source_location place = std::source_location::current()) {
  return resmoe::emulation::shuffled(lanes, value, resmoe::emulation::lane() ^ mask, place);
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, unsigned by,
                 std::source_location place = std::source_location::current()) {
  const int lane = resmoe::emulation::lane(), source = lane - static_cast<int>(by);
  return resmoe::emulation::shuffled(lanes, value, source < 0 ? lane : source, place);
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, unsigned by,
                   std::source_location place = std::source_location::current()) {
  const int lane = resmoe::emulation::lane(), source = lane + static_cast<int>(by);
  return resmoe::emulation::shuffled(lanes, value, source > 31 ? lane : source, place);
}
inline uint32_t __ballot_sync(unsigned lanes, int vote,
                              std::source_location place = std::source_location::current()) {
  return resmoe::emulation::ballot(lanes, vote != 0, place);
}
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
inline uint32_t atomicOr(uint32_t* to, uint32_t value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// ---- the functions of csrc/cuda/ptx.h, which says what they do

namespace resmoe::ptx {

using emulation::Place;

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int N>
void wait_copies() {
  emulation::wait_copies(N);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row, Place place = Place::current()) {
  emulation::require_shared(row, 16, "ldmatrix");
  emulation::load_matrices_transposed(r, row, emulation::load<uint4>(row, "ldmatrix"), place);
}
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Place place = Place::current()) {
  emulation::multiply<T>(d, a, b, place);
}
inline uint4 load_shared_16(const void* shared) {
  emulation::require_shared(shared, 16, "load_shared_16");
  emulation::count_shared_load(shared);
  return emulation::load<uint4>(shared, "load_shared_16");
}

inline int highest_bit(uint32_t bits) { return 31 - std::countl_zero(bits); }
inline uint32_t rotate_left(uint32_t bits, int places) { return std::rotl(bits, places); }

inline uint4 load_l2_16(const void* global) { return emulation::load<uint4>(global, "load_l2_16"); }
inline float load_l2(const float* global) { return emulation::load<float>(global, "load_l2"); }

inline uint32_t acquire(const uint32_t* flag) {
  emulation::polled(flag);
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
inline void release_add(uint32_t* flag, uint32_t n) {
  emulation::require_aligned(flag, sizeof *flag, "release_add");
  __atomic_fetch_add(flag, n, __ATOMIC_RELEASE);
  emulation::flag_changed();
}
inline void pause() { emulation::pause(); }

}  // namespace resmoe::ptx
