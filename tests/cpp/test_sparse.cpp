// Both layouts against three plain loops (row, word, bit), on random masks with fixed seeds.
#include "check.h"
#include "sparse.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <tuple>
#include <vector>

using resmoe::SparseFault;
using resmoe::SparseRule;

namespace {

// One random matrix in both layouts, and dense as the loops below say it must come out.
// Vectors are exactly as long as the format says, so that AddressSanitizer sees a read past their end.
template <typename T>
struct Case {
  int64_t rows, width, words, n = 0;
  std::vector<uint32_t> mask;
  std::vector<T> block, bitmap, dense;
  std::vector<int64_t> offsets;

  // Rows cycle through: as dense as asked, empty, full. `skipped` values stand before those of row 0.
  Case(unsigned seed, int64_t rows_, int64_t width_, double density, int64_t skipped = 0)
      : rows(rows_), width(width_), words((width_ + 31) / 32), mask(static_cast<size_t>(rows * words)) {
    std::mt19937 random(seed);
    std::bernoulli_distribution stored(density);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < width; ++column)
        if (row % 3 == 2 || (row % 3 == 0 && stored(random)))
          mask[static_cast<size_t>(row * words + column / 32)] |= uint32_t{1} << (column % 32);

    std::vector<std::vector<T>> by_word;
    T value = 1;  // distinct values, up to the size of T: a value in the wrong place is seen
    bitmap.assign(static_cast<size_t>(skipped), T{99});
    for (int64_t row = 0; row < rows; ++row) {
      offsets.push_back(static_cast<int64_t>(bitmap.size()));
      for (int64_t word = 0; word < words; ++word) {
        by_word.emplace_back();
        for (int64_t bit = 0; bit < 32 && 32 * word + bit < width; ++bit) {
          const bool is_stored = (mask[static_cast<size_t>(row * words + word)] >> bit) & 1u;
          dense.push_back(is_stored ? value : T{0});
          if (!is_stored) continue;
          by_word.back().push_back(value);
          bitmap.push_back(value++);
        }
      }
    }
    offsets.push_back(static_cast<int64_t>(bitmap.size()));

    for (const auto& values : by_word) n = std::max(n, static_cast<int64_t>(values.size()));
    for (auto& values : by_word) {
      values.resize(static_cast<size_t>(n), T{0});
      block.insert(block.end(), values.begin(), values.end());
    }
  }

  std::vector<int32_t> narrow_offsets() const {
    std::vector<int32_t> narrow;
    for (const int64_t offset : offsets) narrow.push_back(static_cast<int32_t>(offset));
    return narrow;
  }

  std::vector<T> blank() const { return std::vector<T>(dense.size(), T{77}); }
  int64_t nnz() const { return static_cast<int64_t>(bitmap.size()); }

  SparseFault expand_block(std::vector<T>& out, int64_t begin, int64_t end) const {
    return resmoe::expand_sparse_block(mask.data(), block.data(), n, out.data(), width, begin, end);
  }
  SparseFault expand_bitmap(std::vector<T>& out, int64_t begin, int64_t end) const {
    return resmoe::expand_sparse_bitmap(mask.data(), bitmap.data(), nnz(), offsets.data(), out.data(), width,
                                        begin, end);
  }
};

template <typename T>
void values_go_to_their_columns() {
  unsigned seed = 0;
  for (const int64_t rows : {0, 1, 3, 10})
    for (const int64_t width : {0, 1, 31, 32, 33, 64, 95, 200})
      for (const double density : {0.0, 0.25, 0.9}) {
        ++seed;
        const Case<T> c(seed, rows, width, density, seed % 2 == 0 ? 0 : 5);
        auto out = c.blank();
        CHECK(c.expand_block(out, 0, rows).rule == SparseRule::ok, "seed %u", seed);
        CHECK(out == c.dense, "block, %zu bytes, seed %u", sizeof(T), seed);
        out = c.blank();
        CHECK(c.expand_bitmap(out, 0, rows).rule == SparseRule::ok, "seed %u", seed);
        CHECK(out == c.dense, "bitmap, %zu bytes, seed %u", sizeof(T), seed);
        out = c.blank();
        const auto narrow = c.narrow_offsets();
        CHECK(resmoe::expand_sparse_bitmap(c.mask.data(), c.bitmap.data(), c.nnz(), narrow.data(), out.data(),
                                           width, 0, rows)
                      .rule == SparseRule::ok,
              "seed %u", seed);
        CHECK(out == c.dense, "bitmap with int32 offsets, %zu bytes, seed %u", sizeof(T), seed);
      }
}

