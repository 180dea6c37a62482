// NVFP4 on the device: E2M1 codes, E4M3 block scales, and the four-over-six choice.
// Bit-equal to plugins/nvfp4/reference.py (rule "mse", order "longlive"): every rounding step is an explicit
// __f*_rn, which the compiler may neither fuse nor reorder. LIMIT_E2M1 and LIMIT_E4M3 come from that file as macros.
#pragma once

#include "minifloat.cuh"

// Sixteen codes, element i in bits 4i: byte-wise the low nibble is the even index.
struct Packed16 {
  unsigned int low, high, scale;
};

__device__ __forceinline__ void unpack16(unsigned int low, unsigned int high, float (&q)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    q[i] = float_from_e2m1(low >> (4 * i));
    q[8 + i] = float_from_e2m1(high >> (4 * i));
  }
}

// What a magnitude decodes to, and before its division: E2M1 * E4M3 * amax, which may overflow where the quotient does
// not.
struct Level {
  float product, quotient;
};

__device__ __forceinline__ Level decoded(float scaled, float amax) {
  const float product = __fmul_rn(scaled, amax);
  return {product, __fdiv_rn(product, LIMIT_E2M1 * LIMIT_E4M3)};
}

// The level of magnitude code 0..7, from those of 1 and 3/2: the others are these times a power of two, which is exact,
// or so small (amax below 1e-30) that every squared error is 0. So a block needs two divisions, not one an element.
__device__ __forceinline__ float level_of(unsigned int code, const Level& one, const Level& one_and_half) {
  const bool odd = (code & 1u) && code > 1u;
  const float power = __uint_as_float((126u + (code >> 1)) << 23);
  const float product = __fmul_rn(odd ? one_and_half.product : one.product, power);
  const float quotient = __fmul_rn(odd ? one_and_half.quotient : one.quotient, power);
  return code == 0u ? 0.0f : product <= 3.402823466e38f ? quotient : product;
}

// Quantize with block scale `code`; returns the sum of squared errors, added up pairwise by halves (8, 4, 2, 1).
__device__ __forceinline__ float pack16_with_scale(
    const float (&x)[16], unsigned int code, float decode, float amax, Packed16& packed) {
  const float scale = float_from_e4m3(code);
  const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fmul_rn(decode, scale));
  const Level one = decoded(scale, amax), one_and_half = decoded(__fmul_rn(1.5f, scale), amax);
  float error[16];
  packed.low = packed.high = 0, packed.scale = code;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const unsigned int e2m1 = scale == 0.0f ? 0u : e2m1_from_float(__fmul_rn(x[i], inverse));
    (i < 8 ? packed.low : packed.high) |= e2m1 << (4 * (i & 7));
    const float difference = __fsub_rn(level_of(e2m1 & 7u, one, one_and_half), fabsf(x[i]));
    error[i] = __fmul_rn(difference, difference);
  }
#pragma unroll
  for (int half = 8; half > 0; half >>= 1) {
#pragma unroll
    for (int i = 0; i < half; ++i) error[i] = __fadd_rn(error[i], error[i + half]);
  }
  return error[0];
}

// Four over six: the block maximum goes to 6 or to 4, whichever errs less; a tie goes to 6.
__device__ __forceinline__ Packed16 pack16_mse(const float (&x)[16], float amax) {
  Packed16 six = {0u, 0u, 0u}, four;
  const float encode = __fdiv_rn(LIMIT_E2M1 * LIMIT_E4M3, amax);
  if (!(encode <= 3.402823466e38f)) return six;  // amax is 0, or too small to divide by: everything is zero
  float block_max = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) block_max = fmaxf(block_max, fabsf(x[i]));
  const float decode = __fdiv_rn(1.0f, encode);
  const float base = __fmul_rn(__fdiv_rn(block_max, LIMIT_E2M1), encode);
  const float error_six = pack16_with_scale(x, e4m3_from_scale(base), decode, amax, six);
  const float error_four = pack16_with_scale(x, e4m3_from_scale(__fmul_rn(base, 1.5f)), decode, amax, four);
  return error_four < error_six ? four : six;
}
