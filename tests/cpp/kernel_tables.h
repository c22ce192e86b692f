// The tables of kernels that this machine can test, and numbers and memory to test them with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

namespace resmoe {
const Kernels* kernels_amx_emulated(Dtype weight, Operand operand);
}

using resmoe::Activation;
using resmoe::Dtype;
using resmoe::Isa;
using resmoe::Kernels;
using resmoe::Operand;
using resmoe::Panel;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Table {
  std::string name;
  const Kernels* kernels;
};

inline std::vector<Table> tables() {
  std::vector<Table> found;
  const char* dtypes[] = {"bfloat16", "float16", "float32"};
  const auto add = [&](const std::string& isa, const Kernels* kernels) {
    if (kernels != nullptr)
      found.push_back({isa + ", weights " + dtypes[static_cast<int>(kernels->weight)] + ", operands " +
                           (kernels->operand == Operand::bfloat16 ? "bfloat16" : "float32"),
                       kernels});
  };
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    for (const Operand operand : {Operand::bfloat16, Operand::float32})
      for (const Dtype weight : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
        if (supported(isa)) add(name(isa), kernels(isa, weight, operand));
#if defined(__x86_64__)
  if (supported(Isa::avx512_bf16))
    add("amx emulated", resmoe::kernels_amx_emulated(Dtype::bfloat16, Operand::bfloat16));
#endif
  return found;
}

// A floating-point format, and the values of its bits as it defines them.
struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
};

inline Format format_of(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? Format{8, 7} : dtype == Dtype::float16 ? Format{5, 10} : Format{8, 23};
}

inline double value_of(Format f, uint32_t bits) {
  const double sign = (bits >> (f.bits() - 1)) != 0 ? -1.0 : 1.0;
  const uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> f.mantissa_bits & ((1u << f.exponent_bits) - 1));
  if (exponent == (1 << f.exponent_bits) - 1) return mantissa == 0 ? sign * kInfinity : kNaN;
  const int one = exponent == 0 ? 0 : 1 << f.mantissa_bits;
  return sign *
         std::ldexp(one + static_cast<double>(mantissa), std::max(exponent, 1) - f.bias() - f.mantissa_bits);
}

// Of a value that the format has.
inline uint32_t bits_of(Format f, double value) {
  const uint32_t sign = std::signbit(value) ? 1u << (f.bits() - 1) : 0;
  if (std::isnan(value)) return sign | f.infinity() | 1u << (f.mantissa_bits - 1);
  if (std::isinf(value)) return sign | f.infinity();
  if (value == 0) return sign;
  const int exponent = std::ilogb(value);
  const double fraction = std::ldexp(std::fabs(value), -exponent) - 1;
  return sign | static_cast<uint32_t>(exponent + f.bias()) << f.mantissa_bits |
         static_cast<uint32_t>(std::ldexp(fraction, f.mantissa_bits));
}

// Memory that ends where it ends.
class Bytes {
 public:
  explicit Bytes(int64_t size, int64_t offset = 0) : offset_(offset) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, static_cast<size_t>(std::max<int64_t>(size + offset, 1))) != 0)
      std::abort();
    block_ = static_cast<std::byte*>(block);
    std::memset(block_, 0, static_cast<size_t>(size + offset));
  }
  Bytes(Bytes&& other) noexcept : block_(std::exchange(other.block_, nullptr)), offset_(other.offset_) {}
  ~Bytes() { std::free(block_); }
  std::byte* data() const { return block_ + offset_; }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  void put(Dtype dtype, int64_t i, double value) const {
    const uint32_t bits = bits_of(format_of(dtype), value);
    std::memcpy(data() + i * size_of(dtype), &bits, static_cast<size_t>(size_of(dtype)));
  }

 private:
  std::byte* block_;
  int64_t offset_;
};

inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Dtype dtype_of(Operand operand) {
  return operand == Operand::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
}

inline int report() {
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
