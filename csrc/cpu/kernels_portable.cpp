// Any CPU: plain C++ in loops over 16 lanes, which compilers turn into whatever vectors there are. Weights
// are widened and multiplied in float32. Compiled without flags of its own.
#include <utility>

#include "kernels.h"

namespace resmoe {
namespace {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

float float_of_bfloat16(uint16_t word) { return bits_as<float>(uint32_t{word} << 16); }

uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN, made quiet
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_of_float16(uint16_t word) {
  const uint32_t sign = uint32_t{word & 0x8000u} << 16, magnitude = uint32_t{word & 0x7fffu} << 13;
  if (magnitude >= 0x7c00u << 13) return bits_as<float>(sign | magnitude | 0x7f800000);   // infinite or NaN
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f));  // denormals too
}

uint16_t float16_of_float(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t word;
  if (magnitude > 0x7f800000) {
    word = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN, made quiet
  } else if (magnitude >= 0x477ff000) {
    word = 0x7c00;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000) {
    // A denormal: at 0.5 the last bit of a float32 is 2^-24, that of a float16 denormal.
    word = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    word = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | word);
}

struct Lanes {
  struct Floats {
    float at[16];
  };
  template <class Each>
  static Floats each(const Each& value) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.at[i] = value(i);
    return out;
  }
  static Floats load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& a) {
    for (int i = 0; i < 16; ++i) p[i] = a.at[i];
  }
  static Floats set(float a) {
    return each([&](int) { return a; });
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] + b.at[i]; });
  }
  static Floats sub(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] - b.at[i]; });
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] * b.at[i]; });
  }
  static Floats div(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] / b.at[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static Floats min(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
  }
  static Floats max(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  // Below 2^22: from 2^23 on a float32 has no fraction.
  static Floats round(const Floats& a) {
    return each([&](int i) { return a.at[i] + 0x1.8p23f - 0x1.8p23f; });
  }
  // In two factors: 2^151 and 2^-151 are no float32. The power of a NaN is of no account, as a is one too.
  static Floats times_power(const Floats& a, const Floats& n) {
    return each([&](int i) {
      const int whole = n.at[i] == n.at[i] ? static_cast<int>(n.at[i]) : 0, first = whole / 2;
      const auto power = [](int exponent) {
        return bits_as<float>(static_cast<uint32_t>(exponent + 127) << 23);
      };
      return a.at[i] * power(first) * power(whole - first);
    });
  }
  static Floats where_negative(const Floats& z, const Floats& a, const Floats& b) {
    return each([&](int i) { return z.at[i] < 0 ? a.at[i] : b.at[i]; });
  }
  static Floats load_bfloat16(const uint16_t* p) {
    return each([&](int i) { return float_of_bfloat16(p[i]); });
  }
  static void store_bfloat16(uint16_t* p, const Floats& a) {
    for (int i = 0; i < 16; ++i) p[i] = bfloat16_of_float(a.at[i]);
  }
  static Floats load_float16(const uint16_t* p) {
    return each([&](int i) { return float_of_float16(p[i]); });
  }
  static void store_float16(uint16_t* p, const Floats& a) {
    for (int i = 0; i < 16; ++i) p[i] = float16_of_float(a.at[i]);
  }
};

#include "kernels.inl"

// The lines of a part of a coded unit: words of 16 bits, pairs of the even and the odd column.
template <int bits>
struct CodeWords {
  static constexpr int kParts = bits == 3 ? 1 : bits;
  static constexpr int kLines = 16 / kParts;
  static constexpr int64_t kBytes = 64 * bits / kParts;

  template <int i>
  static float value(const std::byte* part, int element) {
    const auto word = [&](int at) {
      uint16_t bits16;
      __builtin_memcpy(&bits16, part + 64 * at + 2 * element, 2);
      return int{bits16};
    };
    int code;
    if constexpr (bits == 3 && i == 15) {
      code = word(0) >> 15 | word(1) >> 15 << 1 | word(2) >> 15 << 2;
    } else {
      constexpr int in_word = bits == 3 ? i % 5 : i;
      code = word(bits == 3 ? i / 5 : 0) >> bits * in_word & ((1 << bits) - 1);
    }
    return static_cast<float>(code) - static_cast<float>((1 << bits) - 1) / 2;
  }
};

template <Dtype kWeight>
struct WideningStep {
  static constexpr Dtype weight = kWeight;
  static constexpr Operand operand = Operand::float32;
  static constexpr int kRows = 2, kTiles = 1;
  static constexpr int64_t kBytes = 32 * size_of(kWeight);
  struct Line {
    Lanes::Floats even, odd;
  };
  struct Pair {
    float even, odd;
  };

  static Line load(const std::byte* bytes) {
    const auto* words = reinterpret_cast<const uint16_t*>(bytes);
    if constexpr (kWeight == Dtype::float32) {
      const auto* floats = reinterpret_cast<const float*>(bytes);
      return {Lanes::load(floats), Lanes::load(floats + 16)};
    } else if constexpr (kWeight == Dtype::bfloat16) {
      return {Lanes::each([&](int i) { return float_of_bfloat16(words[2 * i]); }),
              Lanes::each([&](int i) { return float_of_bfloat16(words[2 * i + 1]); })};
    } else {
      return {Lanes::load_float16(words), Lanes::load_float16(words + 16)};
    }
  }
  static Line expand(const std::byte* values, uint32_t mask) {
    std::byte line[kBytes] = {};
    for (; mask != 0; mask &= mask - 1, values += size_of(kWeight))
      __builtin_memcpy(line + __builtin_ctz(mask) * size_of(kWeight), values, size_of(kWeight));
    return load(line);
  }
  static void store(std::byte* bytes, const Line& line) {
    auto* words = reinterpret_cast<uint16_t*>(bytes);
    if constexpr (kWeight == Dtype::float32) {
      auto* floats = reinterpret_cast<float*>(bytes);
      Lanes::store(floats, line.even);
      Lanes::store(floats + 16, line.odd);
    } else if constexpr (kWeight == Dtype::bfloat16) {
      for (int i = 0; i < 16; ++i) {
        words[2 * i] = bfloat16_of_float(line.even.at[i]);
        words[2 * i + 1] = bfloat16_of_float(line.odd.at[i]);
      }
    } else {
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
      return {Lanes::each([&](int r) { return CodeWords<bits>::template value<i>(part, 2 * r); }),
              Lanes::each([&](int r) { return CodeWords<bits>::template value<i>(part, 2 * r + 1); })};
    }
  };
  static constexpr int64_t kBaseCost = 0;  // as in lanes_avx512.inl
  static Pair pair(const void* x, int64_t step) {
    const auto* both = static_cast<const float*>(x) + 2 * step;
    return {both[0], both[1]};
  }
  // The two products first: half as many roundings of the sum, which make up for the missing fma.
  static Lanes::Floats dot(const Lanes::Floats& sum, const Line& line, Pair pair) {
    return Lanes::each(
        [&](int i) { return sum.at[i] + (line.even.at[i] * pair.even + line.odd.at[i] * pair.odd); });
  }
};

}  // namespace

const Kernels* kernels_portable(Dtype weight, Operand operand) {
  return operand == Operand::float32 ? table_for<WideningStep>(weight) : nullptr;
}

}  // namespace resmoe
