// The products of coded tiles (payload.h) by every table of kernels that this CPU runs, and by AMX emulated,
// against plain loops in double precision. Inputs end where kernels.h says they do, for AddressSanitizer.
#include <random>

#include "kernel_tables.h"

using resmoe::Payload;

namespace {

constexpr int64_t kMaxRows = 70, kOutputs = resmoe::kPanelRows;

// x (70, K) and coded weights (64, K). `exact`: integers and scales that are powers of two or 0, so that every
// order of adding is exact: terms are multiples of 1/4, their sums below 2^22.
struct Problem {
  int64_t columns, groups;
  Payload payload;
  std::vector<double> x, scales;
  std::vector<int> codes;

  Problem(int64_t columns_, Payload payload_, bool exact)
      : columns(columns_),
        groups(resmoe::groups_of(columns_, payload_)),
        payload(payload_),
        x(static_cast<size_t>(kMaxRows * columns)),
        scales(static_cast<size_t>(kOutputs * groups)),
        codes(static_cast<size_t>(kOutputs * columns)) {
    std::mt19937 random(static_cast<unsigned>(columns * 131 + payload.bits * 7 + payload.group));
    std::uniform_int_distribution<int> small(-6, 6), code(0, (1 << payload.bits) - 1), power(-2, 1);
    std::normal_distribution<double> normal;
    const auto bfloat16 = [](double value) {
      const int last = value == 0 ? 0 : std::ilogb(value) - 7;
      return std::ldexp(std::round(std::ldexp(value, -last)), last);
    };
    for (double& value : x) value = exact ? small(random) : bfloat16(normal(random));
    for (double& scale : scales) {
      const int p = power(random);
      scale = !exact ? bfloat16(std::fabs(normal(random))) : p == -2 ? 0 : std::ldexp(1.0, p);
    }
    for (int& c : codes) c = code(random);
  }

  double weight(int64_t r, int64_t k) const {
    const double scale = groups == 0 ? 1 : scales[static_cast<size_t>(r * groups + k / payload.group)];
    return scale * (codes[static_cast<size_t>(r * columns + k)] - ((1 << payload.bits) - 1) / 2.0);
  }
  std::vector<double> product(bool magnitudes) const {
    std::vector<double> out(static_cast<size_t>(kMaxRows * kOutputs));
    for (int64_t i = 0; i < kMaxRows; ++i)
      for (int64_t r = 0; r < kOutputs; ++r)
        for (int64_t k = 0; k < columns; ++k) {
          const double term = x[static_cast<size_t>(i * columns + k)] * weight(r, k);
          out[static_cast<size_t>(i * kOutputs + r)] += magnitudes ? std::fabs(term) : term;
        }
    return out;
  }
};

// Its four tiles by the rules of packed.h and payload.h, each in memory of its own that ends with it.
struct Packed {
  Panel panel;
  std::vector<Bytes> parts;

  explicit Packed(const Problem& p) {
    const Payload payload = p.payload;
    const int64_t bits = payload.bits, scales = (p.groups * 32 + 63) / 64 * 64, units = (p.columns + 31) / 32;
    panel = {p.columns, 4, payload, scales + units * 64 * bits};
    for (int64_t tile = 0; tile < 4; ++tile) {
      parts.emplace_back(panel.tile_bytes);
      std::byte* const at = parts.back().data();
      panel.values[tile] = at;
      for (int64_t g = 0; g < p.groups; ++g)
        for (int64_t r = 0; r < 16; ++r) {
          const double scale = p.scales[static_cast<size_t>((16 * tile + r) * p.groups + g)];
          const uint32_t word = bits_of(format_of(Dtype::bfloat16), scale);
          std::memcpy(at + (g * 16 + r) * 2, &word, 2);
        }
      const auto set = [&](std::byte* words, int64_t element, int value) {
        uint16_t word;
        std::memcpy(&word, words + 2 * element, 2);
        word = static_cast<uint16_t>(word | value);
        std::memcpy(words + 2 * element, &word, 2);
      };
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t k = 0; k < p.columns; ++k) {
          const int c = p.codes[static_cast<size_t>((16 * tile + r) * p.columns + k)];
          std::byte* const unit = at + scales + k / 32 * 64 * bits;
          const int64_t line = k % 32 / 2, element = 2 * r + k % 2, a_word = 16 / bits;
          if (bits == 3 && line == 15) {
            for (int b = 0; b < 3; ++b) set(unit + 64 * b, element, (c >> b & 1) << 15);
          } else {
            set(unit + line / a_word * 64, element, c << bits * (line % a_word));
          }
        }
    }
  }
};

// m operand rows, each in memory of its own, filled up with zeros as kernels.h says.
struct Operands {
  std::vector<Bytes> parts;
  std::vector<const void*> rows;

  Operands(const Problem& p, Operand operand, int64_t m, int64_t poisoned = -1) {
    const Dtype dtype = dtype_of(operand);
    for (int64_t i = 0; i < m; ++i) {
      parts.emplace_back(rounded_up(p.columns, resmoe::kOperandPad) * size_of(dtype), size_of(dtype));
      for (int64_t k = 0; k < p.columns; ++k)
        parts.back().put(dtype, k, i == poisoned ? kNaN : p.x[static_cast<size_t>(i * p.columns + k)]);
      rows.push_back(parts.back().data());
    }
  }
};

