// Eight codes at a time between fp32 registers and memory. CODES: 1 E4M3, 2 whole numbers from -127 to 127.
#pragma once
#include "minifloat.cuh"

__device__ __forceinline__ unsigned int whole_quad(float a, float b, float c, float d) {
  const float x[4] = {a, b, c, d};
  unsigned int word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= ((unsigned int)(int)fminf(fmaxf(rintf(x[i]), -127.0f), 127.0f) & 0xffu) << (8 * i);
  return word;
}

__device__ __forceinline__ uint2 codes8(const float (&x)[8], float factor) {
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = __fmul_rn(x[i], factor);
#if CODES == 1
  return make_uint2(e4m3_quad_fast(y[0], y[1], y[2], y[3]), e4m3_quad_fast(y[4], y[5], y[6], y[7]));
#else
  return make_uint2(whole_quad(y[0], y[1], y[2], y[3]), whole_quad(y[4], y[5], y[6], y[7]));
#endif
}
