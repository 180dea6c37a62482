// FP8 attention for Hopper (sm_90a) whose sums are fp32: out = softmax(q k^T / sqrt(D)) v, E4M3 products.
// The tensor cores cut each product off at the last of a running sum's 14 bits, so a sum over thousands of keys stands still.
// Here a running sum spans KEYS keys; then it is added to one in fp32, in the multiplication that rescales that one anyway.
//
// query8, window_k, window_v: tiles, as window_fp8.cu's window_tiles writes them. factors: as window_fp8.cu's.
// out [L,H,D]. Grid: (ceil(L / QUERIES), H). Thread block: three groups of 128 threads. The first one copies tiles, one
// thread of it; the others attend with 64 queries each, and take turns: one multiplies while the other one exponentiates.
#include "factors.cuh"
#include "memory.cuh"
#include "minifloat.cuh"
#include "warpgroup.cuh"

#define QUERIES 128
#define KEYS 128
#define ROWS 64       // queries of a group
#define GROUP 128     // threads
#define STEP 32       // E4M3 numbers along which one product adds up
#define TILE (KEYS * HEAD_DIM)
#define TURNS 1       // first named barrier
#define LOG2_LARGEST 8.807354922057604f  // log2(448): the largest probability is E4M3's largest number

struct Barriers {
  barrier_t q_full, k_full[STAGES], k_free[STAGES], v_full[STAGES], v_free[STAGES];
};

struct Shared {
  unsigned char *q, *k, *v;
  Barriers* barriers;
};

__device__ __forceinline__ Shared shared_layout() {
  Shared shared;
  shared.q = dynamic_shared();
  shared.k = shared.q + QUERIES * HEAD_DIM;
  shared.v = shared.k + STAGES * TILE;
  shared.barriers = reinterpret_cast<Barriers*>(shared.v + STAGES * TILE);
  return shared;
}

// One thread: everything that is read, in the order in which it is needed.
__device__ __forceinline__ void copy_tiles(const Shared& shared, const unsigned char* q, const unsigned char* k,
                                           const unsigned char* v, int tiles) {
  Barriers& barriers = *shared.barriers;
  barrier_expect(&barriers.q_full, QUERIES * HEAD_DIM);
  copy_bulk(shared.q, q, QUERIES * HEAD_DIM, &barriers.q_full);
  int stage = 0, parity = 1;
  for (int tile = 0; tile < tiles; ++tile) {
    barrier_wait(&barriers.k_free[stage], parity);
    barrier_expect(&barriers.k_full[stage], TILE);
    copy_bulk(shared.k + stage * TILE, k + (size_t)tile * TILE, TILE, &barriers.k_full[stage]);
    barrier_wait(&barriers.v_free[stage], parity);
    barrier_expect(&barriers.v_full[stage], TILE);
    copy_bulk(shared.v + stage * TILE, v + (size_t)tile * TILE, TILE, &barriers.v_full[stage]);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
}

// scores [64, KEYS] = q k^T, begun.
__device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 2], tile_t q, const unsigned char* k) {
  const tile_t keys = tile_at<HEAD_DIM>(k);
  product<false>(scores, q, keys);
#pragma unroll
  for (int i = 1; i < HEAD_DIM / STEP; ++i) product<true>(scores, tile_along(q, i * STEP), tile_along(keys, i * STEP));
  products_commit();
}

// part [64, HEAD_DIM] = p v, begun. v is transposed: rows of KEYS.
__device__ __forceinline__ void begin_part(float (&part)[HEAD_DIM / 2], const unsigned int (&p)[KEYS / 8],
                                           const unsigned char* v) {
  const tile_t values = tile_at<KEYS>(v);
  product<false>(part, p, values);
#pragma unroll
  for (int i = 1; i < KEYS / STEP; ++i) product<true>(part, p + 4 * i, tile_along(values, i * STEP));
  products_commit();
}

// Online softmax of a thread's two rows: scores become probabilities (times 448), `shrink` is what earlier ones and their
// sums must be multiplied by. `total` is of this thread's columns only. scale > 0 takes scores to powers of two.
__device__ __forceinline__ void softmax(float (&scores)[KEYS / 2], float (&top)[2], float (&total)[2], float (&shrink)[2],
                                        float scale) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float high = top[row];
#pragma unroll
    for (int i = 2 * row; i < KEYS / 2; i += 4) high = fmaxf(high, fmaxf(scores[i], scores[i + 1]));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    shrink[row] = exp2_fast((top[row] - high) * scale);
    top[row] = high;
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float offset = LOG2_LARGEST - top[row] * scale;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 2 * row; i < KEYS / 2; i += 4) {
      scores[i] = exp2_fast(fmaf(scores[i], scale, offset));
      scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, offset));
      sum[0] += scores[i], sum[1] += scores[i + 1];
    }
    total[row] = fmaf(total[row], shrink[row], sum[0] + sum[1]);
  }
}

// Keys past the last one get no weight.
__device__ __forceinline__ void mask(float (&scores)[KEYS / 2], int keys) {
  const int first = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i)
    if (8 * (i / 4) + first + i % 2 >= keys) scores[i] = __uint_as_float(0xff800000u);
}

// Probabilities as the second product wants them. Within 32 keys it takes position 16 h + 4 t + i from thread t of four,
// who has keys 16 h + 8 (i / 2) + 2 t + i % 2; window_tiles lays the values out in that order, so nothing is exchanged.
__device__ __forceinline__ void to_e4m3(const float (&scores)[KEYS / 2], unsigned int (&p)[KEYS / 8]) {
#pragma unroll
  for (int i = 0; i < KEYS / 8; ++i) {
    const float* x = scores + 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * (i % 2);
    p[i] = e4m3_quad_fast(x[0], x[1], x[4], x[5]);
  }
}

