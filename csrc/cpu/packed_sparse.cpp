// The sparse parts of a packed layer: a checkpoint's rows of words to tiles of pairs of columns, and back.
#include <bit>
#include <cstdlib>
#include <mutex>

#include "packed_parts.h"

namespace resmoe {
namespace {

enum class Rule { ok, bits_below_width, block_bits, block_padding, offsets_rise, bits_fit_row };

struct Fault {
  Rule rule = Rule::ok;
  int64_t expert = 0, row = 0, word = 0, got = 0, expected = 0;
};

int64_t row_offset(const FactoredMatrix<const void>& f, int64_t row) {
  return f.row_offset_size == 4 ? static_cast<const int32_t*>(f.row_offsets)[row]
                                : static_cast<const int64_t*>(f.row_offsets)[row];
}

// Counts the values of one row, given its first word; `row` counts over all experts.
template <typename T>
int64_t count_row(const PackedMatrix& m, const FactoredMatrix<const void>& f, int64_t row, Fault& fault) {
  const int64_t words = words_of(m.columns), last = m.columns - kWordColumns * (words - 1);
  const auto* mask = static_cast<const uint32_t*>(f.mask) + row * words;
  const auto found = [&](Rule rule, int64_t word, int64_t got, int64_t expected) {
    fault = {rule, row / m.rows, row % m.rows, word, got, expected};
    return int64_t{0};
  };
  if (last < kWordColumns && mask[words - 1] >> last != 0)
    return found(Rule::bits_below_width, words - 1, 0, 0);
  int64_t bits = 0;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t own = std::popcount(mask[w]);
    bits += own;
    if (f.block_kept == 0) continue;
    const int64_t expected = std::min(f.block_kept, w == words - 1 ? last : kWordColumns);
    if (own != expected) return found(Rule::block_bits, w, own, expected);
    const T* values = static_cast<const T*>(f.values) + (row * words + w) * f.block_kept;
    if (std::any_of(values + own, values + f.block_kept, [](T value) { return value != 0; }))
      return found(Rule::block_padding, w, 0, own);
  }
  if (f.block_kept == 0) {
    const int64_t begin = row_offset(f, row), end = row_offset(f, row + 1);
    if (begin < 0 || begin > end || end > f.nnz || (row == 0 && begin != 0))
      return found(Rule::offsets_rise, 0, begin, end);
    if (end - begin != bits) return found(Rule::bits_fit_row, 0, bits, end - begin);
  }
  return bits;
}

[[noreturn]] void report(const Fault& fault, const char* name, const PackedMatrix& m,
                         const FactoredMatrix<const void>& f) {
  std::ostringstream place;
  place << " at expert " << fault.expert << ", row " << fault.row;
  switch (fault.rule) {
    case Rule::ok:
      break;
    case Rule::bits_below_width:
      refuse("mask_", name, ": bits at columns >= ", m.columns, " must be zero, got one", place.str());
    case Rule::block_bits:
      refuse("mask_", name, ": block layout keeps exactly ", fault.expected, " of these ",
             std::min(kWordColumns, m.columns - kWordColumns * fault.word), " columns, got ", fault.got,
             place.str(), ", word ", fault.word);
    case Rule::block_padding:
      refuse("values_", name, ": behind the ", fault.expected,
             " values of a word all must be zero, got another", place.str(), ", word ", fault.word);
    case Rule::offsets_rise:
      refuse("row_offsets_", name, ": must rise from 0 to ", f.nnz, " without falling, got ", fault.got,
             " and ", fault.expected, place.str());
    case Rule::bits_fit_row:
      refuse("row_offsets_", name, ": differences must equal the bits set in mask_", name,
             ", row by row, got ", fault.expected, " and ", fault.got, place.str());
  }
  std::abort();  // the switch names every rule
}

// tile_starts: the values of each tile counted, the counts added up.
template <typename T>
void count_tiles(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                 const FactoredMatrix<const void>& f, const ParallelFor& parallel_for) {
  const int64_t tiles = header.experts * m.tiles();
  auto* starts = at<int64_t>(block, m.tile_starts);
  starts[0] = 0;
  Fault lowest;
  std::mutex guard;
  parallel_for(tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const TileRows own = rows_of(m, i % m.tiles());
      const int64_t first = i / m.tiles() * m.rows + own.first;
      starts[i + 1] = 0;
      for (int64_t row = first; row < first + own.count; ++row) {
        Fault fault;
        starts[i + 1] += count_row<T>(m, f, row, fault);
        if (fault.rule == Rule::ok) continue;
        const std::lock_guard<std::mutex> lock(guard);
        const auto place = [&](const Fault& x) { return x.expert * m.rows + x.row; };
        if (lowest.rule == Rule::ok || place(fault) < place(lowest)) lowest = fault;
        return;
      }
    }
  });
  if (lowest.rule != Rule::ok) report(lowest, name, m, f);
  for (int64_t i = 0; i < tiles; ++i) starts[i + 1] += starts[i];
  if (f.block_kept == 0 && starts[tiles] != f.nnz)
    refuse("row_offsets_", name, ": must rise from 0 to ", f.nnz, " without falling, got ", starts[tiles],
           " at place ", header.experts * m.rows);
}

