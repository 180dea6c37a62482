// Into ray coordinates and back. A thread block is one token; a unit is 4 elements of a head: in its first half a group that
// a 4x4 matrix moves, in its second two pairs that are rotated. PREPARE: q, k, v [T,P,H,D]; weights [H*D]; rays, inverse fp32
// [T,P,4,4]; cosine, sine fp32 [T,P,D/4]. DELTA: features of a gated delta network, and growth [T,P,H]. CLIP: no longer than
// before.
#include "memory.cuh"
#include "reduce.cuh"

__device__ __forceinline__ float load1(const unsigned short* p) { return float_from_bf16(*p); }
__device__ __forceinline__ float load1(const float* p) { return *p; }

#define UNITS (HEADS * HEAD_DIM / 4)
#define HEAD_UNITS (HEAD_DIM / 4)

// x, four elements of unit `u`, through `m` (its transpose if `transposed`), or rotated; `turn` -1 turns back.
__device__ __forceinline__ void turn_unit(
    float (&x)[4], int u, const float* m, bool transposed, const float* cosine, const float* sine, float turn) {
  const int inside = u % HEAD_UNITS;
  float y[4];
  if (inside < HEAD_UNITS / 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i] += x[j] * (transposed ? m[j * 4 + i] : m[i * 4 + j]);
    }
  } else {
    const int pair = (inside - HEAD_UNITS / 2) * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float c = cosine[pair + j], s = turn * sine[pair + j];
      y[2 * j] = x[2 * j] * c - x[2 * j + 1] * s;
      y[2 * j + 1] = x[2 * j] * s + x[2 * j + 1] * c;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = y[i];
}

#if PREPARE

__device__ __forceinline__ float squares_of(const float (&x)[4]) {
  return x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
}

extern "C" __global__ void __launch_bounds__(THREADS) ray_prepare(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v,
    const compute_t* __restrict__ q_weight, const compute_t* __restrict__ k_weight, const float* __restrict__ rays,
    const float* __restrict__ inverse, const float* __restrict__ cosine, const float* __restrict__ sine,
    compute_t* __restrict__ q_out, compute_t* __restrict__ k_out, compute_t* __restrict__ v_out
#if DELTA
    , float* __restrict__ growth
#endif
) {
  __shared__ float was[UNITS], now[UNITS], shrink[HEADS];
  const size_t token = blockIdx.x, row = token * HEADS * HEAD_DIM;
  const float* angles[2] = {cosine + token * (HEAD_DIM / 4), sine + token * (HEAD_DIM / 4)};
  for (int part = 0; part < 3; ++part) {
    const compute_t* x = (part == 0 ? q : part == 1 ? k : v) + row;
    compute_t* out = (part == 0 ? q_out : part == 1 ? k_out : v_out) + row;
    const compute_t* weight = part == 0 ? q_weight : k_weight;
    float held[UNITS_EACH][4], sum = 0.0f;
#pragma unroll
    for (int n = 0; n < UNITS_EACH; ++n) {
      const int u = n * THREADS + (int)threadIdx.x;
      if (u >= UNITS) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) held[n][i] = load1(x + u * 4 + i);
      sum += squares_of(held[n]);
    }
    const float norm = part < 2 ? 1.0f / sqrtf(block_sum(sum) / (float)(HEADS * HEAD_DIM) + EPS) : 1.0f;
#pragma unroll
    for (int n = 0; n < UNITS_EACH; ++n) {
      const int u = n * THREADS + (int)threadIdx.x;
      if (u >= UNITS) continue;
      if (part < 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          held[n][i] *= norm * load1(weight + u * 4 + i);
          if (DELTA) held[n][i] = fmaxf(held[n][i], 0.0f) * (part ? KEY_SCALE : 1.0f);
        }
      was[u] = squares_of(held[n]);
      turn_unit(held[n], u, (part ? inverse : rays) + token * 16, part == 0, angles[0], angles[1], 1.0f);
      now[u] = squares_of(held[n]);
    }
    __syncthreads();
    for (int head = (int)threadIdx.x; head < HEADS; head += THREADS) {
      float before = 0.0f, after = 0.0f;
      for (int u = 0; u < HEAD_UNITS; ++u) before += was[head * HEAD_UNITS + u], after += now[head * HEAD_UNITS + u];
      float factor = 1.0f;
      if (CLIP) {
        const float least = sqrtf(before / (float)HEAD_DIM + CLIP_EPS), most = sqrtf(after / (float)HEAD_DIM + CLIP_EPS);
        factor = fminf(least / fmaxf(most, CLIP_EPS), 1.0f);
      }
      shrink[head] = factor;
#if DELTA
      if (part == 1) growth[token * HEADS + head] = fmaxf(after * factor * factor, SMALLEST) / fmaxf(before, SMALLEST);
#endif
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < UNITS_EACH; ++n) {
      const int u = n * THREADS + (int)threadIdx.x;
      if (u >= UNITS) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) store1(out + u * 4 + i, held[n][i] * shrink[u / HEAD_UNITS]);
    }
    __syncthreads();
  }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS) ray_restore(
    const compute_t* __restrict__ x, const float* __restrict__ rays, const float* __restrict__ cosine,
    const float* __restrict__ sine, compute_t* __restrict__ out) {
  const size_t token = blockIdx.x, row = token * HEADS * HEAD_DIM;
  for (int u = (int)threadIdx.x; u < UNITS; u += THREADS) {
    float held[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) held[i] = load1(x + row + u * 4 + i);
    turn_unit(held, u, rays + token * 16, false, cosine + token * (HEAD_DIM / 4), sine + token * (HEAD_DIM / 4), -1.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) store1(out + row + u * 4 + i, held[i]);
  }
}

#endif
