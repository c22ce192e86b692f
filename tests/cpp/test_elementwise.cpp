// Activations and conversions of every table of kernels that this CPU runs.
#include "kernel_tables.h"

namespace {

// ---- activate

double activated(Activation activation, double z) {
  switch (activation) {
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::gelu:
      return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return z / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::relu:
      return z > 0 || std::isnan(z) ? z : 0;
    case Activation::relu2:
      return z > 0 || std::isnan(z) ? z * z : 0;
    default:
      return z;
  }
}

// What a float32 holds of a value.
double in_range(double value) {
  return std::fabs(value) > 3.4028235e38 ? std::copysign(kInfinity, value) : value;
}

bool is_close(double got, double value, double allowed) {
  if (std::isnan(value)) return std::isnan(got);
  return std::isinf(value) ? got == value : std::fabs(got - value) <= allowed;
}

// How far from `value` float32 arithmetic may be: some ulp, and those of an exponent that is itself a sum or
// a product. What is below the least normal number may be lost.
double allowed(Activation activation, double value, double z) {
  const double exponent = activation == Activation::gelu        ? z * z / 2
                          : activation == Activation::gelu_tanh ? 1.6 * std::fabs(z + 0.044715 * z * z * z)
                                                                : 0;
  return std::fabs(value) * (4e-7 + 2.4e-7 * std::min(exponent, 104.0)) + 1e-36;
}

void activations_are_close(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const bool is_bfloat16 = kernels.operand == Operand::bfloat16;
  const Dtype dtype = dtype_of(kernels.operand);
  std::vector<float> inputs = {0.0f,    -0.0f,  kNaN,  kInfinity, -kInfinity, 1e-30f,
                               -1e-30f, 1e-40f, 88.8f, -88.8f,    104.0f,     -104.0f,
                               1e10f,   -1e10f, 1e19f, -1e19f,    1e30f,      -1e30f};
  for (int i = -24000; i <= 24000; ++i) inputs.push_back(static_cast<float>(i) * 0.005f);
  inputs.resize(static_cast<size_t>(rounded_up(static_cast<int64_t>(inputs.size()), 16)));
  const auto n = static_cast<int64_t>(inputs.size());
  const float w[3] = {1.0f, -0.375f, 0.0f};

  for (const bool gated : {false, true})
    for (const bool with_sum : {false, true})
      for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                          Activation::relu, Activation::relu2, Activation::identity}) {
        const int64_t width = gated ? 2 * n : n, stride = width + 16;
        const Bytes z((2 * stride + width) * 4), sums(3 * n * 4), h(3 * n * size_of(dtype));
        std::vector<void*> h_rows;
        std::vector<float*> sum_rows;
        for (int64_t i = 0; i < 3; ++i) {
          for (int64_t c = 0; c < n; ++c) {
            z.floats()[i * stride + c] = inputs[static_cast<size_t>(c)];
            if (gated) z.floats()[i * stride + n + c] = 1.5f;
            sums.floats()[i * n + c] = 2.0f;
          }
          h_rows.push_back(h.data() + i * n * size_of(dtype));
          sum_rows.push_back(sums.floats() + i * n);
        }
        kernels.activate(activation, gated, z.floats(), stride, w, h_rows.data(),
                         with_sum ? sum_rows.data() : nullptr, 3, n);
        for (int64_t i = 0; i < 3 * n; ++i) {
          const double in = inputs[static_cast<size_t>(i % n)];
          const double f = in_range(in_range(activated(activation, in)) * (gated ? 1.5 : 1.0)),
                       value = f * w[i / n];
          uint32_t bits = 0;
          std::memcpy(&bits, h.data() + i * size_of(dtype), static_cast<size_t>(size_of(dtype)));
          const double got = value_of(format_of(dtype), bits), sum = sums.floats()[i];
          CHECK(is_close(got, value,
                         allowed(activation, value, in) + (is_bfloat16 ? std::fabs(value) * 0x1p-8 : 0)),
                "%s: activation %d of %g, gated %d, weight %g: %g, not %g", table.name.c_str(),
                static_cast<int>(activation), in, gated, static_cast<double>(w[i / n]), got, value);
          const double total = with_sum ? 2 + value : 2;
          CHECK(is_close(sum, total,
                         with_sum ? allowed(activation, value, in) + std::fabs(total) * 0x1p-23 : 0),
                "%s: sum of activation %d of %g, gated %d, weight %g: %g, not %g", table.name.c_str(),
                static_cast<int>(activation), in, gated, static_cast<double>(w[i / n]), sum, total);
        }
      }
}

// ---- conversions

void store_words(const Table& table, Dtype dtype, const std::vector<float>& from, std::vector<uint16_t>& to) {
  to.assign(from.size(), 0);
  table.kernels->store(dtype, from.data(), to.data(), static_cast<int64_t>(from.size()));
  if (dtype != Dtype::bfloat16 || table.kernels->operand != Operand::bfloat16) return;
  std::vector<uint16_t> operands(from.size());
  table.kernels->to_operand(from.data(), operands.data(), static_cast<int64_t>(from.size()));
  CHECK(operands == to, "%s: to_operand is not store", table.name.c_str());
}