// A tile's masks and values. A checkpoint's rows give their values in ascending column order, and so does the
// order of a tile for each of its rows: one pointer a row is enough.
template <typename T, bool pairs>
void pack_tile(const PackedMatrix& m, const FactoredMatrix<const void>& f, int64_t first, int64_t count,
               uint32_t* packed_mask, T* packed) {
  const int64_t words = words_of(m.columns);
  const auto* mask = static_cast<const uint32_t*>(f.mask) + first * words;
  const auto* values = static_cast<const T*>(f.values);
  const T* next[kTileRows] = {};
  if (f.block_kept == 0)
    for (int64_t r = 0; r < count; ++r) next[r] = values + row_offset(f, first + r);
  for (int64_t w = 0; w < words; ++w) {
    if (f.block_kept != 0)
      for (int64_t r = 0; r < count; ++r) next[r] = values + ((first + r) * words + w) * f.block_kept;
    for (int64_t k = kWordColumns * w; k < std::min(kWordColumns * (w + 1), m.columns); k += 2) {
      uint32_t word = 0;
      for (int64_t r = 0; r < count; ++r) {
        const uint32_t two = mask[r * words + w] >> (k % kWordColumns) & 3u;
        word |= pairs ? two << (2 * r) : (two & 1u) << r | (two >> 1) << (16 + r);
      }
      *packed_mask++ = word;
      for (; word != 0; word &= word - 1) {
        const int bit = std::countr_zero(word);
        *packed++ = *next[pairs ? bit / 2 : bit % 16]++;
      }
    }
  }
}

template <typename T, bool pairs>
void unpack_tile(const PackedMatrix& m, const FactoredMatrix<void>& f, int64_t first, int64_t count,
                 const uint32_t* packed_mask, const T* packed) {
  const int64_t words = words_of(m.columns);
  auto* mask = static_cast<uint32_t*>(f.mask) + first * words;
  auto* values = static_cast<T*>(f.values);
  T* next[kTileRows] = {};
  if (f.block_kept == 0)
    for (int64_t r = 0; r < count; ++r)
      next[r] = values + (f.row_offset_size == 4 ? static_cast<const int32_t*>(f.row_offsets)[first + r]
                                                 : static_cast<const int64_t*>(f.row_offsets)[first + r]);
  for (int64_t w = 0; w < words; ++w) {
    if (f.block_kept != 0)
      for (int64_t r = 0; r < count; ++r) {
        next[r] = values + ((first + r) * words + w) * f.block_kept;
        std::fill_n(next[r], f.block_kept, T{0});
      }
    for (int64_t r = 0; r < count; ++r) mask[r * words + w] = 0;
    for (int64_t k = kWordColumns * w; k < std::min(kWordColumns * (w + 1), m.columns); k += 2) {
      uint32_t word = *packed_mask++;
      for (int64_t r = 0; r < count; ++r) {
        const uint32_t two = pairs ? word >> (2 * r) & 3u : (word >> r & 1u) | (word >> (16 + r) & 1u) << 1;
        mask[r * words + w] |= two << (k % kWordColumns);
      }
      for (; word != 0; word &= word - 1) {
        const int bit = std::countr_zero(word);
        *next[pairs ? bit / 2 : bit % 16]++ = *packed++;
      }
    }
  }
}

