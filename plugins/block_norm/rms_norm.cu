// RMSNorm over a token's CHANNELS elements. x, n [L,C]; weight [C]. A thread block is one token; rounded as the reference
// rounds: normalised, then weighted. A unit is 16 elements; a thread holds UNITS of them, THREADS apart, in registers.
#include "memory.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const compute_t* __restrict__ x, const compute_t* __restrict__ weight, compute_t* __restrict__ n) {
  const size_t row = (size_t)blockIdx.x * CHANNELS;
  float held[UNITS][16];
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
    load16(x + row + first, held[u]);
#pragma unroll
    for (int i = 0; i < 16; ++i) squares += held[u][i] * held[u][i];
  }
  const float mean = __fdiv_rn(block_sum(squares), (float)CHANNELS);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, EPS)));
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
    float w[16];
    load16(weight + first, w);
#pragma unroll
    for (int i = 0; i < 16; ++i) held[u][i] = __fmul_rn(rounded(__fmul_rn(held[u][i], scale), x), w[i]);
    store16(n + row + first, held[u]);
  }
}
