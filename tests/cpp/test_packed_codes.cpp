// Packing coded tensors against plain loops that read the block by the rules of packed.h and payload.h, and back
// again bit by bit. Codes are stored here by the rules of resmoe_kernels/payload.py, element by element.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "packed.h"

using resmoe::Dtype;
using resmoe::Factored;
using resmoe::FactoredMatrix;
using resmoe::PackedHeader;
using resmoe::PackedMatrix;
using resmoe::Payload;

namespace {

void backwards(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t end = count; end > 0; end -= std::min<int64_t>(3, end))
    body(std::max<int64_t>(end - 3, 0), end);
}

using Bytes = std::vector<unsigned char>;  // exactly as long as a tensor, for AddressSanitizer

// Codes of `rows` rows, and their scales.
struct Coded {
  Payload payload;
  int64_t rows = 0, columns = 0, row_bytes = 0, scales_a_row = 0;
  Bytes codes;
  std::vector<uint16_t> scales;

  Coded() = default;
  Coded(std::mt19937& random, Payload payload_, int64_t rows_, int64_t columns_)
      : payload(payload_), rows(rows_), columns(columns_) {
    const int64_t whole = payload.group == 0 ? 32 : payload.group;
    row_bytes = (columns + whole - 1) / whole * whole * payload.bits / 8;
    scales_a_row = payload.group == 0 ? 1 : (columns + whole - 1) / whole;
    codes.resize(static_cast<size_t>(rows * row_bytes));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < columns; ++k) set(row, k, static_cast<int>(random() % (1u << payload.bits)));
    for (int64_t i = 0; i < rows * scales_a_row; ++i)
      scales.push_back(static_cast<uint16_t>(random() % 0x7f80));  // every finite one that is not negative
  }
  // The bits of element k in its row, lowest first.
  std::vector<int64_t> places(int64_t k) const {
    std::vector<int64_t> places;
    const int64_t unit = k / 32 * 32 * payload.bits, i = k % 32;
    if (payload.bits == 3) return {unit + 2 * i, unit + 2 * i + 1, unit + 64 + i};
    for (int64_t b = 0; b < payload.bits; ++b) places.push_back(unit + payload.bits * i + b);
    return places;
  }
  void set(int64_t row, int64_t k, int code) {
    int b = 0;
    for (const int64_t place : places(k)) {
      unsigned char& byte = codes[static_cast<size_t>(row * row_bytes + place / 8)];
      const int bit = 1 << place % 8;
      byte = static_cast<unsigned char>((byte & ~bit) | ((code >> b++ & 1) != 0 ? bit : 0));
    }
  }
  int get(int64_t row, int64_t k) const {
    int code = 0, b = 0;
    for (const int64_t place : places(k))
      code |= (codes[static_cast<size_t>(row * row_bytes + place / 8)] >> place % 8 & 1) << b++;
    return code;
  }
};

struct Form {
  const char* name;
  Payload base, u, v, values;  // of bits 0: not there
};

constexpr int64_t kExperts = 3, kGroups = 2;
constexpr int32_t kOffsets[] = {0, 5, 5, 42};  // an odd rank, none, more than a unit

struct Layer {
  Factored<const void> sizes;
  std::vector<int32_t> group = {1, -1, 0}, offsets{kOffsets, kOffsets + 4};
  struct Tensors {
    Coded base, u, v, values;
  } gate_up, down;

  Layer(unsigned seed, const Form& form, int64_t hidden, int64_t intermediate, bool gated) {
    std::mt19937 random(seed);
    sizes.experts = kExperts, sizes.hidden = hidden, sizes.intermediate = intermediate;
    sizes.gated = gated;
    if (form.base.bits != 0) sizes.groups = kGroups;
    for (const bool is_down : {false, true}) {
      Tensors& t = is_down ? down : gate_up;
      const int64_t rows = sizes.rows(is_down), columns = sizes.columns(is_down);
      if (form.base.bits != 0) t.base = Coded(random, form.base, kGroups * rows, columns);
      if (form.u.bits != 0) t.u = Coded(random, form.u, kOffsets[3], rows);
      if (form.v.bits != 0) t.v = Coded(random, form.v, kOffsets[3], columns);
      if (form.values.bits != 0) t.values = Coded(random, form.values, kExperts * rows, columns);
    }
    point(sizes, *this);
  }

