// AVX-512 with BF16 and VBMI2 (AMD Zen 4, Intel Sapphire Rapids and later): vdpbf16ps multiplies two columns
// of 16 rows at once, vpexpandw spreads stored values. Compiled with -mavx512{f,bw,dq,vl,bf16,vbmi2} -mfma
// -mf16c.
#include <immintrin.h>

#include <utility>

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
  // Measured with 512 tokens and 8 of 32 kept: where the base saved 8 rows an expert, adding it was 7 %
  // faster than multiplying it; where it saved 4, it was 4 % slower.
  static constexpr int64_t kBaseCost = 5;
  static Line add(Line a, Line b) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512 even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                      _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
    const __m512 odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                                     _mm512_castsi512_ps(_mm512_and_si512(b, high)));
    const auto words = [](__m512 sums) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sums)); };
    return _mm512_or_si512(words(even), _mm512_slli_epi32(words(odd), 16));
  }
  using Coded = PairStep;
  static constexpr int kCodeRows = 6;
  // Making lines in registers again for every block, in cache, against once in scratch (Zen 5, GMAC/s): 4 bits,
  // 16 rows 220 against 203, 64 rows 218 against 240; 2 bits 236 against 214 and 233 against 241; 8 bits, of which
  // a line takes eight instructions instead of two, 16 rows 130 against 179.
  template <int bits>
  static constexpr int kCodeBlocks = bits == 8 ? 1 : 3;
  template <int bits>
  using Codes = CodeWords<bits>;
  static Pair pair(const void* x, int64_t step) {
    int32_t both;
    __builtin_memcpy(&both, static_cast<const uint16_t*>(x) + 2 * step, 4);
    return _mm512_set1_epi32(both);
  }
  static __m512 dot(__m512 sum, Line line, Pair pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)line, (__m512bh)pair);
  }
};

template <Dtype weight>
using WordStep = WideningStep<weight, ExpandWords>;

}  // namespace

const Kernels* kernels_avx512_bf16(Dtype weight, Operand operand) {
  if (operand == Operand::bfloat16) return weight == Dtype::bfloat16 ? &table<PairStep> : nullptr;
  return table_for<WordStep>(weight);
}

}  // namespace resmoe
