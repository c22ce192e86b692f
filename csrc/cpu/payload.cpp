#include "../payload.h"

#include <cstring>

namespace resmoe {
namespace {

constexpr int kRowPairs = 32;  // elements of a line

// Calls body<bits>(), so that its loops know their shifts: a layer has hundreds of millions of codes.
template <typename Body>
void with_bits(int32_t bits, const Body& body) {
  switch (bits) {
    case 8:
      return body.template operator()<8>();
    case 4:
      return body.template operator()<4>();
    case 3:
      return body.template operator()<3>();
    case 2:
      return body.template operator()<2>();
  }
}

}  // namespace

void load_unit(int32_t bits, const uint8_t* stored, uint8_t* codes) {
  with_bits(bits, [&]<int b>() {
    constexpr int low = b == 3 ? 2 : b, a_byte = 8 / low, mask = (1 << low) - 1;
    for (int i = 0; i < kUnitColumns / a_byte; ++i)
      for (int j = 0; j < a_byte; ++j) codes[i * a_byte + j] = static_cast<uint8_t>(stored[i] >> low * j & mask);
    for (int i = 0; b == 3 && i < kUnitColumns; ++i)
      codes[i] = static_cast<uint8_t>(codes[i] | (stored[8 + i / 8] >> i % 8 & 1) << 2);
  });
}

void store_unit(int32_t bits, const uint8_t* codes, uint8_t* stored) {
  with_bits(bits, [&]<int b>() {
    constexpr int low = b == 3 ? 2 : b, a_byte = 8 / low, mask = (1 << low) - 1;
    for (int i = 0; i < kUnitColumns / a_byte; ++i) {
      int byte = 0;
      for (int j = 0; j < a_byte; ++j) byte |= (codes[i * a_byte + j] & mask) << low * j;
      stored[i] = static_cast<uint8_t>(byte);
    }
    for (int i = 0; b == 3 && i < kUnitColumns / 8; ++i) {
      int byte = 0;
      for (int j = 0; j < 8; ++j) byte |= codes[8 * i + j] >> 2 << j;
      stored[8 + i] = static_cast<uint8_t>(byte);
    }
  });
}

void pack_unit(int32_t bits, const uint8_t (*lines)[kRowPairs], std::byte* unit) {
  with_bits(bits, [&]<int b>() {
    constexpr int a_word = 16 / b;
    for (int part = 0; part < b; ++part) {
      uint16_t words[kRowPairs] = {};
      for (int i = 0; i < a_word; ++i)
        for (int w = 0; w < kRowPairs; ++w)
          words[w] = static_cast<uint16_t>(words[w] | lines[part * a_word + i][w] << b * i);
      for (int w = 0; b == 3 && w < kRowPairs; ++w)
        words[w] = static_cast<uint16_t>(words[w] | (lines[15][w] >> part & 1) << 15);
      std::memcpy(unit + part * 64, words, 64);
    }
  });
}

void unpack_unit(int32_t bits, const std::byte* unit, uint8_t (*lines)[kRowPairs]) {
  with_bits(bits, [&]<int b>() {
    constexpr int a_word = 16 / b, low = (1 << b) - 1;
    if (b == 3) std::memset(lines[15], 0, kRowPairs);
    for (int part = 0; part < b; ++part) {
      uint16_t words[kRowPairs];
      std::memcpy(words, unit + part * 64, 64);
      for (int i = 0; i < a_word; ++i)
        for (int w = 0; w < kRowPairs; ++w)
          lines[part * a_word + i][w] = static_cast<uint8_t>(words[w] >> b * i & low);
      for (int w = 0; b == 3 && w < kRowPairs; ++w)
        lines[15][w] = static_cast<uint8_t>(lines[15][w] | words[w] >> 15 << part);
    }
  });
}

}  // namespace resmoe
