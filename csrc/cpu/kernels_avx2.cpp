// AVX2 with FMA and F16C (Intel Haswell, AMD Zen and later): weights are widened and multiplied in float32.
// Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include <utility>

#include "kernels.h"

namespace resmoe {
namespace {

struct Lanes {
  struct Floats {
    __m256 low, high;
  };
  static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, Floats a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static Floats set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static Floats add(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static Floats sub(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  static Floats mul(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static Floats div(Floats a, Floats b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
  static Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  static Floats max(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
  }
  static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Floats round(Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
  }
  // In two factors: 2^151 and 2^-151 are no float32.
  static __m256 times_power(__m256 a, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i exponent) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(a, power(first)), power(_mm256_sub_epi32(whole, first)));
  }
  static Floats times_power(Floats a, Floats n) {
    return {times_power(a.low, n.low), times_power(a.high, n.high)};
  }
  static __m256 where_negative(__m256 z, __m256 a, __m256 b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_LT_OQ));
  }
  static Floats where_negative(Floats z, Floats a, Floats b) {
    return {where_negative(z.low, a.low, b.low), where_negative(z.high, a.high, b.high)};
  }

  static __m128i load_words(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m256 widen_bfloat16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static Floats load_bfloat16(const uint16_t* p) {
    return {widen_bfloat16(load_words(p)), widen_bfloat16(load_words(p + 8))};
  }
  static __m256i to_bfloat16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
  static void store_bfloat16(uint16_t* p, Floats a) {
    const __m256i crossed = _mm256_packus_epi32(to_bfloat16(a.low), to_bfloat16(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(crossed, 0b11'01'10'00));
  }
  static Floats load_float16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_words(p)), _mm256_cvtph_ps(load_words(p + 8))};
  }
  static void store_float16(uint16_t* p, Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, nearest));
  }
};

#include "kernels.inl"

// For each of 8 bits of a mask the number of set bits below it, or -1 where it is not set.
struct Places {
  alignas(64) int8_t of[256][8];
  constexpr Places() : of{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, place = 0; bit < 8; ++bit)
        of[mask][bit] = static_cast<int8_t>((mask >> bit & 1) != 0 ? place++ : -1);
  }
};
constexpr Places kPlaces;

__m128i places(uint32_t mask8) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[mask8]));
}

// Up to 8 stored values to the set bits of a mask, zero elsewhere.
__m128i expand_words(const std::byte* values, uint32_t mask8) {
  const __m128i twice = _mm_add_epi8(places(mask8), places(mask8));
  const __m128i bytes = _mm_unpacklo_epi8(twice, _mm_or_si128(twice, _mm_set1_epi8(1)));  // negative: zero
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), bytes);
}
__m256 expand_floats(const std::byte* values, uint32_t mask8) {
  const __m256i place = _mm256_cvtepi8_epi32(places(mask8));
  const __m256 spread =
      _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(values)), place);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), spread);
}

// The lines of a part of a coded unit, widened: a 32-bit lane holds the words of two columns.
template <int bits>
struct CodeWords {
  static constexpr int kParts = bits == 3 ? 1 : bits;
  static constexpr int kLines = 16 / kParts;
  static constexpr int64_t kBytes = 64 * bits / kParts;
  struct Line {
    Lanes::Floats even, odd;
  };

  // 8 rows: those of lanes at `part`, whose words' lowest bit is `shift`.
  template <int i, int shift>
  static __m256 values(const std::byte* part) {
    const auto words = [&](int at) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part + 64 * at));
    };
    const auto bit = [&](int at) {  // of the last line of 3 bits
      return _mm256_slli_epi32(
          _mm256_and_si256(_mm256_srli_epi32(words(at), shift + 15), _mm256_set1_epi32(1)), at);
    };
    __m256i code;
    if constexpr (bits == 3 && i == 15) {
      code = _mm256_or_si256(bit(0), _mm256_or_si256(bit(1), bit(2)));
    } else {
      constexpr int in_word = bits == 3 ? i % 5 : i;
      code = _mm256_and_si256(_mm256_srli_epi32(words(bits == 3 ? i / 5 : 0), shift + bits * in_word),
                              _mm256_set1_epi32((1 << bits) - 1));
    }
    constexpr float middle = static_cast<float>((1 << bits) - 1) / 2;
    return _mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(middle));
  }
  template <int i>
  static Line line(const std::byte* part) {
    return {{values<i, 0>(part), values<i, 0>(part + 32)}, {values<i, 16>(part), values<i, 16>(part + 32)}};
  }
};

