// The products of every table of kernels that this CPU runs, and of AMX emulated, against plain loops in
// double precision. Inputs and outputs are as long as kernels.h says and no longer, so that AddressSanitizer
// sees whoever reads past them.
#include <random>

#include "kernel_tables.h"

namespace {

constexpr int64_t kMaxRows = 70, kOutputs = resmoe::kPanelRows;
enum class Numbers { integers, special, any };

// x (70, K), a weight matrix (64, K), the same with most elements gone, and both products.
struct Problem {
  int64_t columns;
  std::vector<double> x, weights;
  std::vector<uint8_t> stored;

  Problem(int64_t columns_, Numbers numbers)
      : columns(columns_),
        x(static_cast<size_t>(kMaxRows * columns)),
        weights(static_cast<size_t>(kOutputs * columns)),
        stored(weights.size()) {
    std::mt19937 random(static_cast<unsigned>(columns));
    // Sums of up to 2082 products of these are integers below 2^24: every order of adding them is exact.
    std::uniform_int_distribution<int> small(-6, 6), density(0, 3), percent(0, 99);
    std::normal_distribution<double> normal;
    const auto draw = [&]() -> double {
      if (numbers != Numbers::any) return small(random);
      const double value = normal(random);  // cut to 8 bits and multiples of 2^-13, which every format has
      const int last = std::max(std::ilogb(value), -6) - 7;
      return std::ldexp(std::round(std::ldexp(value, -last)), last);
    };
    for (double& value : x) value = draw();
    for (double& value : weights) value = draw();
    for (int64_t k = 0; k < columns; ++k) {  // of full, empty and sparse words there are some each
      const int kept[] = {100, 0, 25, 10};
      for (int64_t tile = 0; tile < 4; ++tile) {
        const int of_100 = kept[density(random)];
        for (int64_t r = 16 * tile; r < 16 * tile + 16; ++r)
          stored[static_cast<size_t>(r * columns + k)] = percent(random) < of_100;
      }
    }
    if (numbers != Numbers::special) return;
    x[static_cast<size_t>(2 * columns + columns / 2)] = kNaN;
    x[static_cast<size_t>(5 * columns)] = kInfinity;
    x[static_cast<size_t>(20 * columns + columns - 1)] = -kInfinity;
    weights[static_cast<size_t>(3 * columns + columns - 1)] = kNaN;
    weights[static_cast<size_t>(17 * columns + columns / 3)] = kInfinity;
    weights[static_cast<size_t>(40 * columns)] = -kInfinity;
  }

  // x in bytes, every row filled up with zeros as kernels.h says.
  std::vector<std::byte> operands(Dtype dtype) const {
    const int64_t row_bytes = rounded_up(columns, resmoe::kOperandPad) * size_of(dtype);
    std::vector<std::byte> bytes(static_cast<size_t>(kMaxRows * row_bytes));
    for (int64_t i = 0; i < kMaxRows; ++i)
      for (int64_t k = 0; k < columns; ++k) {
        const uint32_t bits = bits_of(format_of(dtype), x[static_cast<size_t>(i * columns + k)]);
        std::memcpy(bytes.data() + i * row_bytes + k * size_of(dtype), &bits,
                    static_cast<size_t>(size_of(dtype)));
      }
    return bytes;
  }
  double weight(int64_t r, int64_t k, bool sparse) const {
    const auto at = static_cast<size_t>(r * columns + k);
    return sparse && stored[at] == 0 ? 0.0 : weights[at];
  }
  // The product (70, 64), or the sum of its terms' magnitudes.
  std::vector<double> product(bool sparse, bool magnitudes) const {
    std::vector<double> out(static_cast<size_t>(kMaxRows * kOutputs));
    for (int64_t i = 0; i < kMaxRows; ++i)
      for (int64_t r = 0; r < kOutputs; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const double term = x[static_cast<size_t>(i * columns + k)] * weight(r, k, sparse);
          sum += magnitudes ? std::fabs(term) : term;
        }
        out[static_cast<size_t>(i * kOutputs + r)] = sum;
      }
    return out;
  }
};

// The four tiles of a problem as packed.h lays them out, each in memory of its own. The slack behind weights
// is NaN, so that whoever multiplies it shows.
struct Packed {
  Panel panel;
  std::vector<Bytes> parts;

