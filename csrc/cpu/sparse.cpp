#include "../sparse.h"

#include <algorithm>
#include <bit>

namespace resmoe {
namespace {

// Writes the values of one word to its set columns and returns the place after the last value read. Jumping
// from bit to bit takes 7.5 ns a word at 8 bits of 32, a loop over its 32 columns without branches 24 ns (AMD
// EPYC, one thread).
template <typename T>
const T* scatter_word(uint32_t word, const T* values, T* dense) {
  for (; word != 0; word &= word - 1) dense[std::countr_zero(word)] = *values++;
  return values;
}

bool has_bits_past(const uint32_t* mask_row, int64_t width) {
  const int tail = static_cast<int>(width % 32);
  return tail != 0 && (mask_row[width / 32] >> tail) != 0;
}

int64_t words_of(int64_t width) { return width / 32 + (width % 32 != 0); }

}  // namespace

template <typename T>
SparseFault expand_sparse_block(const uint32_t* mask, const T* values, int64_t n, T* dense, int64_t width,
                                int64_t row_begin, int64_t row_end) {
  const int64_t words = words_of(width);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint32_t* mask_row = mask + row * words;
    if (has_bits_past(mask_row, width)) return {SparseRule::bits_below_width, row};
    T* dense_row = dense + row * width;
    std::fill_n(dense_row, width, T{0});
    for (int64_t w = 0; w < words; ++w) {
      const int bits = std::popcount(mask_row[w]);
      if (bits > n) return {SparseRule::bits_fit_word, row, bits};
      scatter_word(mask_row[w], values + (row * words + w) * n, dense_row + 32 * w);
    }
  }
  return {};
}

template <typename T, typename Offset>
SparseFault expand_sparse_bitmap(const uint32_t* mask, const T* values, int64_t nnz,
                                 const Offset* row_offsets, T* dense, int64_t width, int64_t row_begin,
                                 int64_t row_end) {
  const int64_t words = words_of(width);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint32_t* mask_row = mask + row * words;
    if (has_bits_past(mask_row, width)) return {SparseRule::bits_below_width, row};
    const int64_t begin = row_offsets[row];
    const int64_t end = row_offsets[row + 1];
    if (begin < 0 || begin > end || end > nnz) return {SparseRule::offsets_in_values, row};
    int64_t bits = 0;
    for (int64_t w = 0; w < words; ++w) bits += std::popcount(mask_row[w]);
    if (bits != end - begin) return {SparseRule::bits_fit_row, row, bits};

    T* dense_row = dense + row * width;
    std::fill_n(dense_row, width, T{0});
    const T* next = values + begin;
    for (int64_t w = 0; w < words; ++w) next = scatter_word(mask_row[w], next, dense_row + 32 * w);
  }
  return {};
}

#define RESMOE_INSTANTIATE(T)                                                                                \
  template SparseFault expand_sparse_block(const uint32_t*, const T*, int64_t, T*, int64_t, int64_t,         \
                                           int64_t);                                                         \
  template SparseFault expand_sparse_bitmap(const uint32_t*, const T*, int64_t, const int32_t*, T*, int64_t, \
                                            int64_t, int64_t);                                               \
  template SparseFault expand_sparse_bitmap(const uint32_t*, const T*, int64_t, const int64_t*, T*, int64_t, \
                                            int64_t, int64_t);
RESMOE_INSTANTIATE(uint16_t)
RESMOE_INSTANTIATE(uint32_t)
RESMOE_INSTANTIATE(uint64_t)
#undef RESMOE_INSTANTIATE

}  // namespace resmoe
