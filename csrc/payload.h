// How the numbers of one tensor are stored: as floats of the layer's type, or as codes of 8, 4, 3 or 2 bits
// and scales, one for a group of 32, 64 or 128 columns (resmoe_kernels/payload.py is the same for Python):
//
//     w = scale (c - (2^bits - 1) / 2),  c in [0, 2^bits)            scale bfloat16, finite and not negative
//
// c - (2^bits - 1) / 2 is half an odd integer of at most 8 bits, and so a bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resmoe {

struct Payload {
  int32_t bits = 0;   // 8, 4, 3, 2; 0: floats
  int32_t group = 0;  // columns of a scale; 0 with codes: one scale for a whole row of the tensor, which is u's

  bool is_coded() const { return bits != 0; }
  bool operator==(const Payload&) const = default;
};

inline constexpr int64_t kUnitColumns = 32;  // codes are stored, and multiplied, in whole units of columns
inline constexpr int64_t kUnitLines = kUnitColumns / 2;

constexpr int64_t units_of(int64_t columns) { return (columns + kUnitColumns - 1) / kUnitColumns; }
constexpr int64_t groups_of(int64_t columns, Payload payload) {
  return payload.group == 0 ? 0 : (columns + payload.group - 1) / payload.group;
}

// ---- a row of a checkpoint's codes: 32 elements are 4 bits bytes, the lowest bits first. 3 bits are 8 bytes of
// the low two bits of every code and 4 bytes of the high ones.

// Bytes of a row of `columns` elements, which is filled up with code 0 to whole groups (whole units without).
constexpr int64_t stored_row_bytes(int64_t columns, Payload payload) {
  const int64_t whole = payload.group == 0 ? kUnitColumns : payload.group;
  return (columns + whole - 1) / whole * whole * payload.bits / 8;
}

// The 32 codes of a unit, from their bytes and back.
void load_unit(int32_t bits, const uint8_t* stored, uint8_t* codes);
void store_unit(int32_t bits, const uint8_t* codes, uint8_t* stored);

// ---- a unit of a tile: 16 rows x 32 columns, 64 bits bytes, in 16 lines of two columns as packed.h has them for
// bfloat16: element w = 2 row + k % 2 of line k / 2. Words of 16 bits hold codes of several lines, so that
//
//     line i of words = words >> bits i        (i < 16 / bits; what lies above the lowest bits is other lines')
//
// for 64 bytes of words: 2 lines of 8 bits, 4 of 4, 8 of 2. Of 3 bits there are 5 lines in each of three times 64
// bytes, and bit b of the 16th line is bit 15 of the b-th.

void pack_unit(int32_t bits, const uint8_t (*lines)[2 * 16], std::byte* unit);
void unpack_unit(int32_t bits, const std::byte* unit, uint8_t (*lines)[2 * 16]);

}  // namespace resmoe
