// Expanding a sparse matrix into a dense one, on raw pointers.
//
// A matrix of `rows` rows and `width` columns stores a bit mask, W = ceil(width / 32) words a row; bit j of
// word w says whether column 32 w + j is stored. With s(r, c) the stored bits before column c of row r:
//
//     dense[r, c] = stored(r, c) ? values[first(r, c) + s(r, c)] : 0
//
// The two layouts differ in where the values of a row, or of a word, begin. In both they stand in ascending
// column order:
//
//     block    values (rows, W, n)   every word owns n places, of which it uses as many as it has bits
//     bitmap   values (nnz,)         row r owns values[row_offsets[r] : row_offsets[r + 1]]
//
// Values are moved, never computed with, so T stands for every type of its size: uint16_t for bfloat16 and
// float16, uint32_t for float32, uint64_t for float64.
#pragma once

#include <cstdint>

namespace resmoe {

enum class SparseRule {
  ok,
  bits_below_width,   // a bit stands for a column at or past `width`
  bits_fit_word,      // block: a word has more bits than its n places
  bits_fit_row,       // bitmap: a row's bits are not as many as its values
  offsets_in_values,  // bitmap: not 0 <= row_offsets[r] <= row_offsets[r + 1] <= nnz
};

// The first broken rule, its row, and the bits that were counted there (for the two bits_fit rules).
struct SparseFault {
  SparseRule rule = SparseRule::ok;
  int64_t row = 0;
  int64_t bits = 0;
};

// Both expand the rows [row_begin, row_end) of whole arrays, so that a caller can share rows out among
// threads, and stop at the first row that breaks a rule, before reading a value out of bounds. `dense` is
// (rows, width).

template <typename T>
SparseFault expand_sparse_block(const uint32_t* mask, const T* values, int64_t n, T* dense, int64_t width,
                                int64_t row_begin, int64_t row_end);

template <typename T, typename Offset>
SparseFault expand_sparse_bitmap(const uint32_t* mask, const T* values, int64_t nnz,
                                 const Offset* row_offsets, T* dense, int64_t width, int64_t row_begin,
                                 int64_t row_end);

}  // namespace resmoe