  template <typename Void, typename Self>
  static void point(Factored<Void>& f, Self& self) {
    const auto place = [](auto& coded, Void*& codes, Void*& scales, Payload& payload) {
      if (coded.payload.bits == 0) return;
      codes = coded.codes.data(), scales = coded.scales.data(), payload = coded.payload;
    };
    if (f.groups != 0) f.group = self.group.data();
    for (const bool is_down : {false, true}) {
      auto& t = is_down ? self.down : self.gate_up;
      FactoredMatrix<Void>& m = is_down ? f.down : f.gate_up;
      place(t.base, m.base, m.base_scales, m.base_payload);
      place(t.u, m.u, m.u_scales, m.u_payload);
      place(t.v, m.v, m.v_scales, m.v_payload);
      place(t.values, m.values, m.values_scales, m.values_payload);
      if (t.u.payload.bits != 0) m.rank_offsets = self.offsets.data(), m.ranks = kOffsets[3];
    }
  }
};

struct Free {
  void operator()(void* block) const { std::free(block); }
};
using Block = std::unique_ptr<std::byte, Free>;

Block packed(const Layer& layer, int64_t& bytes) {
  bytes = resmoe::packed_bytes(layer.sizes);
  void* memory = nullptr;
  if (posix_memalign(&memory, resmoe::kAlignment, static_cast<size_t>(bytes)) != 0) std::abort();
  Block block(static_cast<std::byte*>(memory));
  std::memset(memory, 0xa5, static_cast<size_t>(bytes));
  resmoe::pack(layer.sizes, memory, backwards);
  return block;
}

int word_at(const std::byte* place, int64_t index) {
  uint16_t word;
  std::memcpy(&word, place + 2 * index, 2);
  return word;
}

// The code of row r, column k of a tile whose units begin at `units`.
int code_in_tile(const std::byte* units, int64_t bits, int64_t r, int64_t k) {
  const std::byte* const unit = units + k / 32 * 64 * bits;
  const int64_t line = k % 32 / 2, element = 2 * r + k % 2, a_word = 16 / bits;
  if (bits == 3 && line == 15) {
    int code = 0;
    for (int b = 0; b < 3; ++b) code |= word_at(unit + 64 * b, element) >> 15 << b;
    return code;
  }
  return word_at(unit + line / a_word * 64, element) >> bits * (line % a_word) & ((1 << bits) - 1);
}

// A tile with its scales: rows [first, first + count) of a tensor; what fills it up is 0.
void check_tile(const char* name, const std::byte* tile, const Coded& from, int64_t first, int64_t count) {
  const Payload payload = from.payload;
  for (int64_t g = 0; g < from.scales_a_row; ++g)
    for (int64_t r = 0; r < 16; ++r)
      CHECK(word_at(tile, g * 16 + r) ==
                (r < count ? from.scales[static_cast<size_t>((first + r) * from.scales_a_row + g)] : 0),
            "%s: scale", name);
  const std::byte* const units = tile + (from.scales_a_row * 32 + 63) / 64 * 64;
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t k = 0; k < (from.columns + 31) / 32 * 32; ++k)
      CHECK(code_in_tile(units, payload.bits, r, k) == (r < count && k < from.columns ? from.get(first + r, k) : 0),
            "%s: code", name);
}

