// E2M1 and E4M3 codes from and to fp32. Bit-equal to plugins/nvfp4/reference.py: every rounding step is an explicit __f*_rn.
#pragma once

// 2^126 and 2^120 move the tiny exponent fields of E2M1 and E4M3 to fp32's; fp32 subnormals are kept, so the
// formats' own subnormals come out exact.
__device__ __forceinline__ float float_from_e2m1(unsigned int code) {
  const float magnitude = __uint_as_float((code & 7u) << 22) * 0x1p126f;
  return code & 8u ? -magnitude : magnitude;
}

__device__ __forceinline__ float float_from_e4m3(unsigned int code) {
  if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fc00000u);
  const float magnitude = __uint_as_float((code & 0x7fu) << 20) * 0x1p120f;
  return code & 0x80u ? -magnitude : magnitude;
}

// Code of `magnitude` >= 0 in a format with `mantissa` bits whose smallest normal is 2^lowest, half to even.
// In units of the local step the value is n; codes are consecutive across binades, so a carry needs no care.
__device__ __forceinline__ unsigned int minifloat_code(float magnitude, int mantissa, int lowest) {
  const int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, lowest);
  const float per_step = __uint_as_float((unsigned int)(127 + mantissa - exponent) << 23);
  const int n = (int)rintf(__fmul_rn(magnitude, per_step));
  return (unsigned int)(((exponent - lowest) << mantissa) + n);
}

// Saturates at 6. A negative number that rounds to zero keeps its sign (code 8); -0.0 has code 0.
__device__ __forceinline__ unsigned int e2m1_from_float(float x) {
  return minifloat_code(fminf(fabsf(x), 6.0f), 1, 0) | (x < 0.0f ? 8u : 0u);
}

// For x >= 0 (a block scale); saturates at 448.
__device__ __forceinline__ unsigned int e4m3_from_scale(float x) { return minifloat_code(fminf(x, 448.0f), 3, -6); }

// Any sign; a negative number that rounds to zero keeps it.
__device__ __forceinline__ unsigned int e4m3_from_float(float x) {
  return e4m3_from_scale(fabsf(x)) | (x < 0.0f ? 0x80u : 0u);
}

__device__ __forceinline__ unsigned int e4m3_quad(float a, float b, float c, float d) {
  return e4m3_from_float(a) | e4m3_from_float(b) << 8 | e4m3_from_float(c) << 16 | e4m3_from_float(d) << 24;
}

// The same through the conversion that GPUs with FP8 arithmetic have.
__device__ __forceinline__ unsigned int e4m3_quad_fast(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (unsigned int)low | ((unsigned int)high << 16);
#else
  return e4m3_quad(a, b, c, d);
#endif
}

// Sixteen codes of x * factor; `p` is aligned to 16 bytes.
__device__ __forceinline__ void store16_e4m3(unsigned char* p, const float (&x)[16], float factor) {
  unsigned int words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* y = x + 4 * i;
    words[i] = e4m3_quad_fast(__fmul_rn(y[0], factor), __fmul_rn(y[1], factor), __fmul_rn(y[2], factor),
                              __fmul_rn(y[3], factor));
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}
