// RMSNorm over a token's HEADS * HEAD_DIM elements, then RoPE of the pairs (2j, 2j+1) of each head.
// q, k, q_out, k_out [L,H,D]; weights [H*D]; cosine, sine fp32 [L,D/2]. A thread block is one token; gridDim.y: 0 is q,
// 1 is k. A unit is 16 elements; a thread holds UNITS of them, THREADS apart, in registers between read and write.
// Every rounding step is an explicit __f*_rn, so that only the order of the sum differs from the reference.
#include "memory.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) qk_norm_rope(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ q_weight,
    const compute_t* __restrict__ k_weight, const float* __restrict__ cosine, const float* __restrict__ sine,
    compute_t* __restrict__ q_out, compute_t* __restrict__ k_out) {
  constexpr int CHANNELS = HEADS * HEAD_DIM;
  const size_t row = (size_t)blockIdx.x * CHANNELS;
  const compute_t* x = (blockIdx.y ? k : q) + row;
  const compute_t* weight = blockIdx.y ? k_weight : q_weight;
  compute_t* out = (blockIdx.y ? k_out : q_out) + row;

  float held[UNITS][16];
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
    load16(x + first, held[u]);
#pragma unroll
    for (int i = 0; i < 16; ++i) squares += held[u][i] * held[u][i];
  }
  const float mean = __fdiv_rn(block_sum(squares), (float)CHANNELS);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, EPS)));

#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
    const size_t angle = ((size_t)blockIdx.x * HEAD_DIM + first % HEAD_DIM) / 2;
    float w[16], c[8], s[8];
    load16(weight + first, w);
    load8(cosine + angle, c);
    load8(sine + angle, s);
#pragma unroll
    for (int i = 0; i < 16; ++i) w[i] = rounded(__fmul_rn(rounded(__fmul_rn(held[u][i], scale), out), w[i]), out);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float even = w[2 * j], odd = w[2 * j + 1];
      held[u][2 * j] = __fsub_rn(__fmul_rn(even, c[j]), __fmul_rn(odd, s[j]));
      held[u][2 * j + 1] = __fadd_rn(__fmul_rn(even, s[j]), __fmul_rn(odd, c[j]));
    }
    store16(out + first, held[u]);
  }
}
