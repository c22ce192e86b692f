// Packing against plain loops that read the block by the rules of packed.h, and back again bit by bit.
// Elements are random bits, so that NaNs, infinities, subnormals and -0.0 are among them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "packed.h"

using resmoe::Dtype;
using resmoe::Factored;
using resmoe::FactoredMatrix;
using resmoe::PackedHeader;
using resmoe::PackedMatrix;

namespace {

// Backwards and in small parts: nothing may depend on the order.
void backwards(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t end = count; end > 0; end -= std::min<int64_t>(3, end))
    body(std::max<int64_t>(end - 3, 0), end);
}

using Bytes = std::vector<unsigned char>;  // exactly as long as a tensor, for AddressSanitizer

struct MatrixTensors {
  Bytes base, rank_offsets, u, v, mask, row_offsets, values, bias;
};

enum class Sparse { none, block, bitmap32, bitmap64 };

struct Form {
  const char* name;
  bool base, low_rank;
  Sparse sparse;
  bool bias;
};

// A layer of random tensors, and the pointers to them.
struct Layer {
  Factored<const void> sizes;
  Bytes group;
  MatrixTensors gate_up, down;

  Layer(unsigned seed, const Form& form, Dtype dtype, int64_t hidden, int64_t intermediate, bool gated) {
    std::mt19937 random(seed);
    sizes.experts = 3;
    sizes.hidden = hidden;
    sizes.intermediate = intermediate;
    sizes.groups = form.base ? 2 : 0;
    sizes.dtype = dtype;
    sizes.gated = gated;
    if (form.base) put<int32_t>(group, {1, -1, 0});
    for (const bool is_down : {false, true}) {
      MatrixTensors& t = is_down ? down : gate_up;
      FactoredMatrix<const void>& f = is_down ? sizes.down : sizes.gate_up;
      const int64_t rows = sizes.rows(is_down), columns = sizes.columns(is_down), words = (columns + 31) / 32;
      if (form.base) t.base = bits(random, sizes.groups * rows * columns);
      if (form.low_rank) {
        const std::vector<int32_t> offsets = {0, 5, 5,
                                              is_down ? 22 : 24};  // an odd rank, none, more than a tile
        f.ranks = offsets.back();
        put<int32_t>(t.rank_offsets, offsets);
        t.u = bits(random, f.ranks * rows);
        t.v = bits(random, f.ranks * columns);
      }
      if (form.sparse != Sparse::none) {
        f.block_kept = form.sparse == Sparse::block ? 8 : 0;
        f.row_offset_size = form.sparse == Sparse::block ? 0 : form.sparse == Sparse::bitmap32 ? 4 : 8;
        sparse(random, t, f, rows, columns, words);
      }
      if (form.bias) t.bias = bits(random, sizes.experts * rows);
    }
    point();
  }

  void point() {
    sizes.group = group.empty() ? nullptr : group.data();
    for (const bool is_down : {false, true}) {
      const MatrixTensors& t = is_down ? down : gate_up;
      FactoredMatrix<const void>& f = is_down ? sizes.down : sizes.gate_up;
      const auto place = [](const Bytes& bytes) -> const void* {
        return bytes.empty() ? nullptr : bytes.data();
      };
      f.base = place(t.base), f.rank_offsets = place(t.rank_offsets), f.u = place(t.u), f.v = place(t.v);
      f.mask = place(t.mask), f.row_offsets = place(t.row_offsets), f.values = place(t.values);
      f.bias = place(t.bias);
    }
  }

  template <typename T>
  static void put(Bytes& bytes, const std::vector<T>& values) {
    bytes.resize(values.size() * sizeof(T));
    std::memcpy(bytes.data(), values.data(), bytes.size());
  }

  Bytes bits(std::mt19937& random, int64_t elements) const {
    Bytes bytes(static_cast<size_t>(elements * resmoe::size_of(sizes.dtype)));
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
    return bytes;
  }