// Calls tile(first row over all experts, rows, its masks, its values) for every tile.
template <typename T, typename Byte, typename Body>
void each_sparse_tile(const PackedHeader& header, const PackedMatrix& m, Byte* block,
                      const ParallelFor& parallel_for, const Body& body) {
  const auto* starts = at<int64_t>(block, m.tile_starts);
  parallel_for(header.experts * m.tiles(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const TileRows own = rows_of(m, i % m.tiles());
      body(i / m.tiles() * m.rows + own.first, own.count,
           at<uint32_t>(block, m.mask) + i * (even(m.columns) / 2), at<T>(block, m.values) + starts[i]);
    }
  });
}

template <typename T>
void pack_values(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                 const FactoredMatrix<const void>& f, const ParallelFor& parallel_for) {
  count_tiles<T>(header, m, name, block, f, parallel_for);
  each_sparse_tile<T>(
      header, m, block, parallel_for, [&](int64_t first, int64_t count, auto* mask, auto* values) {
        header.dtype == Dtype::bfloat16 ? pack_tile<T, true>(m, f, first, count, mask, values)
                                        : pack_tile<T, false>(m, f, first, count, mask, values);
      });
}

// The values of one row of a tile.
int64_t count_packed_row(const PackedMatrix& m, const uint32_t* mask, int64_t row, bool pairs) {
  const uint32_t own = pairs ? 3u << (2 * row) : 0x10001u << row;
  int64_t bits = 0;
  for (int64_t i = 0; i < even(m.columns) / 2; ++i) bits += std::popcount(mask[i] & own);
  return bits;
}

template <typename T>
void unpack_values(const PackedHeader& header, const PackedMatrix& m, const std::byte* block,
                   const FactoredMatrix<void>& f, const ParallelFor& parallel_for) {
  const bool pairs = header.dtype == Dtype::bfloat16;
  const auto make_offsets = [&](auto* offsets) {
    offsets[0] = 0;
    each_sparse_tile<T>(header, m, block, parallel_for, [&](int64_t first, int64_t count, auto* mask, auto*) {
      for (int64_t r = 0; r < count; ++r)
        offsets[first + r + 1] =
            static_cast<std::remove_pointer_t<decltype(offsets)>>(count_packed_row(m, mask, r, pairs));
    });
    for (int64_t row = 0; row < header.experts * m.rows; ++row) offsets[row + 1] += offsets[row];
  };
  if (f.block_kept == 0) {
    if (f.row_offset_size == 4)
      make_offsets(static_cast<int32_t*>(f.row_offsets));
    else
      make_offsets(static_cast<int64_t*>(f.row_offsets));
  }
  each_sparse_tile<T>(header, m, block, parallel_for,
                      [&](int64_t first, int64_t count, auto* mask, auto* values) {
                        pairs ? unpack_tile<T, true>(m, f, first, count, mask, values)
                              : unpack_tile<T, false>(m, f, first, count, mask, values);
                      });
}

}  // namespace

void pack_sparse(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                 const FactoredMatrix<const void>& f, const ParallelFor& parallel_for) {
  if (m.mask == 0) return;
  header.dtype == Dtype::float32 ? pack_values<uint32_t>(header, m, name, block, f, parallel_for)
                                 : pack_values<uint16_t>(header, m, name, block, f, parallel_for);
}

void unpack_sparse(const PackedHeader& header, const PackedMatrix& m, const std::byte* block,
                   const FactoredMatrix<void>& f, const ParallelFor& parallel_for) {
  if (m.mask == 0) return;
  header.dtype == Dtype::float32 ? unpack_values<uint32_t>(header, m, block, f, parallel_for)
                                 : unpack_values<uint16_t>(header, m, block, f, parallel_for);
}

}  // namespace resmoe