  Packed(const Problem& p, Dtype dtype, bool sparse) {
    panel = {p.columns, 4, {}, sparse ? 0 : resmoe::tile_bytes(p.columns, dtype)};
    const int64_t element = size_of(dtype), steps = resmoe::even(p.columns) / 2;
    for (int64_t tile = 0; tile < 4; ++tile) {
      std::vector<double> values;
      if (sparse) parts.emplace_back(4 * steps);
      auto* const masks = sparse ? reinterpret_cast<uint32_t*>(parts.back().data()) : nullptr;
      for (int64_t step = 0; step < steps; ++step)
        for (int bit = 0; bit < 32; ++bit) {
          const int64_t row = 16 * tile + (dtype == Dtype::bfloat16 ? bit / 2 : bit % 16);
          const int64_t k = 2 * step + (dtype == Dtype::bfloat16 ? bit % 2 : bit / 16);
          const bool is_there =
              k < p.columns && (!sparse || p.stored[static_cast<size_t>(row * p.columns + k)] != 0);
          if (is_there || !sparse) values.push_back(is_there ? p.weight(row, k, sparse) : 0.0);
          if (is_there && sparse) masks[step] |= 1u << bit;
        }
      panel.masks[tile] = masks;
      const auto count = static_cast<int64_t>(values.size());
      parts.emplace_back(count * element + resmoe::kSlack);
      std::memset(parts.back().data() + count * element, 0xff, resmoe::kSlack);
      for (int64_t i = 0; i < count; ++i) parts.back().put(dtype, i, values[static_cast<size_t>(i)]);
      panel.values[tile] = parts.back().data();
    }
  }
};

// m operand rows: one array, an array with a gap behind every row, or each row for itself and hardly aligned.
enum class Rows { packed, gaps, scattered };

struct OperandRows {
  std::vector<Bytes> parts;
  std::vector<const void*> rows;

  OperandRows(const Problem& p, Operand operand, int64_t m, Rows kind)
      : OperandRows(p.operands(dtype_of(operand)), size_of(dtype_of(operand)), m, kind) {}

  // Of kMaxRows rows of bytes, one behind the other.
  OperandRows(const std::vector<std::byte>& from, int64_t element, int64_t m, Rows kind) {
    const auto bytes = static_cast<int64_t>(from.size()) / kMaxRows;
    const int64_t stride = kind == Rows::gaps ? bytes + 64 : bytes;
    if (kind != Rows::scattered) parts.emplace_back((m - 1) * stride + bytes);
    for (int64_t i = 0; i < m; ++i) {
      if (kind == Rows::scattered) parts.emplace_back(bytes, element);
      std::byte* const row = kind == Rows::scattered ? parts.back().data() : parts[0].data() + i * stride;
      std::memcpy(row, from.data() + i * bytes, static_cast<size_t>(bytes));
      rows.push_back(row);
    }
  }
};

// m rows of `outputs` float32 that start at `begin`; rows are evenly spaced, or `same` of them share one.
struct Output {
  Bytes block;
  std::vector<float*> rows;
  Output(int64_t m, int64_t outputs, int64_t same, float begin) : block((m + same - 1) / same * outputs * 4) {
    for (int64_t i = 0; i < m; ++i) rows.push_back(block.floats() + i / same * outputs);
    std::fill_n(block.floats(), (m + same - 1) / same * outputs, begin);
  }
};

void products_are_exact(const Table& table, Numbers numbers, const std::vector<int64_t>& columns) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  for (const int64_t k : columns) {
    const Problem problem(k, numbers);
    const auto operands = problem.operands(dtype_of(kernels.operand));
    for (const bool sparse : {false, true}) {
      const auto expected = problem.product(sparse, false);
      const Packed packed(problem, kernels.weight, sparse);
      Packed next[2] = {{Problem(3, numbers), kernels.weight, sparse},
                        {Problem(1100, numbers), kernels.weight, !sparse}};
      next[0].panel.tiles = 1;
      const Panel* const nexts[] = {nullptr, &next[0].panel, nullptr, &next[1].panel};
      for (const int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 33, 70})
        for (const Rows kind : {Rows::packed, Rows::gaps, Rows::scattered}) {
          if (m == 0 && kind != Rows::scattered) continue;
          const OperandRows x(operands, size_of(dtype_of(kernels.operand)), m, kind);
          for (int64_t tiles = 1; tiles <= 4; ++tiles) {
            const int64_t outputs = 16 * tiles, same = kind == Rows::gaps ? 3 : 1;
            const Output out(m, outputs, same, 5.0f);
            Panel panel = packed.panel;
            panel.tiles = tiles;
            kernels.multiply(panel, x.rows.data(), out.rows.data(), m, nexts[tiles - 1], scratch.data());
            for (int64_t first = 0; first < m; first += same)
              for (int64_t r = 0; r < outputs; ++r) {
                double sum = 5;
                for (int64_t i = first; i < std::min(m, first + same); ++i)
                  sum += expected[static_cast<size_t>(i * kOutputs + r)];
                const double got = out.rows[static_cast<size_t>(first)][r];
                CHECK(
                    got == sum || (std::isnan(got) && std::isnan(sum)),
                    "%s: %s, %lld columns, m = %lld, %lld tiles, rows of x %d: out[%lld][%lld] is %g, not %g",
                    table.name.c_str(), sparse ? "sparse" : "dense", static_cast<long long>(k),
                    static_cast<long long>(m), static_cast<long long>(tiles), static_cast<int>(kind),
                    static_cast<long long>(first), static_cast<long long>(r), got, sum);
              }
          }
        }
    }
  }
}