  // Rows cycle through: about a quarter, none, all (bitmap); 8 of each word, all of a narrower one (block).
  void sparse(std::mt19937& random, MatrixTensors& t, FactoredMatrix<const void>& f, int64_t rows,
              int64_t columns, int64_t words) const {
    std::vector<uint32_t> mask;
    std::vector<int64_t> offsets = {0};
    for (int64_t row = 0; row < sizes.experts * rows; ++row) {
      for (int64_t word = 0; word < words; ++word) {
        const int64_t width = std::min<int64_t>(32, columns - 32 * word);
        std::vector<int> order(static_cast<size_t>(width));
        for (int i = 0; i < width; ++i) order[static_cast<size_t>(i)] = i;
        std::shuffle(order.begin(), order.end(), random);
        int64_t kept = std::min<int64_t>(8, width);
        if (f.block_kept == 0) kept = row % 3 == 1 ? 0 : row % 3 == 2 ? width : kept;
        uint32_t own = 0;
        for (int64_t i = 0; i < kept; ++i) own |= 1u << order[static_cast<size_t>(i)];
        mask.push_back(own);
        const Bytes values = bits(random, kept);
        t.values.insert(t.values.end(), values.begin(), values.end());
        if (f.block_kept != 0)
          t.values.resize(t.values.size() + static_cast<size_t>((8 - kept) * resmoe::size_of(sizes.dtype)),
                          0);
        f.nnz += kept;
      }
      offsets.push_back(f.nnz);
    }
    put(t.mask, mask);
    if (f.row_offset_size == 8) put(t.row_offsets, offsets);
    if (f.row_offset_size == 4) put(t.row_offsets, std::vector<int32_t>(offsets.begin(), offsets.end()));
  }
};

struct Free {
  void operator()(void* block) const { std::free(block); }
};
using Block = std::unique_ptr<unsigned char, Free>;

Block packed(const Layer& layer, int64_t& bytes) {
  bytes = resmoe::packed_bytes(layer.sizes);
  void* memory = nullptr;
  if (posix_memalign(&memory, resmoe::kAlignment, static_cast<size_t>(bytes)) != 0) std::abort();
  Block block(static_cast<unsigned char*>(memory));
  std::memset(memory, 0xa5, static_cast<size_t>(bytes));
  resmoe::pack(layer.sizes, memory, backwards);
  return block;
}

uint32_t element(const void* place, int64_t index, Dtype dtype) {
  uint32_t bits = 0;
  const auto size = static_cast<size_t>(resmoe::size_of(dtype));
  std::memcpy(&bits, static_cast<const unsigned char*>(place) + static_cast<size_t>(index) * size, size);
  return bits;
}

// Element (row, k) of tiles of `columns` columns, by the rule at the top of packed.h.
int64_t in_tiles(int64_t row, int64_t k, int64_t columns, Dtype dtype) {
  const int64_t tile = row / 16 * 16 * resmoe::even(columns);
  return dtype == Dtype::bfloat16 ? tile + ((k / 2) * 16 + row % 16) * 2 + k % 2 : tile + k * 16 + row % 16;
}

// The row of the tiles that holds a row of the matrix: the halves of a gated gate_up are padded each on its
// own.
int64_t padded_row(const PackedMatrix& m, int64_t row) {
  const int64_t half = m.rows / m.halves;
  return row / half * m.half_tiles * 16 + row % half;
}

