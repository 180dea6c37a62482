// E4M3 codes of x * factor, or (GELU) of gelu(x * scale + bias) * factor. x, codes [L,C]; scale fp32 [C], bias [C].
// A thread does 16 features of ROWS tokens, which are loaded together.
#include "memory.cuh"
#include "minifloat.cuh"

#if GELU
// x / (1 + exp(-2u)) is x * (1 + tanh(u)) / 2. Far below zero the exponential is infinite and the quotient 0.
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-2.0f * u));
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) quantize_fp8(
    const compute_t* __restrict__ x,
#if GELU
    const float* __restrict__ scale, const compute_t* __restrict__ bias,
#endif
    const float* __restrict__ factor, unsigned char* __restrict__ codes, int tokens) {
  const int first = ((int)blockIdx.x * THREADS + (int)threadIdx.x) * 16;
  if (first >= CHANNELS) return;
  const int start = blockIdx.y * ROWS;
  Packed held[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (start + r < tokens) held[r] = fetch16(x + (size_t)(start + r) * CHANNELS + first);
  const float to_codes = factor[0];
#if GELU
  float times[16], plus[16];
  load16(scale + first, times);
  load16(bias + first, plus);
#endif
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (start + r >= tokens) break;
    float wide[16];
    widen16(held[r], wide);
#if GELU
#pragma unroll
    for (int i = 0; i < 16; ++i) wide[i] = rounded(gelu_tanh(__fadd_rn(__fmul_rn(wide[i], times[i]), plus[i])), x);
#endif
    store16_e4m3(codes + (size_t)(start + r) * CHANNELS + first, wide, to_codes);
  }
}
