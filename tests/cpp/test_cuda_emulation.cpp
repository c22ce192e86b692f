// What the emulation of CUDA computes, against what NVIDIA documents. Its planted faults are in
// test_cuda_emulation_faults.cpp.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/ptx.h"

namespace {

using namespace resmoe;
using emulation::Config;
using emulation::Counts;

__device__ int thread_of_block() { return static_cast<int>(threadIdx.x); }
__device__ int this_block() { return static_cast<int>(blockIdx.x); }

// a (16, 16), b (16, 8) and d (16, 8) by rows; every element where ptx.h says.
template <typename T>
__global__ void one_product(const T* a, const T* b, float* d) {
  const int g = thread_of_block() / 4, q = thread_of_block() % 4;
  const auto pair = [](const T* low, const T* high) {
    uint16_t bits[2];
    std::memcpy(&bits[0], low, 2);
    std::memcpy(&bits[1], high, 2);
    return uint32_t{bits[1]} << 16 | bits[0];
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const T* const from = a + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
    left[i] = pair(from, from + 1);
  }
  for (int i = 0; i < 2; ++i) {
    const T* const from = b + (2 * q + 8 * i) * 8 + g;
    right[i] = pair(from, from + 8);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  ptx::mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

template <typename T>
void products_are_products() {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> small(-9, 9);
  std::vector<T> a(256), b(128);
  std::vector<float> d(128), expected(128);
  for (T& value : a) value = static_cast<T>(static_cast<float>(small(random)) / 8);
  for (T& value : b) value = static_cast<T>(static_cast<float>(small(random)) * 4);
  for (float& value : d) value = static_cast<float>(small(random));
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 8; ++n) {
      expected[m * 8 + n] = d[m * 8 + n];
      for (size_t k = 0; k < 16; ++k) {
        expected[m * 8 + n] += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[k * 8 + n]);
      }
    }
  }
  const Counts counts = emulation::launch({}, one_product<T>, 1, 32, 0, a.data(), b.data(), d.data());
  CHECK(d == expected, "%zu bytes an element", sizeof(T));
  CHECK(counts.products == 1, "%zu", static_cast<size_t>(counts.products));
}