void check_matrix(const PackedMatrix& m, const std::byte* block, const Layer::Tensors& t) {
  const auto starts = [&](int64_t part, int64_t e) {
    int64_t value;
    std::memcpy(&value, block + part + 8 * e, 8);
    return value;
  };
  const int64_t half = m.rows / m.halves;
  for (const Coded* from : {&t.base, &t.values}) {
    if (from->payload.bits == 0) continue;
    const int64_t bytes = resmoe::tile_bytes(m.columns, Dtype::bfloat16, from->payload);
    for (int64_t i = 0; i < from->rows / m.rows * m.tiles(); ++i) {
      const int64_t in_half = i % m.half_tiles * 16;
      const int64_t first = i / m.tiles() * m.rows + i % m.tiles() / m.half_tiles * half + in_half;
      check_tile(from == &t.base ? "base" : "values", block + (from == &t.base ? m.base : m.values) + i * bytes, *from,
                 first, std::min<int64_t>(16, half - in_half));
    }
  }
  if (t.u.payload.bits == 0) return;
  CHECK(std::memcmp(block + m.u_scales, t.u.scales.data(), t.u.scales.size() * 2) == 0, "scales of u");
  for (int64_t e = 0; e < kExperts; ++e) {
    const int64_t first = kOffsets[e], rank = kOffsets[e + 1] - first;
    for (int64_t i = 0; i < (rank + 15) / 16; ++i)
      check_tile("v", block + m.v + starts(m.v_starts, e) + i * resmoe::tile_bytes(m.columns, Dtype::bfloat16, t.v.payload),
                 t.v, first + 16 * i, std::min<int64_t>(16, rank - 16 * i));
    for (int64_t i = 0; i < m.tiles(); ++i) {
      const std::byte* const tile = block + m.u + starts(m.u_starts, e) + i * ((rank + 31) / 32 * 64 * t.u.payload.bits);
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t k = 0; k < (rank + 31) / 32 * 32; ++k) {
          const int64_t in_half = i % m.half_tiles * 16 + r, row = i / m.half_tiles * half + in_half;
          const int want = in_half < half && k < rank ? t.u.get(first + k, row) : 0;
          CHECK(code_in_tile(tile, t.u.payload.bits, r, k) == want, "u: code");
        }
    }
  }
}

constexpr Form kForms[] = {
    {"all of 4 bits", {4, 128}, {4, 0}, {4, 128}, {4, 128}},
    {"each its own", {3, 32}, {8, 0}, {2, 64}, {3, 64}},
    {"and others", {8, 64}, {2, 0}, {3, 128}, {2, 32}},
    {"values alone", {}, {}, {}, {8, 32}},
    {"low rank alone", {}, {3, 0}, {8, 32}, {}},
};

void a_block_is_what_the_header_file_says_and_gives_the_tensors_back() {
  unsigned seed = 0;
  for (const Form& form : kForms)
    for (const auto& [hidden, intermediate] : {std::pair<int64_t, int64_t>{45, 37}, {1, 1}, {64, 32}, {130, 33}})
      for (const bool gated : {true, false}) {
        const Layer layer(++seed, form, hidden, intermediate, gated);
        int64_t bytes = 0, again = 0;
        const Block block = packed(layer, bytes);
        const PackedHeader& header = resmoe::check_packed(block.get(), bytes);
        check_matrix(header.gate_up, block.get(), layer.gate_up);
        check_matrix(header.down, block.get(), layer.down);
        CHECK(std::memcmp(block.get(), packed(layer, again).get(), static_cast<size_t>(bytes)) == 0,
              "%s: two blocks of one layer differ", form.name);

        Layer back(seed, form, hidden, intermediate, gated);  // as large, other contents
        Factored<void> to;
        const Factored<const void> sizes = resmoe::packed_sizes(block.get());
        to.experts = sizes.experts, to.hidden = sizes.hidden, to.intermediate = sizes.intermediate;
        to.groups = sizes.groups, to.dtype = sizes.dtype, to.gated = sizes.gated;
        for (auto* t : {&back.gate_up, &back.down})
          for (Coded* coded : {&t->base, &t->u, &t->v, &t->values}) {
            std::fill(coded->codes.begin(), coded->codes.end(), static_cast<unsigned char>(0x5a));
            std::fill(coded->scales.begin(), coded->scales.end(), uint16_t{0x5a5a});
          }
        Layer::point(to, back);
        for (const bool down : {false, true}) {
          const auto &had = down ? layer.sizes.down : layer.sizes.gate_up, &has = down ? sizes.down : sizes.gate_up;
          CHECK(had.base_payload == has.base_payload && had.u_payload == has.u_payload &&
                    had.v_payload == has.v_payload && had.values_payload == has.values_payload &&
                    (had.values == nullptr) == (has.values == nullptr) && had.ranks == has.ranks,
                "%s: payloads", form.name);
        }
        resmoe::unpack(block.get(), to, backwards);
        for (const bool down : {false, true}) {
          const auto &had = down ? layer.down : layer.gate_up, &has = down ? back.down : back.gate_up;
          for (const auto part : {&Layer::Tensors::base, &Layer::Tensors::u, &Layer::Tensors::v, &Layer::Tensors::values})
            CHECK((had.*part).codes == (has.*part).codes && (had.*part).scales == (has.*part).scales,
                  "%s: does not come back", form.name);
        }
      }
}

