// x' = x + gate * y, n = LN(x') * (1 + scale) + shift: x, y are read once, x', n written once, a token in registers.
// x, y, x_out, n [L,C]; e [F,6,C], modulation [1,6,C]: a row of both, added, is a gate, a scale or a shift.
// gridDim.y: frames. A thread block does ROWS tokens of one frame after another, so what they share is loaded once, and
// loads the next token before it reduces this one. A unit is 16 elements; a thread holds UNITS of them, THREADS apart.
// FP8: y * y_scale + y_bias stands for y, and n is written as E4M3 codes of n * factor.
#include "memory.cuh"
#include "minifloat.cuh"
#include "reduce.cuh"

// Row `row` of a frame's modulation, from feature `first` on.
__device__ __forceinline__ void load_row(const compute_t* e, const compute_t* modulation, int row, int first,
                                         float (&sum)[16]) {
  float own[16];
  load16(e + row * CHANNELS + first, sum);
  load16(modulation + row * CHANNELS + first, own);
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i] = __fadd_rn(own[i], sum[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS) block_norm(
    const compute_t* __restrict__ x,
#if RESIDUAL
    const compute_t* __restrict__ y,
#if FP8
    const float* __restrict__ y_scale, const compute_t* __restrict__ y_bias,
#endif
#endif
    const compute_t* __restrict__ e, const compute_t* __restrict__ modulation,
#if FOLLOWING
    const compute_t* __restrict__ next_modulation,
#endif
#if AFFINE
    const compute_t* __restrict__ weight, const compute_t* __restrict__ bias,
#endif
#if FP8
    const float* __restrict__ factor,
#endif
#if RESIDUAL
    compute_t* __restrict__ x_out,
#endif
#if FP8
    unsigned char* __restrict__ n,
#else
    compute_t* __restrict__ n,
#endif
    int tokens) {  // of a frame
  const compute_t* frame_e = e + (size_t)blockIdx.y * 6 * CHANNELS;
  float scale[UNITS][16], shift[UNITS][16];  // of LN(x')
#if RESIDUAL && (GATE >= 0 || FP8)
  float times[UNITS][16];  // of y
#endif
#if RESIDUAL && FP8
  float plus[UNITS][16];
#endif
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
#if AFFINE
    load16(weight + first, scale[u]);
    load16(bias + first, shift[u]);
#else
#if FOLLOWING
    const compute_t* own = next_modulation;
#else
    const compute_t* own = modulation;
#endif
    load_row(frame_e, own, SCALE, first, scale[u]);
    load_row(frame_e, own, SHIFT, first, shift[u]);
#pragma unroll
    for (int i = 0; i < 16; ++i) scale[u][i] = __fadd_rn(1.0f, scale[u][i]);
#endif
#if RESIDUAL && FP8
    load16(y_scale + first, times[u]);
    load16(y_bias + first, plus[u]);
#endif
#if RESIDUAL && GATE >= 0
    float gate[16];
    load_row(frame_e, modulation, GATE, first, gate);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#if FP8
      times[u][i] = __fmul_rn(times[u][i], gate[i]);
      plus[u][i] = __fmul_rn(plus[u][i], gate[i]);
#else
      times[u][i] = gate[i];
#endif
    }
#endif
  }
#if FP8
  const float to_codes = factor[0];
#endif

  const int start = blockIdx.x * ROWS, stop = min(start + ROWS, tokens);
  Packed next_x[UNITS];
#if RESIDUAL
  Packed next_y[UNITS];
#endif
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int first = (u * THREADS + (int)threadIdx.x) * 16;
    if (first >= CHANNELS) continue;
    const size_t place = ((size_t)blockIdx.y * tokens + start) * CHANNELS + first;
    next_x[u] = fetch16(x + place);
#if RESIDUAL
    next_y[u] = fetch16(y + place);
#endif
  }

  for (int token = start; token < stop; ++token) {
    const size_t row = ((size_t)blockIdx.y * tokens + token) * CHANNELS;
    float held[UNITS][16];
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int first = (u * THREADS + (int)threadIdx.x) * 16;
      if (first >= CHANNELS) continue;
      widen16(next_x[u], held[u]);
#if RESIDUAL
      float added[16];
      widen16(next_y[u], added);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#if FP8
        added[i] = __fadd_rn(__fmul_rn(added[i], times[u][i]), plus[u][i]);
#elif GATE >= 0
        added[i] = __fmul_rn(added[i], times[u][i]);
#endif
        held[u][i] = rounded(__fadd_rn(held[u][i], added[i]), x);
      }
#endif
      if (token + 1 < stop) {
        next_x[u] = fetch16(x + row + CHANNELS + first);
#if RESIDUAL
        next_y[u] = fetch16(y + row + CHANNELS + first);
#endif
      }
#if RESIDUAL
      store16(x_out + row + first, held[u]);
#endif
#pragma unroll
      for (int i = 0; i < 16; ++i) sum += held[u][i];
    }
    const float mean = __fdiv_rn(block_sum(sum), (float)CHANNELS);
    float squares = 0.0f;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      if ((u * THREADS + (int)threadIdx.x) * 16 >= CHANNELS) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        held[u][i] = __fsub_rn(held[u][i], mean);
        squares += held[u][i] * held[u][i];
      }
    }
    const float variance = __fdiv_rn(block_sum(squares), (float)CHANNELS);
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, EPS)));
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int first = (u * THREADS + (int)threadIdx.x) * 16;
      if (first >= CHANNELS) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i)
        held[u][i] = rounded(__fadd_rn(__fmul_rn(__fmul_rn(held[u][i], inverse), scale[u][i]), shift[u][i]), x);
#if FP8
      store16_e4m3(n + row + first, held[u], to_codes);
#else
      store16(n + row + first, held[u]);
#endif
    }
  }
}