// The address of row i of a matrix is `pitch` bytes behind the one before; `out` is what every lane gets.
__global__ void matrices(const uint16_t* elements, int pitch, uint32_t* out) {
  RESMOE_SHARED_MEMORY(shared);
  const int lane = thread_of_block();
  std::memcpy(shared + lane * pitch, elements + lane * 8, 16);
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4_transposed(r, shared + lane * pitch);
  const uint4 row = ptx::load_shared_16(shared + lane * pitch);
  CHECK(std::memcmp(&row, elements + lane * 8, 16) == 0, "row %d", lane);
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

void matrices_are_loaded() {
  std::vector<uint16_t> elements(256);
  for (size_t i = 0; i < 256; ++i) elements[i] = static_cast<uint16_t>(i * 251);
  struct Pitch {
    int bytes;
    uint64_t conflicts;  // of 4 matrices, and as many of 4 times 8 lanes that load 16 bytes
  };
  for (const Pitch pitch : {Pitch{16, 0}, Pitch{32, 8}, Pitch{64, 24}, Pitch{128, 56}, Pitch{144, 0}}) {
    std::vector<uint32_t> out(128);
    const Counts counts = emulation::launch({}, matrices, 1, 32, static_cast<size_t>(32 * pitch.bytes),
                                            elements.data(), pitch.bytes, out.data());
    for (size_t lane = 0; lane < 32; ++lane) {
      for (size_t m = 0; m < 4; ++m) {
        const auto element = [&](size_t i, size_t j) { return uint32_t{elements[m * 64 + j * 8 + i]}; };
        const uint32_t expected = element(lane / 4, lane % 4 * 2 + 1) << 16 | element(lane / 4, lane % 4 * 2);
        CHECK(out[lane * 4 + m] == expected, "lane %zu, matrix %zu", lane, m);
      }
    }
    CHECK(counts.bank_conflicts == pitch.conflicts, "%zu of a pitch of %d bytes",
          static_cast<size_t>(counts.bank_conflicts), pitch.bytes);
    CHECK(counts.matrix_loads == 1 && counts.shared_loads == 32, "%zu",
          static_cast<size_t>(counts.shared_loads));
  }
}

__global__ void lanes_exchange(int* wrong) {
  const int lane = thread_of_block() % 32;
  const auto expect = [&](int value, int expected) {
    if (value != expected) ptx::release_add(reinterpret_cast<uint32_t*>(wrong), 1);
  };
  expect(__shfl_sync(~0u, 100 + lane, 5), 105);
  expect(__shfl_sync(~0u, 100 + lane, lane + 3), 100 + (lane + 3) % 32);
  expect(__shfl_xor_sync(~0u, lane, 12), lane ^ 12);
  expect(__shfl_up_sync(~0u, lane, 4), lane < 4 ? lane : lane - 4);
  expect(__shfl_down_sync(~0u, lane, 4), lane > 27 ? lane : lane + 4);
  expect(static_cast<int>(__ballot_sync(~0u, lane % 3 == 0)), 0x49249249);
}

// Every block has shared memory of its own, NaN at first.
__global__ void shares(float* out) {
  RESMOE_SHARED_MEMORY(shared);
  auto* const numbers = reinterpret_cast<float*>(shared);
  const int t = thread_of_block();
  const bool fresh = std::isnan(numbers[t]);
  numbers[t] = static_cast<float>(this_block());
  __syncthreads();
  out[64 * this_block() + t] = fresh ? numbers[63 - t] : -1.0f;
}

void lanes_and_blocks_share() {
  for (const Config& config : emulation::configs(2)) {
    int wrong = 0;
    emulation::launch(config, lanes_exchange, 1, 64, 0, &wrong);
    CHECK(wrong == 0, "%d, seed %u", wrong, config.seed);
    std::vector<float> out(192);
    emulation::launch(config, shares, 3, 64, 256, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      CHECK(out[i] == static_cast<float>(i / 64), "%zu: %f", i, double{out[i]});
    }
  }
}

__global__ void come_in(uint32_t* counter, int* came) {
  came[atomicAdd(counter, 1)] = this_block() * 64 + thread_of_block();
}

void orders_are_orders() {
  const auto order = [](const Config& config) {
    uint32_t counter = 0;
    std::vector<int> came(192);
    emulation::launch(config, come_in, 3, 64, 0, &counter, came.data());
    return came;
  };
  const std::vector<int> forward = order({}), reverse = order({.order = emulation::Order::reverse});
  CHECK(std::is_sorted(forward.begin(), forward.end()), "first %d", forward[0]);
  CHECK(std::is_sorted(reverse.rbegin(), reverse.rend()), "first %d", reverse[0]);
  std::vector<int> shuffled = order({.order = emulation::Order::shuffled, .seed = 1});
  CHECK(shuffled != order({.order = emulation::Order::shuffled, .seed = 2}), "first %d", shuffled[0]);
  CHECK(shuffled == order({.order = emulation::Order::shuffled, .seed = 1}), "first %d", shuffled[0]);
  std::sort(shuffled.begin(), shuffled.end());
  CHECK(shuffled == forward, "first %d", shuffled[0]);
}

void launches_are_refused() {
  const auto error = [](unsigned threads, size_t shared_bytes) -> std::string {
    try {
      emulation::launch({}, shares, 1, threads, shared_bytes, nullptr);
      return "none";
    } catch (const std::exception& refused) {
      return refused.what();
    }
  };
  CHECK(error(0, 0) == "CUDA emulation: a block of 0 threads", "%s", error(0, 0).c_str());
  CHECK(error(33, 0) == "CUDA emulation: a block of 33 threads", "%s", error(33, 0).c_str());
  CHECK(error(2048, 0) == "CUDA emulation: a block of 2048 threads", "%s", error(2048, 0).c_str());
  CHECK(error(64, 240000) == "CUDA emulation: 240000 bytes of shared memory, where GPUs have 232448", "%s",
        error(64, 240000).c_str());
}

}  // namespace

int main() {
  products_are_products<__nv_bfloat16>();
  products_are_products<__half>();
  matrices_are_loaded();
  lanes_and_blocks_share();
  orders_are_orders();
  launches_are_refused();
  std::printf(failures == 0 ? "all checks passed\n" : "checks failed\n");
  return failures == 0 ? 0 : 1;
}