struct Output {
  Bytes block;
  std::vector<float*> rows;
  Output(int64_t m, int64_t outputs, float begin) : block(m * outputs * 4) {
    for (int64_t i = 0; i < m; ++i) rows.push_back(block.floats() + i * outputs);
    std::fill_n(block.floats(), m * outputs, begin);
  }
};

constexpr Payload kPayloads[] = {{8, 32}, {4, 32}, {3, 32}, {2, 32}, {8, 0},  {4, 0},   {3, 0},  {2, 0},
                                 {8, 64}, {4, 64}, {3, 64}, {2, 64}, {8, 128}, {4, 128}, {3, 128}, {2, 128}};

void products_are_exact(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  for (const Payload payload : kPayloads)
    for (const int64_t k : {1, 2, 33, 64, 100, 300}) {
      const Problem problem(k, payload, true);
      const Packed packed(problem), next(Problem(40, payload, true));
      const auto expected = problem.product(false);
      for (const int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 13, 33, 70}) {
        const int64_t tiles = 1 + (m + k) % 4;
        const Operands x(problem, kernels.operand, m);
        const Output out(m, 16 * tiles, 5.0f);
        Panel panel = packed.panel;
        panel.tiles = tiles;
        kernels.multiply(panel, x.rows.data(), out.rows.data(), m, m % 2 == 0 ? nullptr : &next.panel,
                         scratch.data());
        for (int64_t i = 0; i < m; ++i)
          for (int64_t r = 0; r < 16 * tiles; ++r) {
            const double want = 5 + expected[static_cast<size_t>(i * kOutputs + r)];
            CHECK(out.rows[static_cast<size_t>(i)][r] == want,
                  "%s: %d bits, groups of %d, %lld columns, m = %lld, %lld tiles: out[%lld][%lld] is %g, not %g",
                  table.name.c_str(), payload.bits, payload.group, static_cast<long long>(k),
                  static_cast<long long>(m), static_cast<long long>(tiles), static_cast<long long>(i),
                  static_cast<long long>(r), double{out.rows[static_cast<size_t>(i)][r]}, want);
          }
      }
    }
}

// No weight is rounded: the error is that of float32 sums, whose steps grow like sqrt(K), and of one product a
// group with its scale. But AMX multiplies operands with the scales in them, rounded once, where there are scales.
void sums_are_float32(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  for (const Payload payload : kPayloads)
    for (const int64_t k : {100, 700}) {
      const Problem problem(k, payload, false);
      const Packed packed(problem);
      const auto expected = problem.product(false), magnitude = problem.product(true);
      for (const int64_t m : {1, 4, 70}) {
        const Operands x(problem, kernels.operand, m);
        const Output out(m, kOutputs, 0.0f);
        kernels.multiply(packed.panel, x.rows.data(), out.rows.data(), m, nullptr, scratch.data());
        double worst = 0;
        for (size_t i = 0; i < static_cast<size_t>(m * kOutputs); ++i) {
          const double share = std::fabs(double{out.block.floats()[i]} - expected[i]) / (magnitude[i] + 1e-30) /
                               std::sqrt(static_cast<double>(k));
          if (!(share <= worst)) worst = share;  // NaN too
        }
        const bool is_rounded = table.name.find("amx") != std::string::npos && payload.group != 0 &&
                                kernels.operand == Operand::bfloat16 && m >= 4;
        CHECK(worst < (is_rounded ? 0x1.01p-9 / std::sqrt(static_cast<double>(k)) : 0x1p-24), "%s: %d bits, groups of %d, %lld columns, m = %lld: %g", table.name.c_str(),
              payload.bits, payload.group, static_cast<long long>(k), static_cast<long long>(m), worst);
      }
    }
}

// A NaN in one row stays in it, and changes no bit of the others.
void rows_do_not_mix(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  for (const Payload payload : {Payload{4, 64}, Payload{3, 0}})
    for (const int64_t m : {2, 7, 40}) {
      const Problem problem(300, payload, false);
      const Packed packed(problem);
      const Operands x(problem, kernels.operand, m), y(problem, kernels.operand, m, 1);
      const Output plain(m, kOutputs, 0.0f), other(m, kOutputs, 0.0f);
      kernels.multiply(packed.panel, x.rows.data(), plain.rows.data(), m, nullptr, scratch.data());
      kernels.multiply(packed.panel, y.rows.data(), other.rows.data(), m, nullptr, scratch.data());
      for (size_t i = 0; i < static_cast<size_t>(m); ++i) {
        if (i == 1)
          CHECK(std::isnan(other.rows[i][0]) && std::isnan(other.rows[i][63]), "%s: NaN is lost", table.name.c_str());
        else
          CHECK(std::memcmp(plain.rows[i], other.rows[i], 4 * kOutputs) == 0, "%s: row %zu of %lld",
                table.name.c_str(), i, static_cast<long long>(m));
      }
    }
}

}  // namespace

int main() {
  for (const Table& table : tables()) {
    products_are_exact(table);
    sums_are_float32(table);
    rows_do_not_mix(table);
  }
  return report();
}