void check_matrix(const char* name, const PackedHeader& header, const PackedMatrix& m,
                  const unsigned char* block, const FactoredMatrix<const void>& f) {
  const Dtype dtype = header.dtype;
  const auto* rank_offsets = static_cast<const int32_t*>(f.rank_offsets);
  const auto offset = [&](int64_t start, int64_t i) {
    int64_t value;
    std::memcpy(&value, block + start + 8 * i, 8);
    return value;
  };
  if (f.base != nullptr)
    for (int64_t g = 0; g < header.groups; ++g)
      for (int64_t row = 0; row < m.tiles() * 16; ++row)
        for (int64_t k = 0; k < resmoe::even(m.columns); ++k) {
          const int64_t own = row % (m.half_tiles * 16), half = m.rows / m.halves;
          const int64_t matrix_row = row / (m.half_tiles * 16) * half + own;
          const uint32_t expected = own < half && k < m.columns
                                        ? element(f.base, (g * m.rows + matrix_row) * m.columns + k, dtype)
                                        : 0;
          const int64_t start = m.base + g * m.tiles() * resmoe::tile_bytes(m.columns, dtype);
          CHECK(element(block + start, in_tiles(row, k, m.columns, dtype), dtype) == expected, "%s base",
                name);
        }
  for (int64_t e = 0; f.rank_offsets != nullptr && e < header.experts; ++e) {
    const int64_t first = rank_offsets[e], rank = rank_offsets[e + 1] - first;
    const unsigned char *v = block + m.v + offset(m.v_starts, e), *u = block + m.u + offset(m.u_starts, e);
    CHECK(offset(m.v_starts, e) % 64 == 0 && offset(m.u_starts, e) % 64 == 0, "%s starts", name);
    for (int64_t r = 0; r < resmoe::tiles_of(rank) * 16; ++r)
      for (int64_t k = 0; k < m.columns; ++k)
        CHECK(element(v, in_tiles(r, k, m.columns, dtype), dtype) ==
                  (r < rank ? element(f.v, (first + r) * m.columns + k, dtype) : 0),
              "%s v", name);
    for (int64_t row = 0; row < m.rows; ++row)
      for (int64_t r = 0; r < rank; ++r)
        CHECK(element(u, in_tiles(padded_row(m, row), r, rank, dtype), dtype) ==
                  element(f.u, (first + r) * m.rows + row, dtype),
              "%s u", name);
  }
  if (f.mask != nullptr) {
    int64_t read = 0;  // values, in the order in which the block must hold them
    std::vector<int64_t> next(static_cast<size_t>(header.experts * m.rows));
    const int64_t words = (m.columns + 31) / 32;
    const auto* mask = static_cast<const uint32_t*>(f.mask);
    int64_t before = 0;
    for (size_t row = 0; row < next.size(); ++row)
      for (int64_t w = 0; w < words; ++w) {
        if (w == 0) next[row] = before;
        before += std::popcount(mask[static_cast<int64_t>(row) * words + w]);
      }
    // The j-th stored value of the checkpoint: block layout has holes where a word is narrower than 8.
    std::vector<int64_t> place;
    for (int64_t word = 0; word < header.experts * m.rows * words; ++word)
      for (int j = 0; j < std::popcount(mask[word]); ++j)
        place.push_back(f.block_kept == 0 ? static_cast<int64_t>(place.size()) : word * f.block_kept + j);
    for (int64_t e = 0; e < header.experts; ++e)
      for (int64_t tile = 0; tile < m.tiles(); ++tile) {
        CHECK(offset(m.tile_starts, e * m.tiles() + tile) == read, "%s tile_starts", name);
        for (int64_t pair = 0; pair < resmoe::even(m.columns) / 2; ++pair) {
          uint32_t word;
          std::memcpy(
              &word, block + m.mask + 4 * ((e * m.tiles() + tile) * (resmoe::even(m.columns) / 2) + pair), 4);
          for (int64_t bit = 0; bit < 32; ++bit) {
            const int64_t in_tile = dtype == Dtype::bfloat16 ? bit / 2 : bit % 16;
            const int64_t k = 2 * pair + (dtype == Dtype::bfloat16 ? bit % 2 : bit / 16);
            const int64_t own = tile % m.half_tiles * 16 + in_tile, half = m.rows / m.halves;
            const int64_t row = e * m.rows + tile / m.half_tiles * half + own;
            const bool stored =
                own < half && k < m.columns && (mask[row * words + k / 32] >> (k % 32) & 1u) != 0;
            CHECK(((word >> bit & 1u) != 0) == stored, "%s mask", name);
            if (!stored) continue;
            const int64_t from = place[static_cast<size_t>(next[static_cast<size_t>(row)]++)];
            CHECK(element(block + m.values, read++, dtype) == element(f.values, from, dtype), "%s values",
                  name);
          }
        }
      }
    CHECK(offset(m.tile_starts, header.experts * m.tiles()) == read, "%s last tile_start", name);
  }
  for (int64_t i = 0; f.bias != nullptr && i < header.experts * m.rows; ++i) {
    float value;
    const int64_t row = i / m.rows * m.tiles() * 16 + padded_row(m, i % m.rows);
    std::memcpy(&value, block + m.bias + 4 * row, 4);
    const uint32_t bits = element(f.bias, i, dtype);
    double expected;
    if (dtype == Dtype::float16) {
      const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
      if (exponent == 31) continue;  // Inf and NaN: the way back tells
      expected = exponent == 0 ? mantissa * 0x1p-24
                               : (1024 + mantissa) * std::exp2(static_cast<double>(exponent) - 25);
      if ((bits & 0x8000u) != 0) expected = -expected;
    } else {
      expected = std::bit_cast<float>(dtype == Dtype::bfloat16 ? bits << 16 : bits);
    }
    CHECK(static_cast<double>(value) == expected || (expected != expected && value != value), "%s bias",
          name);
  }
}

