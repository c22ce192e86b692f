// Chunks of the weights in shared memory: how a warp multiplies them. low_rank_ring.cuh copies them there.
//
// A chunk is four quarters of 512 bytes, 16 of each lane. Quarter j of a strip, which is 16 rows of 64
// columns, has rows 4 j to 4 j + 3; of ranks, 32 of them with 32 columns, ranks 8 j to 8 j + 7. ldmatrix
// reads the same piece of two ranks in every quarter at once: 16 bytes between the quarters put them in
// different banks.
#pragma once

#include "cuda/decode_block.cuh"
#include "cuda/ptx.h"

namespace resmoe::cuda {

constexpr int kQuarterBytes = 512 + 16;
constexpr int kChunkBytes = 4 * kQuarterBytes;

// Which of a row's 8 pieces a lane copies. Odd rows have their halves exchanged, so that the pieces of two
// rows that 8 lanes read at once lie in different banks.
__device__ __forceinline__ int strip_piece(int lane) { return lane % 8 ^ (lane / 8 & 1) << 2; }

// Activations of a strip for the lanes of a warp: 8 numbers of token g from column 8 q on, of each half. The
// order of the columns within a sum is free as long as weights and activations agree; this one makes both
// 16-byte loads.
template <int TokenTiles>
struct Operand {
  uint4 of[2][TokenTiles];
};

template <typename T, int TokenTiles>
__device__ __forceinline__ void multiply_strip(Sums<TokenTiles>& sums, const uint8_t* chunk,
                                               const Operand<TokenTiles>& operand) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const uint8_t* const row = chunk + g / 4 * kQuarterBytes + g % 4 * 128 + q * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* const piece = row + (half ^ (g & 1)) * 64;
    const uint4 low = ptx::load_shared_16(piece), high = ptx::load_shared_16(piece + 2 * kQuarterBytes);
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      multiply_pair<T>(sums.of[tile], low, high, operand.of[half][tile]);
    }
  }
}

// sums[0] and sums[1] += the two halves of 16 columns, over 32 ranks. Place s of a sum over 16 is rank
// 8 (s / 2 mod 4) + s mod 2, 2 more from s = 8 on, 4 more in the second product: so a lane's activations are
// the 8 ranks from 8 q on.
template <typename T, int TokenTiles>
__device__ __forceinline__ void multiply_ranks(Sums<TokenTiles> (&sums)[2], const uint8_t* chunk,
                                               const uint4 (&operand)[TokenTiles]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 8, matrix = lane / 8;
  const uint8_t* const own =
      chunk + row / 2 * kQuarterBytes + (row % 2 + matrix / 2 * 2) * 64 + matrix % 2 * 16;
#pragma unroll
  for (int product = 0; product < 2; ++product) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t weights[4];
      ptx::load_matrix_x4_transposed(weights, own + product * 256 + half * 32);
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        const uint4& token = operand[tile];
        const uint32_t b[2] = {product == 0 ? token.x : token.z, product == 0 ? token.y : token.w};
        ptx::mma_m16n8k16<T>(sums[half].of[tile], weights, b);
      }
    }
  }
}

}  // namespace resmoe::cuda
