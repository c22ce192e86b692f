// AVX-512 with BF16 and VBMI2 (AMD Zen 4, Intel Sapphire Rapids and later): vdpbf16ps multiplies two columns
// of 16 rows at once, vpexpandw spreads stored values. Compiled with -mavx512{f,bw,dq,vl,bf16,vbmi2} -mfma
// -mf16c.
#include <immintrin.h>

#include "kernels.h"

namespace resmoe {
namespace {

#include "lanes_avx512.inl"

#include "kernels.inl"

// On Zen 4 a zeroing vpexpandw waits for the old contents of its target: 6.4 cycles each in a loop of four.
// Into a register that was zeroed first it takes 2.9. The empty asm keeps the compiler from joining the two
// again.
struct ExpandWords {
  static __m512i expand(const std::byte* values, uint32_t mask) {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return _mm512_mask_expand_epi16(zero, mask, _mm512_loadu_si512(values));
  }
};

// bfloat16 weights times bfloat16 operands.
struct PairStep {
  static constexpr Dtype weight = Dtype::bfloat16;
  static constexpr Operand operand = Operand::bfloat16;
  static constexpr int kRows = 6, kTiles = 4;  // 24 sums, 4 lines, 1 pair: 29 of 32 registers
  static constexpr int64_t kBytes = 64;
  using Line = __m512i;
  using Pair = __m512i;
  static Line load(const std::byte* bytes) { return _mm512_loadu_si512(bytes); }
  static Line expand(const std::byte* values, uint32_t mask) { return ExpandWords::expand(values, mask); }
  static void store(std::byte* bytes, Line line) { _mm512_storeu_si512(bytes, line); }
  static Pair pair(const void* x, int64_t step) {
    int32_t both;
    __builtin_memcpy(&both, static_cast<const uint16_t*>(x) + 2 * step, 4);
    return _mm512_set1_epi32(both);
  }
  static __m512 dot(__m512 sum, Line line, Pair pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)line, (__m512bh)pair);
  }
};

}  // namespace

const Kernels* kernels_avx512_bf16(Dtype weight, Operand operand) {
  if (operand == Operand::bfloat16) return weight == Dtype::bfloat16 ? &table<PairStep> : nullptr;
  switch (weight) {
    case Dtype::bfloat16:
      return &table<WideningStep<Dtype::bfloat16, ExpandWords>>;
    case Dtype::float16:
      return &table<WideningStep<Dtype::float16, ExpandWords>>;
    case Dtype::float32:
      return &table<WideningStep<Dtype::float32, ExpandWords>>;
  }
  return nullptr;
}

}  // namespace resmoe
