// Queries, and the keys and values that `table` lists, as E4M3 with one scale each: what FP8 attention reads.
// q, k, v, out [L,H,D]; values [S,2,L,H,D/2], scales [S,2,L,H,D/16], amax [S,2] or cache [S,2,L,H,D]; table [W].
// query8 [L,H,D], window_k, window_v [W*L,H,D] in E4M3. A unit is 16 elements.
// gridDim.y: 2 * W + 1 panes: 2 * entry, plus 1 for V, and the queries last. partial [panes, gridDim.x].
// factors: FACTORS floats, FACTOR_STRIDE apart, in the order of enum Factor.
#include "levels.cuh"
#include "reduce.cuh"

#define FACTOR_STRIDE 4  // 16 bytes: libraries may ask for that alignment
#define LARGEST 448.0f
enum Factor { DESCALE_Q, DESCALE_K, DESCALE_V, DESCALE_S, SCALE_S, SCALE_O, TO_Q, TO_K, TO_V, DESCALE_O };

struct Pane {  // what a pane is read from: packed units, or 16-bit values
  const compute_t* plain;
#if CACHE_NVFP4
  const unsigned char *values, *scales;
  float amax;
#endif
  bool packed;
};

#if CACHE_NVFP4
#define CACHE const unsigned char *values, const unsigned char *scales, const float *amax
#define CACHE_PASSED values, scales, amax
#else
#define CACHE const compute_t* cache
#define CACHE_PASSED cache
#endif

__device__ __forceinline__ Pane pane_of(int y, int panes, const compute_t* q, const compute_t* k, const compute_t* v,
                                        CACHE, const int* table, int slots, int units) {
  Pane pane = {};
  if (y == panes - 1) {
    pane.plain = q;
    return pane;
  }
  const int slot = min(table[y / 2], slots - 1);
  pane.plain = y % 2 ? v : k;
  if (slot < 0) return pane;
  const size_t place = (size_t)(slot * 2 + y % 2) * units;
#if CACHE_NVFP4
  pane.values = values + place * 8, pane.scales = scales + place, pane.amax = amax[slot * 2 + y % 2];
  pane.packed = true;
#else
  pane.plain = cache + place * 16;
#endif
  return pane;
}

extern "C" __global__ void __launch_bounds__(THREADS) window_amax(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v, CACHE,
    const int* __restrict__ table, float* __restrict__ partial, int slots, int units) {
  const Pane pane = pane_of(blockIdx.y, gridDim.y, q, k, v, CACHE_PASSED, table, slots, units);
  float largest = 0.0f;
#if CACHE_NVFP4
  if (pane.packed) {
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = pane.amax;
    return;
  }
#endif
  for (int unit = blockIdx.x * THREADS + threadIdx.x; unit < units; unit += gridDim.x * THREADS) {
    float x[16];
    load16(pane.plain + (size_t)unit * 16, x);
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = block_max(largest);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = largest;
}

// One thread block. `partials` is the amax launch's gridDim.x.
extern "C" __global__ void __launch_bounds__(THREADS) window_factors(
    const float* __restrict__ partial, float* __restrict__ factors, int panes, int partials) {
  float largest[3] = {0.0f, 0.0f, 0.0f};  // of q, k, v
  for (int i = threadIdx.x; i < panes * partials; i += THREADS) {
    const int pane = i / partials, which = pane == panes - 1 ? 0 : 1 + pane % 2;
#pragma unroll
    for (int j = 0; j < 3; ++j)
      if (j == which) largest[j] = fmaxf(largest[j], partial[i]);
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const float found = block_max(largest[j]);
    const float whole = found > 0.0f ? found : 1.0f;
    if (threadIdx.x == 0) {
      factors[(DESCALE_Q + j) * FACTOR_STRIDE] = whole / LARGEST;
      factors[(TO_Q + j) * FACTOR_STRIDE] = LARGEST / whole;
      if (j == 2) {  // an output is a mean of values, so it is no larger than they are
        factors[SCALE_O * FACTOR_STRIDE] = LARGEST / whole;
        factors[DESCALE_O * FACTOR_STRIDE] = whole / LARGEST;
      }
    }
  }
  if (threadIdx.x == 0) {  // probabilities before normalization are at most 1
    factors[SCALE_S * FACTOR_STRIDE] = LARGEST;
    factors[DESCALE_S * FACTOR_STRIDE] = 1.0f / LARGEST;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) window_fp8(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v, CACHE,
    const int* __restrict__ table, const float* __restrict__ factors, unsigned char* __restrict__ query8,
    unsigned char* __restrict__ window_k, unsigned char* __restrict__ window_v, int slots, int units) {
  const bool query = blockIdx.y == gridDim.y - 1;
  const Pane pane = pane_of(blockIdx.y, gridDim.y, q, k, v, CACHE_PASSED, table, slots, units);
  const float scale = factors[(query ? TO_Q : blockIdx.y % 2 ? TO_V : TO_K) * FACTOR_STRIDE];
  unsigned char* base = query ? query8 : blockIdx.y % 2 ? window_v : window_k;
  uint4* to = reinterpret_cast<uint4*>(base) + (query ? 0 : (size_t)(blockIdx.y / 2) * units);
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (unit >= units) return;
#if CACHE_NVFP4
  if (pane.packed) {
    const uint2 codes = reinterpret_cast<const uint2*>(pane.values)[unit];
    const float factor = pane.amax / (LIMIT_E2M1 * LIMIT_E4M3) * scale;
    to[unit] = e4m3_from_codes(codes, float_from_e4m3(pane.scales[unit]) * factor);
    return;
  }
#endif
  float x[16];
  load16(pane.plain + (size_t)unit * 16, x);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= scale;
  to[unit] = make_uint4(e4m3_quad(x[0], x[1], x[2], x[3]), e4m3_quad(x[4], x[5], x[6], x[7]),
                        e4m3_quad(x[8], x[9], x[10], x[11]), e4m3_quad(x[12], x[13], x[14], x[15]));
}

// The parts' outputs as one: each weighs exp(its log-sum-exp). out8 [parts, L,H,D], stats [parts, H,L] (natural
// logarithms, see STATS_TO_LOG2). With a single part the statistics are not read.
extern "C" __global__ void __launch_bounds__(THREADS) widen_out(
    const unsigned char* __restrict__ out8, const float* __restrict__ stats, const float* __restrict__ factors,
    compute_t* __restrict__ out, int units, int parts, int tokens, int heads) {
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (unit >= units) return;
  const int rows = tokens * heads, row = unit / (units / rows);
  const float* logs = stats + (row % heads) * tokens + row / heads;
  float top = 0.0f, total = 1.0f;
  if (parts > 1) {
    top = logs[0], total = 0.0f;
    for (int part = 1; part < parts; ++part) top = fmaxf(top, logs[(size_t)part * rows]);
  }
  float sum[16] = {};
  for (int part = 0; part < parts; ++part) {
    float weight = 1.0f;
    if (parts > 1) {
      weight = exp2f((logs[(size_t)part * rows] - top) * STATS_TO_LOG2);
      total += weight;
    }
    const uint4 w = reinterpret_cast<const uint4*>(out8)[(size_t)part * units + unit];
    const unsigned int words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i] += weight * float_from_e4m3(words[i / 4] >> (8 * (i % 4)) & 0xffu);
  }
  const float factor = factors[DESCALE_O * FACTOR_STRIDE] / total;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i] *= factor;
  store16(out + (size_t)unit * 16, sum);
}
