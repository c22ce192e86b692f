// The tile registers of AMX: eight of up to 16 rows of 64 bytes. A register's number is a template argument,
// as it is part of the instruction. tdpbf16ps, the one product used here, is
//
//     c[m][n] += sum_k  a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1]      c float32, a and b bfloat16
//
// With RESMOE_EMULATE_AMX the same class is plain C++ that does what the instructions do, for tests on
// machines without AMX, and ends the program where the processor would fault, and where a row would overlap
// the next. Everything is local to the including file, as both forms are linked into one test.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef RESMOE_EMULATE_AMX
#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

namespace resmoe {
namespace {

// What ldtilecfg reads. A register of no rows must not be used.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#ifndef RESMOE_EMULATE_AMX

// Assembly where intrinsics exist: those of GCC 12 paste the register's number as text, so that it cannot
// come from a template, and do not say which memory an instruction reads, so that a store to it may be moved
// behind.
struct Tiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

#else

class Tiles {
 public:
  static void configure(const TileConfig& config) {
    require(reinterpret_cast<uintptr_t>(&config) % alignof(TileConfig) == 0,
            "the configuration is not aligned");
    require(config.palette == 1 && config.start_row == 0, "palette 1 from row 0 is what the kernels use");
    for (const uint8_t byte : config.reserved)
      require(byte == 0, "a reserved byte of the configuration is set");
    for (int t = 0; t < 16; ++t) {
      require(config.rows[t] <= 16 && config.row_bytes[t] <= 64,
              "a tile is configured beyond 16 rows of 64 bytes");
      require((config.rows[t] == 0) == (config.row_bytes[t] == 0),
              "a tile has rows without bytes or the reverse");
      require(t < 8 || config.rows[t] == 0, "there are eight tiles");
    }
    state() = {true, config, {}};
  }
  static void release() { state() = {}; }

  template <int t>
  static void zero() {
    std::memset(tile<t>(), 0, sizeof(Bytes));
  }
  template <int t>
  static void load(const void* from, int64_t stride) {
    zero<t>();
    for_rows<t>(stride, [&](int row, size_t bytes) {
      std::memcpy(tile<t>() + 64 * row, static_cast<const std::byte*>(from) + row * stride, bytes);
    });
  }
  template <int t>
  static void store(void* to, int64_t stride) {
    for_rows<t>(stride, [&](int row, size_t bytes) {
      std::memcpy(static_cast<std::byte*>(to) + row * stride, tile<t>() + 64 * row, bytes);
    });
  }

  // As Intel's manual writes it: the products of even and of odd k are summed apart, each step rounded once,
  // to nearest even; then both sums are added, and that to c. Denormals are zero, before and after every
  // step.
  template <int c, int a, int b>
  static void dot() {
    static_assert(c != a && c != b && a != b, "tdpbf16ps wants three different tiles");
    std::byte *const to = tile<c>(), *const left = tile<a>(), *const right = tile<b>();
    const TileConfig& config = state().config;
    require(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b] &&
                config.row_bytes[a] == 4 * config.rows[b],
            "tdpbf16ps: the shapes of the tiles do not fit");
    require(config.row_bytes[a] % 4 == 0 && config.row_bytes[b] % 4 == 0, "tdpbf16ps: half a pair in a row");
    const int width = config.row_bytes[c] / 4;
    for (int m = 0; m < config.rows[c]; ++m) {
      float sums[2][16] = {}, row[16];
      for (int k = 0; k < config.rows[b]; ++k)
        for (int odd = 0; odd < 2; ++odd) {
          const float factor = widened(left + 64 * m + 4 * k + 2 * odd);
          for (int n = 0; n < width; ++n)
            sums[odd][n] =
                flushed(__builtin_fmaf(factor, widened(right + 64 * k + 4 * n + 2 * odd), sums[odd][n]));
        }
      std::memcpy(row, to + 64 * m, sizeof row);
      for (int n = 0; n < width; ++n) row[n] = flushed(flushed(row[n]) + flushed(sums[0][n] + sums[1][n]));
      std::memcpy(to + 64 * m, row, sizeof row);
    }
  }

 private:
  using Bytes = std::byte[16 * 64];
  struct State {
    bool configured = false;
    TileConfig config;
    Bytes tiles[8] = {};
  };

  static State& state() {
    static thread_local State state;
    return state;
  }
  static void require(bool condition, const char* rule) {
    if (condition) return;
    std::fprintf(stderr, "AMX emulation: %s\n", rule);
    std::abort();
  }
  template <int t>
  static std::byte* tile() {
    static_assert(t >= 0 && t < 8, "there are eight tiles");
    require(state().configured, "a tile is used before ldtilecfg or after tilerelease");
    require(state().config.rows[t] != 0, "a tile without rows is used");
    return state().tiles[t];
  }
  template <int t, class Visit>
  static void for_rows(int64_t stride, const Visit& visit) {
    tile<t>();
    const TileConfig& config = state().config;
    require(stride >= config.row_bytes[t],
            "rows of a tile overlap in memory: the stride is below their bytes");
    for (int row = 0; row < config.rows[t]; ++row) visit(row, size_t{config.row_bytes[t]});
  }
  static float flushed(float value) {
    return __builtin_fabsf(value) < 0x1p-126f ? __builtin_copysignf(0.0f, value) : value;
  }
  static float widened(const std::byte* bfloat16) {
    uint16_t half;
    std::memcpy(&half, bfloat16, 2);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
  }
};

#endif

}  // namespace
}  // namespace resmoe