const Form kForms[] = {
    {"base", true, false, Sparse::none, false},
    {"low rank", false, true, Sparse::none, false},
    {"block", false, false, Sparse::block, false},
    {"bitmap", true, false, Sparse::bitmap32, true},
    {"wide bitmap", false, true, Sparse::bitmap64, false},
    {"everything", true, true, Sparse::block, true},
};

void a_block_is_what_the_header_file_says() {
  unsigned seed = 0;
  for (const Form& form : kForms)
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (const auto& [hidden, intermediate] :
           {std::pair<int64_t, int64_t>{45, 37}, {1, 1}, {64, 32}, {31, 33}})
        for (const bool gated : {true, false}) {
          const Layer layer(++seed, form, dtype, hidden, intermediate, gated);
          int64_t bytes = 0;
          const Block block = packed(layer, bytes);
          const PackedHeader& header = resmoe::check_packed(block.get(), bytes);
          check_matrix("gate_up", header, header.gate_up, block.get(), layer.sizes.gate_up);
          check_matrix("down", header, header.down, block.get(), layer.sizes.down);
          int64_t again = 0;
          CHECK(std::memcmp(block.get(), packed(layer, again).get(), static_cast<size_t>(bytes)) == 0,
                "%s: two blocks of one layer differ", form.name);
        }
}

void a_block_gives_the_tensors_back() {
  unsigned seed = 1000;
  for (const Form& form : kForms)
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (const auto& [hidden, intermediate] :
           {std::pair<int64_t, int64_t>{45, 37}, {1, 1}, {64, 32}, {31, 33}})
        for (const bool gated : {true, false}) {
          Layer layer(++seed, form, dtype, hidden, intermediate, gated);
          int64_t bytes = 0;
          const Block block = packed(layer, bytes);
          const Factored<const void> sizes = resmoe::packed_sizes(block.get());
          CHECK(sizes.experts == 3 && sizes.hidden == hidden && sizes.intermediate == intermediate &&
                    sizes.groups == layer.sizes.groups && sizes.dtype == dtype && sizes.gated == gated,
                "%s: sizes", form.name);
          Layer back = layer;  // as large, other contents
          Factored<void> to;
          to.experts = 3, to.hidden = hidden, to.intermediate = intermediate, to.groups = sizes.groups;
          to.dtype = dtype, to.gated = gated;
          const auto fresh = [](Bytes& tensor) -> void* {
            std::fill(tensor.begin(), tensor.end(), static_cast<unsigned char>(0x5a));
            return tensor.data();
          };
          to.group = fresh(back.group);
          for (const bool down : {false, true}) {
            const FactoredMatrix<const void>& had = down ? layer.sizes.down : layer.sizes.gate_up;
            const FactoredMatrix<const void>& has = down ? sizes.down : sizes.gate_up;
            CHECK((had.mask == nullptr) == (has.mask == nullptr) &&
                      (had.bias == nullptr) == (has.bias == nullptr) &&
                      (had.rank_offsets == nullptr) == (has.rank_offsets == nullptr) &&
                      had.ranks == has.ranks && had.nnz == has.nnz && had.block_kept == has.block_kept &&
                      had.row_offset_size == has.row_offset_size,
                  "%s: parts", form.name);
            MatrixTensors& t = down ? back.down : back.gate_up;
            FactoredMatrix<void>& f = down ? to.down : to.gate_up;
            f.base = fresh(t.base), f.rank_offsets = fresh(t.rank_offsets), f.u = fresh(t.u),
            f.v = fresh(t.v);
            f.mask = fresh(t.mask), f.row_offsets = fresh(t.row_offsets), f.values = fresh(t.values);
            f.bias = fresh(t.bias);
            f.ranks = has.ranks, f.nnz = has.nnz, f.block_kept = has.block_kept;
            f.row_offset_size = has.row_offset_size;
          }
          resmoe::unpack(block.get(), to, backwards);
          CHECK(back.group == layer.group, "%s: group", form.name);
          for (const bool down : {false, true}) {
            const MatrixTensors &had = down ? layer.down : layer.gate_up,
                                &has = down ? back.down : back.gate_up;
            CHECK(had.base == has.base && had.u == has.u && had.v == has.v &&
                      had.rank_offsets == has.rank_offsets,
                  "%s: dense parts", form.name);
            CHECK(had.mask == has.mask && had.values == has.values && had.row_offsets == has.row_offsets,
                  "%s: sparse parts", form.name);
            CHECK(had.bias == has.bias, "%s: bias", form.name);
          }
        }
}

