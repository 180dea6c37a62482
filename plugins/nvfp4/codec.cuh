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

// A number rounded to E2M1's magnitudes, half to even, as fp32 and as its code. At and above 2^23 of its steps fp32 has the
// step itself as its last place: adding that much rounds, and the sum's last bits are the count of steps. (One addition where
// rintf and a conversion to integer would take a unit of a quarter of the rate each.)
struct Rounded {
  float magnitude;
  unsigned int code;
};

__device__ __forceinline__ Rounded e2m1_rounded(float x) {
  const float magnitude = fminf(fabsf(x), 6.0f);
  const unsigned int binade = max(__float_as_uint(magnitude) >> 23, 127u);
  const float steps = __uint_as_float((binade + 22u) << 23);
  const float sum = __fadd_rn(magnitude, steps);
  return {__fsub_rn(sum, steps), (2u * (binade - 127u) + (__float_as_uint(sum) & 7u)) | (x < 0.0f ? 8u : 0u)};
}

// What a rounded magnitude decodes to, from what 1 and 3/2 do: the others are these times a power of two, which is exact, or so
// small (amax below 1e-30) that every squared error is 0. So a block needs two divisions, not one an element.
__device__ __forceinline__ float level_of(float magnitude, float one, float one_and_half) {
  const unsigned int bits = __float_as_uint(magnitude);
  return __fmul_rn(bits & 0x400000u ? one_and_half : one, __uint_as_float(bits & 0x7f800000u));
}

// Quantize with block scale `code`; returns the sum of squared errors, added up pairwise by halves (8, 4, 2, 1).
__device__ __forceinline__ float pack16_with_scale(
    const float (&x)[16], unsigned int code, float decode, float amax, Packed16& packed) {
  const float scale = float_from_e4m3(code);
  const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fmul_rn(decode, scale));
  const Level one = decoded(scale, amax), one_and_half = decoded(__fmul_rn(1.5f, scale), amax);
  const bool huge = !(__fmul_rn(one_and_half.product, 4.0f) <= 3.402823466e38f);  // then products decide, level by level
  float error[16];
  packed.low = packed.high = 0, packed.scale = code;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Rounded e2m1 = e2m1_rounded(scale == 0.0f ? 0.0f : __fmul_rn(x[i], inverse));
    (i < 8 ? packed.low : packed.high) |= e2m1.code << (4 * (i & 7));
    float level = level_of(e2m1.magnitude, one.quotient, one_and_half.quotient);
    if (huge) {
      const float product = level_of(e2m1.magnitude, one.product, one_and_half.product);
      level = e2m1.magnitude == 0.0f ? 0.0f : product <= 3.402823466e38f ? level : product;
    }
    const float difference = __fsub_rn(level, fabsf(x[i]));
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
