// Attention of a chunk's queries over the slots listed in table [W], each as long as lengths [S] says; -1 is the fresh k, v.
// q, k, v, out [T,P,H,D]; keys, values [S,L,H,D]. Grid: (ceil(T P / (WARPS * QUERIES)), H). A warp owns QUERIES queries; a
// lane scores one of the tile's 32 keys, then sums up every 32nd column of the output. Online softmax in fp32.
#include "memory.cuh"

__device__ __forceinline__ float load1(const unsigned short* p) { return float_from_bf16(*p); }
__device__ __forceinline__ float load1(const float* p) { return *p; }

#define KEYS 32
#define COLUMNS ((HEAD_DIM + 31) / 32)

extern "C" __global__ void __launch_bounds__(WARPS * 32) frame_attention(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v,
    const compute_t* __restrict__ keys, const compute_t* __restrict__ values, const int* __restrict__ lengths,
    const int* __restrict__ table, compute_t* __restrict__ out, int table_len, int slots, int room, int tokens, int heads) {
  __shared__ __align__(16) float k_tile[KEYS][HEAD_DIM + 4];
  __shared__ __align__(16) float v_tile[KEYS][HEAD_DIM];
  __shared__ __align__(16) float q_tile[WARPS * QUERIES][HEAD_DIM];
  __shared__ __align__(16) float p_tile[WARPS * QUERIES][KEYS];
  const int lane = (int)threadIdx.x % 32, mine = (int)threadIdx.x / 32 * QUERIES;
  const int head = (int)blockIdx.y, first_query = (int)blockIdx.x * WARPS * QUERIES;

  // log2(e) / sqrt(D) goes into q, so that the softmax can use exp2.
  const float to_logits = 1.4426950408889634f / sqrtf((float)HEAD_DIM);
  for (int i = (int)threadIdx.x; i < WARPS * QUERIES * HEAD_DIM; i += WARPS * 32) {
    const int row = i / HEAD_DIM, d = i % HEAD_DIM, token = first_query + row;
    q_tile[row][d] = token < tokens ? load1(q + ((size_t)token * heads + head) * HEAD_DIM + d) * to_logits : 0.0f;
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
    const size_t skipped = slot < 0 ? 0 : (size_t)slot * room * heads * HEAD_DIM;
    const compute_t *from_k = slot < 0 ? k : keys + skipped, *from_v = slot < 0 ? v : values + skipped;
    const int count = slot < 0 ? tokens : min(lengths[slot], room);
    for (int first_key = 0; first_key < count; first_key += KEYS) {
      __syncthreads();  // everybody is done with the previous tile
      for (int i = (int)threadIdx.x; i < KEYS * HEAD_DIM; i += WARPS * 32) {
        const int key = i / HEAD_DIM, d = i % HEAD_DIM, token = first_key + key;
        const size_t at = ((size_t)token * heads + head) * HEAD_DIM + d;
        k_tile[key][d] = token < count ? load1(from_k + at) : 0.0f;
        v_tile[key][d] = token < count ? load1(from_v + at) : 0.0f;
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
        if (first_key + lane >= count) score[i] = minus_infinity;
        const float higher = fmaxf(top[i], warp_max(score[i]));
        const float shrink = exp2f(top[i] - higher), p = exp2f(score[i] - higher);
        total[i] = total[i] * shrink + warp_sum(p);
        top[i] = higher;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sum[i][c] *= shrink;
        p_tile[mine + i][lane] = p;
      }
      __syncwarp();  // a warp reads only the rows of p_tile that it wrote
#pragma unroll 4
      for (int key = 0; key < KEYS; ++key) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int column = lane + 32 * c;
          if (column >= HEAD_DIM) continue;
          const float value = v_tile[key][column];
#pragma unroll
          for (int i = 0; i < QUERIES; ++i) sum[i][c] += p_tile[mine + i][key] * value;
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
      store1(out + ((size_t)token * heads + head) * HEAD_DIM + column, sum[i][c] * inverse);
    }
  }
}
