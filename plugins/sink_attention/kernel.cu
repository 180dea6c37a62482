// Attention of one block's queries over the cache slots listed in table [W]; entry -1 is the block's own fresh k, v.
// q, k, v, out [L,H,D]; values [S,2,L,H,D/2], scales [S,2,L,H,D/16], amax [S,2] or cache [S,2,L,H,D].
// Grid: (ceil(L / (WARPS * QUERIES)), H). A warp owns QUERIES queries; a lane scores one of the tile's 32 keys, then
// sums up every 32nd column of the output. Online softmax in fp32. An entry past the last slot is passed over.
#if CACHE_NVFP4
#include "codec.cuh"
#endif
#include "memory.cuh"

#define KEYS 32
#define UNITS (HEAD_DIM / 16)
#define COLUMNS ((HEAD_DIM + 31) / 32)

struct Source {  // where one table entry's keys and values lie
  const compute_t *k, *v;
#if CACHE_NVFP4
  const unsigned char *values, *scales;
  float k_factor, v_factor;
#endif
  bool packed;
};

// Unit `unit` (16 elements) of row token * heads + head, K (pane 0) or V (pane 1).
__device__ __forceinline__ void load_unit(const Source& source, int pane, size_t unit, size_t units, float (&x)[16]) {
#if CACHE_NVFP4
  if (source.packed) {
    const size_t place = pane * units + unit;
    const uint2 codes = reinterpret_cast<const uint2*>(source.values)[place];
    // scale * amax / (M2 * M3) first: one rounding away from the reference's order, and one multiplication an element
    const float scale = float_from_e4m3(source.scales[place]) * (pane ? source.v_factor : source.k_factor);
    unpack16(codes.x, codes.y, x);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= scale;
    return;
  }
#endif
  load16((pane ? source.v : source.k) + unit * 16, x);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) sink_attention(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v,
#if CACHE_NVFP4
    const unsigned char* __restrict__ values, const unsigned char* __restrict__ scales,
    const float* __restrict__ amax,
#else
    const compute_t* __restrict__ cache,
#endif
    const int* __restrict__ table, compute_t* __restrict__ out, int table_len, int slots, int tokens, int heads) {
  // A row of 4 spare floats keeps 16-byte reads of eight neighbouring keys on distinct banks.
  __shared__ __align__(16) float k_tile[KEYS][HEAD_DIM + 4];
  __shared__ __align__(16) float v_tile[KEYS][HEAD_DIM];
  __shared__ __align__(16) float q_tile[WARPS * QUERIES][HEAD_DIM];
  __shared__ __align__(16) float p_tile[WARPS * QUERIES][KEYS];

  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * QUERIES;
  const int head = blockIdx.y, first_query = blockIdx.x * WARPS * QUERIES;
  const size_t units = (size_t)tokens * heads * UNITS;

  // log2(e) / sqrt(D) goes into q, so that the softmax can use exp2.
  const float to_logits = 1.4426950408889634f / sqrtf((float)HEAD_DIM);
  for (int i = threadIdx.x; i < WARPS * QUERIES * UNITS; i += WARPS * 32) {
    const int row = i / UNITS, unit = i % UNITS, token = first_query + row;
    float x[16] = {};
    if (token < tokens) load16(q + ((size_t)(token * heads + head) * UNITS + unit) * 16, x);
#pragma unroll
    for (int j = 0; j < 16; ++j) x[j] *= to_logits;
    store16(&q_tile[row][unit * 16], x);
  }

  const float minus_infinity = __uint_as_float(0xff800000u);
  float top[QUERIES], total[QUERIES], sum[QUERIES][COLUMNS];
#pragma unroll
  for (int i = 0; i < QUERIES; ++i) {
    top[i] = minus_infinity, total[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sum[i][c] = 0.0f;
  }

  for (int entry = 0; entry < table_len; ++entry) {
    const int slot = table[entry];
    if (slot >= slots) continue;
    Source source = {};
    source.k = k, source.v = v;
    if (slot >= 0) {
#if CACHE_NVFP4
      source.packed = true;
      source.values = values + (size_t)slot * 2 * units * 8;
      source.scales = scales + (size_t)slot * 2 * units;
      source.k_factor = amax[slot * 2] / (LIMIT_E2M1 * LIMIT_E4M3);
      source.v_factor = amax[slot * 2 + 1] / (LIMIT_E2M1 * LIMIT_E4M3);
#else
      source.k = cache + (size_t)slot * 2 * units * 16;
      source.v = source.k + units * 16;
#endif
    }

    for (int first_key = 0; first_key < tokens; first_key += KEYS) {
      __syncthreads();  // everybody is done with the previous tile
      for (int i = threadIdx.x; i < 2 * KEYS * UNITS; i += WARPS * 32) {
        const int unit = i % UNITS, key = i / UNITS % KEYS, pane = i / (UNITS * KEYS), token = first_key + key;
        float x[16] = {};
        if (token < tokens) load_unit(source, pane, (size_t)(token * heads + head) * UNITS + unit, units, x);
        store16(pane ? &v_tile[key][unit * 16] : &k_tile[key][unit * 16], x);
      }
      __syncthreads();

      float score[QUERIES] = {};
#pragma unroll 4
      for (int d = 0; d < HEAD_DIM; d += 4) {
        const float4 key = *reinterpret_cast<const float4*>(&k_tile[lane][d]);
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
          const float4 query = *reinterpret_cast<const float4*>(&q_tile[mine + i][d]);
          score[i] += query.x * key.x + query.y * key.y + query.z * key.z + query.w * key.w;
        }
      }

#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (first_key + lane >= tokens) score[i] = minus_infinity;
        const float higher = fmaxf(top[i], warp_max(score[i]));
        const float shrink = exp2f(top[i] - higher), p = exp2f(score[i] - higher);
        total[i] = total[i] * shrink + warp_sum(p);
        top[i] = higher;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sum[i][c] *= shrink;
        p_tile[mine + i][lane] = p;
      }
      __syncwarp();  // a warp reads only the rows of p_tile that it wrote

#pragma unroll 2
      for (int key = 0; key < KEYS; key += 4) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int column = lane + 32 * c;
          if (column >= HEAD_DIM) continue;
          const float v0 = v_tile[key][column], v1 = v_tile[key + 1][column];
          const float v2 = v_tile[key + 2][column], v3 = v_tile[key + 3][column];
#pragma unroll
          for (int i = 0; i < QUERIES; ++i) {
            const float4 p = *reinterpret_cast<const float4*>(&p_tile[mine + i][key]);
            sum[i][c] += p.x * v0 + p.y * v1 + p.z * v2 + p.w * v3;
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < QUERIES; ++i) {
    const int token = first_query + mine + i;
    const float inverse = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = lane + 32 * c;
      if (token >= tokens || column >= HEAD_DIM) continue;
      store1(out + (size_t)(token * heads + head) * HEAD_DIM + column, sum[i][c] * inverse);
    }
  }
}
