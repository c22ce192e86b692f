// AVX-512 without BF16 or VBMI2 (Intel Skylake-SP to Ice Lake): weights are widened and multiplied in
// float32. Compiled with -mavx512{f,bw,dq,vl} -mfma -mf16c.
#include <immintrin.h>

#include <utility>

#include "kernels.h"

namespace resmoe {
namespace {

#include "lanes_avx512.inl"

#include "kernels.inl"

// Only elements of 32 bits can be spread by this instruction set: words are widened for it.
struct ExpandWords {
  static __m256i half(const std::byte* values, uint32_t mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), wide));
  }
  static __m512i expand(const std::byte* values, uint32_t mask) {
    const uint32_t first = mask & 0xffff;
    const __m256i low = half(values, first);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                              half(values + 2 * __builtin_popcount(first), mask >> 16), 1);
  }
};

template <Dtype weight>
using WordStep = WideningStep<weight, ExpandWords>;

}  // namespace

const Kernels* kernels_avx512(Dtype weight, Operand operand) {
  return operand == Operand::float32 ? table_for<WordStep>(weight) : nullptr;
}

}  // namespace resmoe
