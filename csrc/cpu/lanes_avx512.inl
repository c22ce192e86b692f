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
  // Sums of float32 weights, rounded, would double the error; narrower ones are less exact than the operands.
  static constexpr int64_t kBaseCost = 0;
  static Pair pair(const void* x, int64_t step) { return {static_cast<const float*>(x) + 2 * step}; }
  static __m512 dot(__m512 sum, Line line, Pair pair) {
    return _mm512_fmadd_ps(line.odd, _mm512_set1_ps(pair.x[1]),
                           _mm512_fmadd_ps(line.even, _mm512_set1_ps(pair.x[0]), sum));
  }
};