// Codes are what they take, and little more: one tile for every 16 rows, one unit for 32 columns.
void a_block_is_hardly_larger_than_its_tensors() {
  const Layer layer(1, {"", {4, 128}, {4, 0}, {4, 128}, {2, 128}}, 512, 256, true);
  int64_t stored = 0;
  for (const auto* t : {&layer.gate_up, &layer.down})
    for (const Coded* coded : {&t->base, &t->u, &t->v, &t->values})
      stored += static_cast<int64_t>(coded->codes.size() + 2 * coded->scales.size());
  const int64_t bytes = resmoe::packed_bytes(layer.sizes);
  CHECK(bytes < stored + stored / 10, "%lld bytes of %lld", static_cast<long long>(bytes),
        static_cast<long long>(stored));
}

void bad_contents_are_refused() {
  const Form form = {"", {4, 64}, {3, 0}, {8, 32}, {2, 128}};
  const auto refusal = [&](const auto& spoil) -> std::string {
    Layer layer(7, form, 45, 37, true);
    spoil(layer);
    try {
      int64_t bytes = 0;
      packed(layer, bytes);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "nothing";
  };
  const auto expect = [&](const std::string& sentence, const auto& spoil) {
    const std::string got = refusal(spoil);
    CHECK(got == sentence, "refused with: %s", got.c_str());
  };
  expect("base_gate_up: codes behind the 45 of a row must be 0, got 5 at (1, 3, 46)",
         [](Layer& l) { l.gate_up.base.set(74 + 3, 46, 5); });
  expect("u_down: codes behind the 45 of a row must be 0, got 1 at (41, 63)",
         [](Layer& l) { l.down.u.set(41, 63, 1); });
  expect("v_gate_up: codes behind the 45 of a row must be 0, got 200 at (0, 45)",
         [](Layer& l) { l.gate_up.v.set(0, 45, 200); });
  expect("values_down: codes behind the 37 of a row must be 0, got 3 at (2, 44, 127)",
         [](Layer& l) { l.down.values.set(2 * 45 + 44, 127, 3); });
  expect("scales_v_down: scales must be finite and at least +0, got inf at (2, 1)",
         [](Layer& l) { l.down.v.scales[5] = 0x7f80; });
  expect("scales_u_gate_up: scales must be finite and at least +0, got nan at (1,)",
         [](Layer& l) { l.gate_up.u.scales[1] = 0x7fc1; });
  expect("scales_base_down: scales must be finite and at least +0, got -1 at (0, 0, 0)",
         [](Layer& l) { l.down.base.scales[0] = 0xbf80; });
  expect("scales_values_down: scales must be finite and at least +0, got -0 at (0, 0, 0)",
         [](Layer& l) { l.down.values.scales[0] = 0x8000; });
  expect("base_down: codes must have 8, 4, 3 or 2 bits, got 5", [](Layer& l) { l.sizes.down.base_payload.bits = 5; });
  expect("v_gate_up: a group must be 32, 64 or 128 columns, got 48",
         [](Layer& l) { l.sizes.gate_up.v_payload.group = 48; });
  expect("u_gate_up: must have one scale a rank, a group of 0, got 32",
         [](Layer& l) { l.sizes.gate_up.u_payload.group = 32; });
  expect("values_down: codes must be those of a full residual, got a mask too; the reference runs them",
         [](Layer& l) { l.sizes.down.mask = l.offsets.data(); });
}

}  // namespace

int main() {
  a_block_is_what_the_header_file_says_and_gives_the_tensors_back();
  a_block_is_hardly_larger_than_its_tensors();
  bad_contents_are_refused();
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