template <typename T>
void a_range_of_rows_writes_only_those() {
  const Case<T> c(7, 9, 70, 0.4);
  for (const bool block : {true, false}) {
    auto out = c.blank();
    const auto expand = [&](int64_t begin, int64_t end) {
      return block ? c.expand_block(out, begin, end) : c.expand_bitmap(out, begin, end);
    };
    CHECK(expand(4, 6).rule == SparseRule::ok, "block %d", block);
    for (int64_t i = 0; i < 9 * 70; ++i) {
      const auto at = static_cast<size_t>(i);
      const bool inside = i >= 4 * 70 && i < 6 * 70;
      CHECK(out[at] == (inside ? c.dense[at] : T{77}), "block %d, element %d", block, static_cast<int>(i));
    }
    CHECK(expand(0, 4).rule == SparseRule::ok && expand(6, 9).rule == SparseRule::ok, "block %d", block);
    CHECK(out == c.dense, "block %d", block);
  }
}

void broken_rules_are_found_before_anything_is_read() {
  Case<uint16_t> c(11, 6, 40, 0.5);
  auto out = c.blank();

  Case<uint16_t> past = c;  // column 41 of row 4
  past.mask[4 * 2 + 1] |= 1u << 9;
  for (const SparseFault fault : {past.expand_block(out, 0, 6), past.expand_bitmap(out, 0, 6)})
    CHECK(fault.rule == SparseRule::bits_below_width && fault.row == 4, "row %d",
          static_cast<int>(fault.row));

  // A full word where there is room for 31 values: reading the 32nd would run past the end of the vector.
  std::vector<uint16_t> short_block(31);
  const std::vector<uint32_t> full_word = {0xffffffffu};
  std::vector<uint16_t> row(32);
  SparseFault fault =
      resmoe::expand_sparse_block(full_word.data(), short_block.data(), 31, row.data(), 32, 0, 1);
  CHECK(fault.rule == SparseRule::bits_fit_word && fault.row == 0 && fault.bits == 32, "bits %d",
        static_cast<int>(fault.bits));

  Case<uint16_t> many = c;  // row 1 is empty and gets a bit
  many.mask[1 * 2] |= 1u;
  fault = many.expand_bitmap(out, 0, 6);
  CHECK(fault.rule == SparseRule::bits_fit_row && fault.row == 1 && fault.bits == 1, "row %d",
        static_cast<int>(fault.row));

  Case<uint16_t> few = c;  // row 2 is full and loses one
  few.mask[2 * 2] &= ~1u;
  fault = few.expand_bitmap(out, 0, 6);
  CHECK(fault.rule == SparseRule::bits_fit_row && fault.row == 2 && fault.bits == 39, "bits %d",
        static_cast<int>(fault.bits));

  for (const auto& [place, offset, row_found] : {std::tuple<size_t, int64_t, int64_t>{0, -1, 0},
                                                 {3, 0, 2},
                                                 {6, c.nnz() + 1, 5},
                                                 {6, INT64_MAX, 5},
                                                 {5, INT64_MIN, 4}}) {
    Case<uint16_t> wrong = c;
    wrong.offsets[place] = offset;
    fault = wrong.expand_bitmap(out, 0, 6);
    CHECK(fault.rule == SparseRule::offsets_in_values && fault.row == row_found, "offset %lld at %zu: row %d",
          static_cast<long long>(offset), place, static_cast<int>(fault.row));
  }
}

}  // namespace

int main() {
  values_go_to_their_columns<uint16_t>();
  values_go_to_their_columns<uint32_t>();
  values_go_to_their_columns<uint64_t>();
  a_range_of_rows_writes_only_those<uint16_t>();
  a_range_of_rows_writes_only_those<uint64_t>();
  broken_rules_are_found_before_anything_is_read();
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