template <Dtype kWeight>
struct WideningStep {
  static constexpr Dtype weight = kWeight;
  static constexpr Operand operand = Operand::float32;
  static constexpr int kRows = 2, kTiles = 2;  // 8 registers of sums, 4 of a Line and a factor: 13 of 16
  static constexpr int64_t kBytes = 32 * size_of(kWeight);
  struct Line {
    Lanes::Floats even, odd;
  };
  struct Pair {
    const float* x;
  };

  // 32 words in four quarters, as they are stored.
  static Line of_words(const __m128i (&words)[4]) {
    if constexpr (kWeight == Dtype::bfloat16) {
      // A quarter holds 4 rows: pairs of the even column (low) and the odd one.
      const auto pair = [&](int i) { return _mm256_set_m128i(words[i + 1], words[i]); };
      const auto low = [](__m256i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); };
      const auto high = [](__m256i a) {
        return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
      };
      return {{low(pair(0)), low(pair(2))}, {high(pair(0)), high(pair(2))}};
    } else {
      return {{_mm256_cvtph_ps(words[0]), _mm256_cvtph_ps(words[1])},
              {_mm256_cvtph_ps(words[2]), _mm256_cvtph_ps(words[3])}};
    }
  }
  static Line load(const std::byte* bytes) {
    if constexpr (kWeight == Dtype::float32) {
      const auto* floats = reinterpret_cast<const float*>(bytes);
      return {Lanes::load(floats), Lanes::load(floats + 16)};
    } else {
      const auto* words = reinterpret_cast<const uint16_t*>(bytes);
      return of_words({Lanes::load_words(words), Lanes::load_words(words + 8), Lanes::load_words(words + 16),
                       Lanes::load_words(words + 24)});
    }
  }
  static Line expand(const std::byte* values, uint32_t mask) {
    const std::byte* from[4];
    for (int i = 0; i < 4; ++i) {
      from[i] = values;
      values += __builtin_popcount(mask >> 8 * i & 0xff) * size_of(kWeight);
    }
    const auto quarter = [&](int i) { return mask >> 8 * i & 0xff; };
    if constexpr (kWeight == Dtype::float32) {
      return {{expand_floats(from[0], quarter(0)), expand_floats(from[1], quarter(1))},
              {expand_floats(from[2], quarter(2)), expand_floats(from[3], quarter(3))}};
    } else {
      return of_words({expand_words(from[0], quarter(0)), expand_words(from[1], quarter(1)),
                       expand_words(from[2], quarter(2)), expand_words(from[3], quarter(3))});
    }
  }
  static void store(std::byte* bytes, Line line) {
    if constexpr (kWeight == Dtype::float32) {
      auto* floats = reinterpret_cast<float*>(bytes);
      Lanes::store(floats, line.even);
      Lanes::store(floats + 16, line.odd);
    } else if constexpr (kWeight == Dtype::bfloat16) {
      const auto both = [](__m256 even, __m256 odd) {
        return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd));
      };
      auto* halves = reinterpret_cast<__m256i*>(bytes);
      _mm256_storeu_si256(halves, both(line.even.low, line.odd.low));
      _mm256_storeu_si256(halves + 1, both(line.even.high, line.odd.high));
    } else {
      auto* words = reinterpret_cast<uint16_t*>(bytes);
      Lanes::store_float16(words, line.even);
      Lanes::store_float16(words + 16, line.odd);
    }
  }
  using Coded = WideningStep<Dtype::bfloat16>;
  static constexpr int kCodeRows = 1;
  template <int bits>
  static constexpr int kCodeBlocks = 1;
  template <int bits>
  struct Codes : CodeWords<bits> {
    template <int i>
    static Line line(const std::byte* part) {
      const auto line = CodeWords<bits>::template line<i>(part);
      return {line.even, line.odd};
    }
  };
  static constexpr int64_t kBaseCost = 0;  // as in lanes_avx512.inl
  static Pair pair(const void* x, int64_t step) { return {static_cast<const float*>(x) + 2 * step}; }
  static Lanes::Floats dot(Lanes::Floats sum, Line line, Pair pair) {
    return Lanes::fma(line.odd, Lanes::set(pair.x[1]), Lanes::fma(line.even, Lanes::set(pair.x[0]), sum));
  }
};

}  // namespace

const Kernels* kernels_avx2(Dtype weight, Operand operand) {
  return operand == Operand::float32 ? table_for<WideningStep>(weight) : nullptr;
}

}  // namespace resmoe
