// The eight magnitudes of E2M1 under one block scale, looked up by code: cheaper than decoding element by element.
#pragma once
#include "codec.cuh"
#include "memory.cuh"

// Magnitudes of codes 0..7: 0, 1/2, 1, 3/2, 2, 3, 4, 6. Doubling is exact, so two of them give all.
__device__ __forceinline__ void levels_from(float one, float one_and_half, float (&level)[8]) {
  level[0] = 0.0f, level[1] = 0.5f * one, level[2] = one, level[3] = one_and_half;
  level[4] = 2.0f * one, level[5] = 2.0f * one_and_half, level[6] = 4.0f * one, level[7] = 4.0f * one_and_half;
}

// Bit 3 of four codes to bit 7 of four bytes.
__device__ __forceinline__ unsigned int sign_bytes(unsigned int codes) {
  return (codes & 0x8u) << 4 | (codes & 0x80u) << 8 | (codes & 0x800u) << 12 | (codes & 0x8000u) << 16;
}

// Eight codes (element i in bits 4i) as bf16, bit-equal to the reference: e2m1 * scale * amax / (M2 * M3), rounded.
__device__ __forceinline__ uint4 bf16_from_codes(unsigned int codes, float scale, float amax) {
  const float one = __fdiv_rn(__fmul_rn(scale, amax), LIMIT_E2M1 * LIMIT_E4M3);
  const float one_and_half = __fdiv_rn(__fmul_rn(__fmul_rn(1.5f, scale), amax), LIMIT_E2M1 * LIMIT_E4M3);
  float level[8];
  levels_from(one, one_and_half, level);
  unsigned int pair[4], low[2], high[2], out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = bf16_pair(level[2 * i], level[2 * i + 1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    low[i] = __byte_perm(pair[2 * i], pair[2 * i + 1], 0x6420);
    high[i] = __byte_perm(pair[2 * i], pair[2 * i + 1], 0x7531);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // four codes at a time: a code's magnitude selects a byte of each table
    const unsigned int four = codes >> (16 * half);
    const unsigned int low_bytes = __byte_perm(low[0], low[1], four & 0x7777u);
    const unsigned int high_bytes = __byte_perm(high[0], high[1], four & 0x7777u) | sign_bytes(four);
    out[2 * half] = __byte_perm(low_bytes, high_bytes, 0x5140);
    out[2 * half + 1] = __byte_perm(low_bytes, high_bytes, 0x7362);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Sixteen codes as E4M3 of e2m1 * factor.
__device__ __forceinline__ uint4 e4m3_from_codes(uint2 codes, float factor) {
  float level[8];
  levels_from(factor, 1.5f * factor, level);
  const unsigned int low = e4m3_quad_fast(level[0], level[1], level[2], level[3]);
  const unsigned int high = e4m3_quad_fast(level[4], level[5], level[6], level[7]);
  const unsigned int words[4] = {codes.x, codes.x >> 16, codes.y, codes.y >> 16};
  unsigned int out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = __byte_perm(low, high, words[i] & 0x7777u) | sign_bytes(words[i]);
  return make_uint4(out[0], out[1], out[2], out[3]);
}
