// What this machine can do at most, as far as plain loops can show it: bytes read from memory and bfloat16
// products. measure.py compiles it for the machine it runs on and calls it from as many threads as it times.
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

extern "C" {

// Reads `bytes` bytes, a multiple of 4 KiB, in four streams, each line asked for 1 KiB ahead.
uint64_t read_memory(const uint64_t* words, int64_t bytes) {
  const int64_t quarter = bytes / 4 / 8;
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < quarter; i += 8) {
    for (int64_t s = 0; s < 4; ++s) {
      const uint64_t* line = words + s * quarter + i;
      __builtin_prefetch(line + 128, 0, 2);
      for (int j = 0; j < 8; ++j) sums[j] += line[j];
    }
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

// Multiplies and adds bfloat16 pairs in registers; returns the operations done, 0 where there is no
// vdpbf16ps.
double multiply_bfloat16([[maybe_unused]] int64_t rounds) {
#if defined(__AVX512BF16__)
  __m512 sums[16];
  for (int j = 0; j < 16; ++j) sums[j] = _mm512_set1_ps(static_cast<float>(j));
  __m512i pairs = _mm512_set1_epi32(0x3f803f80);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(pairs));
    for (int j = 0; j < 16; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)pairs, (__m512bh)pairs);
  }
  for (int j = 0; j < 16; ++j) asm volatile("" ::"v"(sums[j]));
  return 16.0 * 64.0 * static_cast<double>(rounds);
#else
  return 0;
#endif
}
}
