// Lanes and the widening Step of the AVX-512 instruction sets; see kernels.inl for what they are. Included by
// kernels_avx512.cpp and kernels_avx512_bf16.cpp inside their anonymous namespaces.

struct Lanes {
  using Floats = __m512;
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats set(float a) { return _mm512_set1_ps(a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats round(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats times_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
  static Floats where_negative(Floats z, Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
  }
  static Floats load_bfloat16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  // Integer rounding keeps denormals, which vcvtneps2bf16 would flush.
  static void store_bfloat16(uint16_t* p, Floats a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i kept = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
  }
  static Floats load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_float16(uint16_t* p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// c - (2^bits - 1) / 2 as bfloat16, for every index of vpermw, which reads 5 bits: what lies above a code's bits
// changes nothing.
template <int bits>
struct CodeValues {
  alignas(64) uint16_t of[32];
  constexpr CodeValues() : of{} {
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i % (1 << bits)) - static_cast<float>((1 << bits) - 1) / 2;
      of[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
    }
  }
};
template <int bits>
inline constexpr CodeValues<bits> kCodeValues;

// The lines of a part of a coded unit as 32 bfloat16: a shift and a look-up each.
template <int bits>
struct CodeWords {
  static constexpr int kParts = bits == 3 ? 1 : bits;
  static constexpr int kLines = 16 / kParts;
  static constexpr int64_t kBytes = 64 * bits / kParts;

  static __m512i load(const std::byte* part, int i) { return _mm512_loadu_si512(part + 64 * i); }
  template <int i>
  static __m512i codes(const std::byte* part) {
    if constexpr (bits == 3 && i == 15) {  // bit 15 of three words
      const __m512i low = _mm512_srli_epi16(load(part, 0), 15), middle = _mm512_srli_epi16(load(part, 1), 14),
                    high = _mm512_srli_epi16(load(part, 2), 13);
      const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi16(1), low, middle, 0xca);
      return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), two, high, 0xca);
    } else {
      constexpr int in_word = bits == 3 ? i % 5 : i;
      const __m512i words = load(part, bits == 3 ? i / 5 : 0);
      return in_word == 0 ? words : _mm512_srli_epi16(words, bits * in_word);
    }
  }
  template <int i>
  static __m512i line(const std::byte* part) {
    return _mm512_permutexvar_epi16(codes<i>(part), _mm512_load_si512(kCodeValues<bits>.of));
  }
};

// 8 bits: c / 256 are the first bits of a float's fraction, so that 256 + c takes no conversion.
template <>
struct CodeWords<8> {
  static constexpr int kParts = 8, kLines = 2;
  static constexpr int64_t kBytes = 64;
  template <int i>
  static __m512 values(__m512i words, bool odd) {  // of the even or the odd column
    const __m512i fraction = i == 0 ? (odd ? _mm512_srli_epi32(words, 1) : _mm512_slli_epi32(words, 15))
                                    : (odd ? _mm512_srli_epi32(words, 9) : _mm512_slli_epi32(words, 7));
    const __m512i bits = _mm512_ternarylogic_epi32(fraction, _mm512_set1_epi32(0x7f8000),
                                                   _mm512_set1_epi32(0x43800000), 0xea);  // (a & b) | c
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(256 + 127.5f));
  }
  template <int i>
  static __m512i line(const std::byte* part) {
    const __m512i words = _mm512_loadu_si512(part);
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(values<i>(words, false)), 16),
                           _mm512_castps_si512(values<i>(words, true)));
  }
};

// Weights of any type, widened, times float32 operands. `Words` spreads up to 32 stored 16-bit values to the
// set bits of a mask.
template <Dtype kWeight, class Words>
struct WideningStep {
  static constexpr Dtype weight = kWeight;
  static constexpr Operand operand = Operand::float32;
  static constexpr int kRows = 6, kTiles = 4;  // 24 sums, and a Line at a time: 26 of 32 registers
  static constexpr int64_t kBytes = 32 * size_of(kWeight);
  struct Line {
    __m512 even, odd;
  };
  struct Pair {
    const float* x;
  };

  static Line of_words(__m512i words) {
    if constexpr (kWeight == Dtype::bfloat16) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    } else {
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)),
              _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
    }
  }
  static Line load(const std::byte* bytes) {
    if constexpr (kWeight == Dtype::float32) {
      return {_mm512_loadu_ps(bytes), _mm512_loadu_ps(bytes + 64)};
    } else {
      return of_words(_mm512_loadu_si512(bytes));
    }
  }
  static Line expand(const std::byte* values, uint32_t mask) {
    if constexpr (kWeight == Dtype::float32) {
      const uint32_t first = mask & 0xffff;
      return {_mm512_maskz_expand_ps(static_cast<__mmask16>(first), _mm512_loadu_ps(values)),
              _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16),
                                     _mm512_loadu_ps(values + 4 * __builtin_popcount(first)))};
    } else {
      return of_words(Words::expand(values, mask));
    }
  }
  static void store(std::byte* bytes, Line line) {
    if constexpr (kWeight == Dtype::float32) {
      _mm512_storeu_ps(bytes, line.even);
      _mm512_storeu_ps(bytes + 64, line.odd);
    } else if constexpr (kWeight == Dtype::bfloat16) {
      _mm512_storeu_si512(bytes, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(line.even), 16),
                                                 _mm512_castps_si512(line.odd)));
    } else {
      constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm512_cvtps_ph(line.even, nearest));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 32), _mm512_cvtps_ph(line.odd, nearest));
    }
  }
  using Coded = WideningStep<Dtype::bfloat16, Words>;
  static constexpr int kCodeRows = 3;
  template <int bits>
  static constexpr int kCodeBlocks = 1;
  template <int bits>
  struct Codes : CodeWords<bits> {
    template <int i>
    static Line line(const std::byte* part) {
      return of_words(CodeWords<bits>::template line<i>(part));
    }
  };
  // Sums of float32 weights, rounded, would double the error; narrower ones are less exact than the operands.
  static constexpr int64_t kBaseCost = 0;
  static Pair pair(const void* x, int64_t step) { return {static_cast<const float*>(x) + 2 * step}; }
  static __m512 dot(__m512 sum, Line line, Pair pair) {
    return _mm512_fmadd_ps(line.odd, _mm512_set1_ps(pair.x[1]),
                           _mm512_fmadd_ps(line.even, _mm512_set1_ps(pair.x[0]), sum));
  }
};