// At sizes of real models, where packed_bytes reads group and rank_offsets only: as large as the checkpoint,
// to 1 %. All of them keep a quarter.
void a_block_is_as_large_as_the_checkpoint_form() {
  struct Shape {
    const char* name;
    int64_t experts, hidden, intermediate, rank;
  };
  const Shape shapes[] = {{"Mixtral-8x7B", 8, 4096, 14336, 800},
                          {"OLMoE", 64, 2048, 1024, 176},
                          {"DeepSeek-V2-Lite", 64, 2048, 1408, 208},
                          {"Qwen3-30B-A3B", 128, 2048, 768, 144}};
  const int32_t not_read = 0;
  for (const Shape& shape : shapes)
    for (const auto& [low_rank, block_kept, bitmap] :
         {std::tuple{true, 0, false}, {false, 8, false}, {false, 0, true}, {true, 4, false}}) {
      const std::vector<int32_t> group(static_cast<size_t>(shape.experts), 0);
      std::vector<int32_t> rank_offsets(static_cast<size_t>(shape.experts) + 1);
      for (size_t e = 0; e < rank_offsets.size(); ++e)
        rank_offsets[e] = static_cast<int32_t>(e) * static_cast<int32_t>(shape.rank);
      Factored<const void> from;
      from.experts = shape.experts, from.hidden = shape.hidden, from.intermediate = shape.intermediate;
      from.groups = 1, from.group = group.data();
      int64_t checkpoint = shape.experts * 4;
      for (const bool down : {false, true}) {
        FactoredMatrix<const void>& f = down ? from.down : from.gate_up;
        const int64_t rows = from.rows(down), columns = from.columns(down), words = columns / 32;
        checkpoint += rows * columns * 2;
        if (low_rank) {
          f.rank_offsets = rank_offsets.data(), f.ranks = shape.experts * shape.rank;
          checkpoint += (shape.experts + 1) * 4 + f.ranks * (rows + columns) * 2;
        }
        if (block_kept != 0 || bitmap) {
          f.mask = &not_read, f.block_kept = block_kept;
          checkpoint += shape.experts * rows * words * 4;
        }
        if (block_kept != 0) checkpoint += shape.experts * rows * words * block_kept * 2;
        if (bitmap) {
          f.nnz = shape.experts * rows * columns / 4, f.row_offset_size = 4;
          checkpoint += f.nnz * 2 + (shape.experts * rows + 1) * 4;
        }
      }
      const double ratio = static_cast<double>(resmoe::packed_bytes(from)) / static_cast<double>(checkpoint);
      CHECK(ratio > 0.99 && ratio < 1.01, "%s: %.4f", shape.name, ratio);
    }
}