// The error against the sum of the terms' magnitudes, where rounding errors of K steps grow like sqrt(K).
void sums_are_float32(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  double worst = 0;
  for (const int64_t k : {33, 100, 2082}) {
    const Problem problem(k, Numbers::any);
    for (const bool sparse : {false, true}) {
      const auto expected = problem.product(sparse, false), magnitude = problem.product(sparse, true);
      const Packed packed(problem, kernels.weight, sparse);
      for (const int64_t m : {1, 70}) {
        const OperandRows x(problem, kernels.operand, m, Rows::packed);
        const Output out(m, kOutputs, 1, 0.0f);
        kernels.multiply(packed.panel, x.rows.data(), out.rows.data(), m, nullptr, scratch.data());
        for (int64_t i = 0; i < m * kOutputs; ++i) {
          const auto at = static_cast<size_t>(i);
          const double error = std::fabs(out.block.floats()[i] - expected[at]);
          const double share = error / (magnitude[at] + 1e-30) / std::sqrt(static_cast<double>(k));
          if (!(share <= worst)) worst = share;  // NaN too
        }
      }
    }
  }
  CHECK(worst < 0x1p-24, "%s: %g", table.name.c_str(), worst);
}

// What other rows hold, be it NaN, and where rows lie changes no bit of a row.
void rows_do_not_mix(const Table& table) {
  const Kernels& kernels = *table.kernels;
  const Bytes scratch(kernels.multiply_scratch);
  const Problem problem(613, Numbers::any);
  Problem poisoned = problem;
  for (size_t i = 0; i < poisoned.x.size(); ++i)
    if (i / 613 % 2 == 1) poisoned.x[i] = kNaN;
  for (const bool sparse : {false, true})
    for (const int64_t m : {2, 7, 16, 40}) {
      const Packed packed(problem, kernels.weight, sparse);
      const Output plain(m, kOutputs, 1, 0.0f), other(m, kOutputs, 1, 0.0f);
      const OperandRows x(problem, kernels.operand, m, Rows::packed);
      const OperandRows y(poisoned, kernels.operand, m, Rows::scattered);
      kernels.multiply(packed.panel, x.rows.data(), plain.rows.data(), m, nullptr, scratch.data());
      kernels.multiply(packed.panel, y.rows.data(), other.rows.data(), m, nullptr, scratch.data());
      for (size_t i = 0; i < static_cast<size_t>(m); i += 2)
        CHECK(std::memcmp(plain.rows[i], other.rows[i], 4 * kOutputs) == 0, "%s: row %zu of %lld",
              table.name.c_str(), i, static_cast<long long>(m));
    }
}

// Where a table adds sparse panels to dense ones, every weight is the sum rounded to its type once: exact
// with integers up to 12, and within a rounding of each weight otherwise.
void bases_are_added(const Table& table) {
  const Kernels& kernels = *table.kernels;
  if (kernels.base_cost == 0) return;
  CHECK(kernels.weight == Dtype::bfloat16, "%s: how exact must its sums be?", table.name.c_str());
  const Bytes scratch(kernels.multiply_scratch);
  for (const Numbers numbers : {Numbers::integers, Numbers::any})
    for (const int64_t k : {1, 33, 100, 2082}) {
      const Problem problem(k, numbers);
      Problem under = problem;
      std::rotate(under.weights.begin(), under.weights.begin() + 1, under.weights.end());
      Packed packed(problem, kernels.weight, true);
      const Packed base(under, kernels.weight, false);
      for (int64_t tile = 0; tile < 4; ++tile) packed.panel.base[tile] = base.panel.values[tile];
      const auto stored = problem.product(true, false), below = under.product(false, false);
      const auto magnitude = problem.product(true, true), magnitude_below = under.product(false, true);
      const double rounding = numbers == Numbers::integers ? 0 : 0x1.01p-8;  // half a unit of a bfloat16
      for (const int64_t m : {1, 5, 7, 20}) {
        const OperandRows x(problem, kernels.operand, m, Rows::packed);
        const Output out(m, kOutputs, 1, 0.0f);
        kernels.multiply(packed.panel, x.rows.data(), out.rows.data(), m, nullptr, scratch.data());
        for (size_t i = 0; i < static_cast<size_t>(m * kOutputs); ++i) {
          const double error = std::fabs(double{out.block.floats()[i]} - stored[i] - below[i]);
          CHECK(error <= rounding * (magnitude[i] + magnitude_below[i]),
                "%s: error %g at %zu of %lld columns", table.name.c_str(), error, i,
                static_cast<long long>(k));
        }
      }
    }
}

}  // namespace

int main() {
  for (const Table& table : tables()) {
    products_are_exact(table, Numbers::integers, {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 2048 + 34});
    products_are_exact(table, Numbers::special, {7, 70});
    sums_are_float32(table);
    rows_do_not_mix(table);
    bases_are_added(table);
  }
  return report();
}
