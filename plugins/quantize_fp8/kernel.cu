// E4M3 codes of x * factor, or (GELU) of gelu(x * scale + bias) * factor. x, codes [L,C]; scale fp32 [C], bias [C].
// A thread does 16 features of ROWS tokens, which are loaded together.
#include "memory.cuh"
#include "minifloat.cuh"

#if GELU
// x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), and exp(-2u) = 2^(x (A + B x^2)).
// Far below zero the power is infinite and the result -0. Written for few instructions: they, not memory, set the pace.
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float A = -2.302208198144325f, B = -0.10294324f;
  const float power = x * fmaf(x * x, B, A);
#if defined(__CUDA_ARCH__)
  float y, part;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(power));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1.0f + y));
  return x * part;
#else
  return x / (1.0f + exp2f(power));
#endif
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