__device__ __forceinline__ void attend(const Shared& shared, int group, const float* factors, compute_t* out, int keys,
                                       int tokens, int heads) {
  Barriers& barriers = *shared.barriers;
  const int lane = threadIdx.x % 32, tiles = (keys + KEYS - 1) / KEYS;
  const float scale = factors[DESCALE_Q * FACTOR_STRIDE] * factors[DESCALE_K * FACTOR_STRIDE] *
                      (1.4426950408889634f / sqrtf((float)HEAD_DIM));
  float scores[KEYS / 2], sum[HEAD_DIM / 2], part[HEAD_DIM / 2];
  float top[2], total[2] = {0.0f, 0.0f}, shrink[2];
  unsigned int p[KEYS / 8];
  top[0] = top[1] = __uint_as_float(0xff800000u);
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) sum[i] = 0.0f;

  const tile_t q = tile_at<HEAD_DIM>(shared.q + group * ROWS * HEAD_DIM);
  if (group == 1) meeting_arrive(TURNS, 2 * GROUP);  // the first group goes first
  barrier_wait(&barriers.q_full, 0);
  barrier_wait(&barriers.k_full[0], 0);
  products_fence();
  begin_scores(scores, q, shared.k);
  products_wait<0>();
  hold(scores);
  if (lane == 0) barrier_arrive(&barriers.k_free[0]);
  if (tiles == 1) mask(scores, keys);
  softmax(scores, top, total, shrink, scale);
  to_e4m3(scores, p);

  int stage = 0, parity = 0;  // of the values; the keys are one tile ahead
  for (int tile = 1; tile < tiles; ++tile) {
    const int next = stage + 1 == STAGES ? 0 : stage + 1, next_parity = next ? parity : parity ^ 1;
    const float before[2] = {shrink[0], shrink[1]};
    barrier_wait(&barriers.k_full[next], next_parity);
    meeting_sync(TURNS + group, 2 * GROUP);
    products_fence();
    begin_scores(scores, q, shared.k + next * TILE);
    barrier_wait(&barriers.v_full[stage], parity);
    begin_part(part, p, shared.v + stage * TILE);
    meeting_arrive(TURNS + 1 - group, 2 * GROUP);
    products_wait<1>();
    hold(scores);
    if (tile == tiles - 1) mask(scores, keys - tile * KEYS);
    softmax(scores, top, total, shrink, scale);
    // Never negative; asking makes ptxas finish the softmax before the wait, while `part` is still being added up.
    if (lane == 0 && !(total[0] < 0.0f) && !(total[1] < 0.0f)) barrier_arrive(&barriers.k_free[next]);
    products_wait<0>();
    hold(part);
    if (lane == 0) barrier_arrive(&barriers.v_free[stage]);
    to_e4m3(scores, p);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sum[i] = fmaf(sum[i], before[i / 2 % 2], part[i]);
    stage = next, parity = next_parity;
  }
  barrier_wait(&barriers.v_full[stage], parity);
  products_fence();
  begin_part(part, p, shared.v + stage * TILE);
  products_wait<0>();
  hold(part);

  const float value = factors[DESCALE_V * FACTOR_STRIDE];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] += __shfl_xor_sync(0xffffffffu, total[row], 1);
    total[row] += __shfl_xor_sync(0xffffffffu, total[row], 2);
    const int token = blockIdx.x * QUERIES + group * ROWS + threadIdx.x % GROUP / 32 * 16 + lane / 4 + 8 * row;
    const float factor = value / total[row];
    compute_t* to = out + ((size_t)token * heads + blockIdx.y) * HEAD_DIM + 2 * (lane % 4);
    if (token >= tokens) continue;
#pragma unroll
    for (int i = 2 * row; i < HEAD_DIM / 2; i += 4) {
      const float low = fmaf(sum[i], shrink[row], part[i]), high = fmaf(sum[i + 1], shrink[row], part[i + 1]);
      *reinterpret_cast<unsigned int*>(to + 8 * (i / 4)) = bf16_pair(low * factor, high * factor);
    }
  }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) attend_fp8(
    const unsigned char* __restrict__ query8, const unsigned char* __restrict__ window_k,
    const unsigned char* __restrict__ window_v, const float* __restrict__ factors, compute_t* __restrict__ out,
    int table_len, int tokens, int heads) {
  const Shared shared = shared_layout();
  const int keys = table_len * tokens, tiles = (keys + KEYS - 1) / KEYS;
  if (threadIdx.x == 0) {
    Barriers& barriers = *shared.barriers;
    barrier_init(&barriers.q_full, 1);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&barriers.k_full[i], 1), barrier_init(&barriers.v_full[i], 1);
      barrier_init(&barriers.k_free[i], 2 * GROUP / 32), barrier_init(&barriers.v_free[i], 2 * GROUP / 32);
    }
    barrier_init_done();
  }
  __syncthreads();
  const int group = (int)threadIdx.x / GROUP - 1;
  if (group < 0) {
    registers_down<24>();
    if (threadIdx.x == 0) {
      const size_t window = (size_t)blockIdx.y * tiles * TILE;
      copy_tiles(shared, query8 + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * QUERIES * HEAD_DIM,
                 window_k + window, window_v + window, tiles);
    }
  } else {
    registers_up<240>();
    attend(shared, group, factors, out, keys, tokens, heads);
  }
}