// Every value, every midpoint between two and the float32 beside it, of both signs.
void roundings_are_to_nearest_even(const Table& table, Dtype dtype) {
  const Format format = format_of(dtype);
  std::vector<float> from;
  std::vector<uint16_t> expected, got;
  for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
    const double value = value_of(format, bits);
    const double ulp = std::ldexp(1.0, std::max(static_cast<int>(bits >> format.mantissa_bits), 1) -
                                           format.bias() - format.mantissa_bits);
    const auto middle = static_cast<float>(value + ulp / 2);
    for (const auto& [input, output] : {std::pair{static_cast<float>(value), bits},
                                        {std::nextafter(middle, 0.0f), bits},
                                        {middle, bits + bits % 2},
                                        {std::nextafter(middle, kInfinity), bits + 1}})
      for (const float sign : {1.0f, -1.0f}) {
        from.push_back(sign * input);
        expected.push_back(static_cast<uint16_t>(output | (sign < 0 ? 0x8000u : 0u)));
      }
  }
  for (const float past : {3e38f, kInfinity}) {
    from.insert(from.end(), {past, -past});
    const bool fits = dtype == Dtype::bfloat16 && past < kInfinity;
    const uint32_t bits = fits ? 0x7f62 : format.infinity();  // 3e38 in bfloat16
    expected.insert(expected.end(), {static_cast<uint16_t>(bits), static_cast<uint16_t>(bits | 0x8000)});
  }
  store_words(table, dtype, from, got);
  for (size_t i = 0; i < from.size(); ++i)
    CHECK(got[i] == expected[i], "%s: %a becomes %04x, not %04x", table.name.c_str(),
          static_cast<double>(from[i]), got[i], expected[i]);

  from.clear();
  for (const uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    from.emplace_back();
    std::memcpy(&from.back(), &bits, 4);
  }
  store_words(table, dtype, from, got);
  for (const uint16_t bits : got)
    CHECK(std::isnan(value_of(format, bits)), "%s: a NaN becomes %04x", table.name.c_str(), bits);
}

void values_are_widened_exactly(const Table& table, Dtype dtype) {
  std::vector<uint16_t> words(65536);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint16_t>(i);
  if (table.kernels->operand == Operand::bfloat16) {
    if (dtype != Dtype::bfloat16) return;  // never asked for
    std::vector<uint16_t> copied(words.size());
    table.kernels->load(dtype, words.data(), copied.data(), 65536);
    CHECK(copied == words, "%s: bfloat16 is not copied", table.name.c_str());
    return;
  }
  std::vector<float> floats(words.size());
  table.kernels->load(dtype, words.data(), floats.data(), 65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double value = value_of(format_of(dtype), bits), got = floats[bits];
    CHECK(
        (std::isnan(value) && std::isnan(got)) || (got == value && std::signbit(got) == std::signbit(value)),
        "%s: %04x becomes %g, not %g", table.name.c_str(), bits, got, value);
  }
}

void rows_of_any_length_are_converted(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Dtype operand = dtype_of(kernels.operand);
  for (const int64_t n : {0, 1, 15, 16, 17, 31, 33, 100}) {
    const Bytes floats(n * 4), operands(n * size_of(operand));
    for (int64_t i = 0; i < n; ++i) floats.put(Dtype::float32, i, static_cast<double>(i - 7));
    const auto check = [&](Dtype dtype, const Bytes& bytes, const char* what) {
      const Bytes expected(n * size_of(dtype));
      for (int64_t i = 0; i < n; ++i) expected.put(dtype, i, static_cast<double>(i - 7));
      CHECK(std::memcmp(bytes.data(), expected.data(), static_cast<size_t>(n * size_of(dtype))) == 0,
            "%s: %s, n = %lld", table.name.c_str(), what, static_cast<long long>(n));
    };
    kernels.to_operand(floats.floats(), operands.data(), n);
    check(operand, operands, "to_operand");
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
      const Bytes stored(n * size_of(dtype)), loaded(n * size_of(operand));
      kernels.store(dtype, floats.floats(), stored.data(), n);
      check(dtype, stored, "store");
      if (kernels.operand == Operand::bfloat16 && dtype != Dtype::bfloat16) continue;
      kernels.load(dtype, stored.data(), loaded.data(), n);
      check(operand, loaded, "load");
    }
  }
}

}  // namespace

int main() {
  for (const Table& table : tables()) {
    activations_are_close(table);
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
      roundings_are_to_nearest_even(table, dtype);
      values_are_widened_exactly(table, dtype);
    }
    rows_of_any_length_are_converted(table);
  }
  return report();
}