// What packing says about a layer that `damage` changed; "" if it packs.
template <typename Damage>
std::string refusal(const Form& form, const Damage& damage) {
  Layer layer(7, form, Dtype::bfloat16, 45, 37, true);
  damage(layer);
  layer.point();
  try {
    int64_t bytes = 0;
    packed(layer, bytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

template <typename T>
T& place(Bytes& bytes, size_t index) {
  return reinterpret_cast<T*>(bytes.data())[index];
}

void contents_that_would_lead_out_of_bounds_are_refused() {
  const Form &block = kForms[2], &bitmap = kForms[3], &everything = kForms[5];
  const auto expect = [](const std::string& got, const char* start) {
    CHECK(got.rfind(start, 0) == 0, "expected '%s', got '%s'", start, got.c_str());
  };
  expect(refusal(everything, [](Layer& l) { place<int32_t>(l.group, 2) = 2; }),
         "group: entries must be in [-1, 2), got 2 for expert 2");
  expect(refusal(everything, [](Layer& l) { place<int32_t>(l.group, 0) = -2; }),
         "group: entries must be in [-1, 2), got -2 for expert 0");
  for (const auto& [index, value] :
       {std::pair<size_t, int32_t>{0, 1}, {2, 4}, {1, 25}, {3, 23}, {3, INT32_MAX}})
    expect(refusal(everything, [&](Layer& l) { place<int32_t>(l.gate_up.rank_offsets, index) = value; }),
           "rank_offsets_gate_up: must rise from 0 to 24 without falling, got ");
  // 45 columns: bit 13 of the second word is past the last.
  expect(refusal(bitmap, [](Layer& l) { place<uint32_t>(l.gate_up.mask, 2 * 80 + 1) |= 1u << 13; }),
         "mask_gate_up: bits at columns >= 45 must be zero, got one at expert 1, row 6");
  expect(refusal(block, [](Layer& l) { place<uint32_t>(l.down.mask, 2 * 50) = 0x1ffu; }),
         "mask_down: block layout keeps exactly 8 of these 32 columns, got 9 at expert 1, row 5, word 0");
  expect(refusal(block, [](Layer& l) { place<uint32_t>(l.down.mask, 2 * 50 + 1) = 0xfu; }),
         "mask_down: block layout keeps exactly 5 of these 5 columns, got 4 at expert 1, row 5, word 1");
  expect(
      refusal(block, [](Layer& l) { place<uint16_t>(l.down.values, 8 * (2 * 50 + 1) + 5) = 0x8000u; }),
      "values_down: behind the 5 values of a word all must be zero, got another at expert 1, row 5, word 1");
  expect(
      refusal(bitmap, [](Layer& l) { place<uint32_t>(l.down.mask, 2 * 46) |= 1u; }),  // row 46 stores nothing
      "row_offsets_down: differences must equal the bits set in mask_down, row by row, got 0 and 1 at expert "
      "1, "
      "row 1");
  expect(refusal(bitmap, [](Layer& l) { place<int32_t>(l.down.row_offsets, 3) = INT32_MAX; }),
         "row_offsets_down: must rise from 0 to ");
  expect(refusal(bitmap, [](Layer& l) { place<int32_t>(l.down.row_offsets, 0) = -1; }),
         "row_offsets_down: must rise from 0 to ");
  expect(refusal(bitmap, [](Layer& l) { place<int32_t>(l.down.row_offsets, 5) = INT32_MIN; }),
         "row_offsets_down: must rise from 0 to ");
  expect(refusal(bitmap, [](Layer& l) { l.sizes.down.nnz += 1; }), "row_offsets_down: must rise from 0 to ");
}

void what_is_no_block_is_refused() {
  const Layer layer(9, kForms[5], Dtype::bfloat16, 45, 37, true);
  int64_t bytes = 0;
  const Block block = packed(layer, bytes);
  const auto expect = [](const void* place_, int64_t size, const char* start) {
    std::string got;
    try {
      resmoe::check_packed(place_, size);
    } catch (const std::invalid_argument& error) {
      got = error.what();
    }
    CHECK(got.rfind(start, 0) == 0, "expected '%s', got '%s'", start, got.c_str());
  };
  expect(block.get() + 8, bytes - 8, "packed: must begin at a multiple of 64 bytes, got one 8 bytes behind");
  expect(block.get() + 64, bytes - 64, "packed: must be a block that resmoe::pack returned, got ");
  expect(block.get(), 8, "packed: must be a block that resmoe::pack returned, got 8 bytes");
  expect(nullptr, 0, "packed: must be a block that resmoe::pack returned, got 0 bytes");
  expect(block.get(), bytes - 1, "packed: must be whole, ");
  PackedHeader& header = *reinterpret_cast<PackedHeader*>(block.get());
  header.version += 1;
  expect(block.get(), bytes, "packed: must have version 2, got 3");
}

}  // namespace

int main() {
  a_block_is_what_the_header_file_says();
  a_block_gives_the_tensors_back();
  a_block_is_as_large_as_the_checkpoint_form();
  contents_that_would_lead_out_of_bounds_are_refused();
  what_is_no_block_is_refused();
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
