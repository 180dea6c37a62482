// FP8 attention for Hopper (sm_90a) whose sums are fp32: out = softmax(q k^T / sqrt(D)) v, E4M3 products.
// The tensor cores cut each product off at the last of a running sum's 14 bits, so a sum over thousands of keys stands still.
// Here a running sum spans KEYS keys; then it is added to one in fp32, in the multiplication that rescales that one anyway.
//
// query8, window_k, window_v: tiles, as window_fp8.cu's window_tiles writes them. factors: as window_fp8.cu's.
// out [L,H,D]. Grid: (ceil(L / QUERIES), H). Thread block: three groups of 128 threads. The first one copies tiles, one
// thread of it; the others attend with 64 queries each: one multiplies while the other one exponentiates.
#include "factors.cuh"
#include "memory.cuh"
#include "minifloat.cuh"
#include "warpgroup.cuh"

#define QUERIES 128
#define KEYS 128
#define ROWS 64       // queries of a group
#define GROUP 128     // threads
#define STEP 32       // E4M3 numbers along which one product adds up
#define COLUMNS (HEAD_DIM + SUM_ROWS)  // of the second product: features, and the sum of the probabilities
#define TILE (KEYS * HEAD_DIM)
#define VALUE_TILE (KEYS * COLUMNS)
#define EARLY 32      // exponentials of a thread that run beside the second product, the others beside its sums
#define POLYNOMIAL_EACH 8  // one in so many exponentials is a polynomial
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
  shared.barriers = reinterpret_cast<Barriers*>(shared.v + STAGES * VALUE_TILE);
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
    barrier_expect(&barriers.v_full[stage], VALUE_TILE);
    copy_bulk(shared.v + stage * VALUE_TILE, v + (size_t)tile * VALUE_TILE, VALUE_TILE, &barriers.v_full[stage]);
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

// part [64, COLUMNS] = p v, begun. v is transposed: rows of KEYS.
__device__ __forceinline__ void begin_part(float (&part)[COLUMNS / 2], const unsigned int (&p)[KEYS / 8],
                                           const unsigned char* v) {
  const tile_t values = tile_at<KEYS>(v);
  product<false>(part, p, values);
#pragma unroll
  for (int i = 1; i < KEYS / STEP; ++i) product<true>(part, p + 4 * i, tile_along(values, i * STEP));
  products_commit();
}

// Two to the power of x, x at most 9, to 0.2 % (E4M3 keeps 6 %), by multiplications: exponentials are as scarce as products.
__device__ __forceinline__ float exp2_polynomial(float x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: a sum with it has the nearest whole number in its last bits
  x = fmaxf(x, -126.0f);
  const float whole = x + round, rest = x - (whole - round);
  const float power = fmaf(fmaf(0.23841f, rest, 0.70342f), rest, 1.00044f);
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(whole) << 23));
}

// The highest scores of a thread's two rows so far, and what earlier probabilities and sums must be multiplied by.
__device__ __forceinline__ void raise_top(const float (&scores)[KEYS / 2], float (&top)[2], float (&shrink)[2], float scale) {
  float high[4] = {top[0], top[1], top[0], top[1]};  // of row i % 2; two each, so that fewer comparisons wait for another
#pragma unroll
  for (int i = 0; i < KEYS / 2; i += 2) high[i / 2 % 4] = fmaxf(high[i / 2 % 4], fmaxf(scores[i], scores[i + 1]));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    high[row] = fmaxf(high[row], high[row + 2]);
    high[row] = fmaxf(high[row], __shfl_xor_sync(0xffffffffu, high[row], 1));
    high[row] = fmaxf(high[row], __shfl_xor_sync(0xffffffffu, high[row], 2));
    shrink[row] = exp2_fast((top[row] - high[row]) * scale);
    top[row] = high[row];
  }
}

// Scores FROM to TO become probabilities (times 448). scale > 0 takes scores to powers of two.
template <int FROM, int TO>
__device__ __forceinline__ void exponentiate(float (&scores)[KEYS / 2], const float (&top)[2], float scale) {
  const float offset[2] = {LOG2_LARGEST - top[0] * scale, LOG2_LARGEST - top[1] * scale};
#pragma unroll
  for (int i = FROM; i < TO; ++i) {
    const float power = fmaf(scores[i], scale, offset[i / 2 % 2]);
    scores[i] = i % POLYNOMIAL_EACH == POLYNOMIAL_EACH - 1 ? exp2_polynomial(power) : exp2_fast(power);
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

// Whether the last eight probabilities before EARLY are zeros, one of them negative: never, not even with NaNs. Asked so that ptxas
// finishes them first.
__device__ __forceinline__ bool negative_zeros(const float (&scores)[KEYS / 2]) {
  unsigned int any = 0u;
#pragma unroll
  for (int i = EARLY - 8; i < EARLY; ++i) any |= __float_as_uint(scores[i]);
  return any == 0x80000000u;
}

// What a group keeps from tile to tile. The values' stage and parity; the keys are one tile ahead.
struct Group {
  int tiles, stage, parity;
  tile_t q;
  float scale, sum[COLUMNS / 2], top[2], shrink[2];
};

// Scores of tile `tile` and the second product of the one before, whose probabilities are `p`; then those of the tile.
__device__ __forceinline__ void advance(Group& group, const Shared& shared, int tile, int keys,
                                        unsigned int (&p)[KEYS / 8]) {
  Barriers& barriers = *shared.barriers;
  const bool speaks = threadIdx.x % 32 == 0;
  const int stage = group.stage, next = stage + 1 == STAGES ? 0 : stage + 1;
  const int next_parity = next ? group.parity : group.parity ^ 1;
  const float before[2] = {group.shrink[0], group.shrink[1]};
  float scores[KEYS / 2], part[COLUMNS / 2];
  barrier_wait(&barriers.k_full[next], next_parity);
  products_fence();
  begin_scores(scores, group.q, shared.k + next * TILE);
  barrier_wait(&barriers.v_full[stage], group.parity);
  begin_part(part, p, shared.v + stage * VALUE_TILE);
  products_wait<1>();
  hold(scores);
  if (tile == group.tiles - 1) mask(scores, keys - tile * KEYS);
  raise_top(scores, group.top, group.shrink, group.scale);
  exponentiate<0, EARLY>(scores, group.top, group.scale);
  // The question makes ptxas put the wait behind these, which then run while `part` is being added up.
  if (speaks && !negative_zeros(scores)) barrier_arrive(&barriers.k_free[next]);
  products_wait<0>();
  hold(part), hold(scores);
  if (speaks) barrier_arrive(&barriers.v_free[stage]);
  exponentiate<EARLY, KEYS / 2>(scores, group.top, group.scale);
  to_e4m3(scores, p);
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) group.sum[i] = fmaf(group.sum[i], before[i / 2 % 2], part[i]);
  group.stage = next, group.parity = next_parity;
}

__device__ __forceinline__ void attend(const Shared& shared, int index, const float* factors, compute_t* out, int keys,
                                       int tokens, int heads) {
  Barriers& barriers = *shared.barriers;
  const int lane = threadIdx.x % 32;
  Group group = {(keys + KEYS - 1) / KEYS, 0, 0, tile_at<HEAD_DIM>(shared.q + index * ROWS * HEAD_DIM)};
  group.scale = factors[DESCALE_Q * FACTOR_STRIDE] * factors[DESCALE_K * FACTOR_STRIDE] *
                (1.4426950408889634f / sqrtf((float)HEAD_DIM));
  group.top[0] = group.top[1] = __uint_as_float(0xff800000u);
  float scores[KEYS / 2], part[COLUMNS / 2];
  unsigned int p[KEYS / 8];

  barrier_wait(&barriers.q_full, 0);
  barrier_wait(&barriers.k_full[0], 0);
  products_fence();
  begin_scores(scores, group.q, shared.k);
  products_wait<0>();
  hold(scores);
  if (lane == 0) barrier_arrive(&barriers.k_free[0]);
  if (group.tiles == 1) mask(scores, keys);
  raise_top(scores, group.top, group.shrink, group.scale);
  exponentiate<0, KEYS / 2>(scores, group.top, group.scale);
  to_e4m3(scores, p);

  for (int tile = 1; tile < group.tiles; ++tile) advance(group, shared, tile, keys, p);
  barrier_wait(&barriers.v_full[group.stage], group.parity);
  products_fence();
  begin_part(part, p, shared.v + group.stage * VALUE_TILE);
  products_wait<0>();
  hold(part);

  const float value = factors[DESCALE_V * FACTOR_STRIDE];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float shrink = group.shrink[row];
    // One thread of four has the column of the sums, the others have zeros.
    float total = fmaf(group.sum[HEAD_DIM / 2 + 2 * row], shrink, part[HEAD_DIM / 2 + 2 * row]);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int token = blockIdx.x * QUERIES + index * ROWS + threadIdx.x % GROUP / 32 * 16 + lane / 4 + 8 * row;
    const float factor = value / total;
    compute_t* to = out + ((size_t)token * heads + blockIdx.y) * HEAD_DIM + 2 * (lane % 4);
    if (token >= tokens) continue;
#pragma unroll
    for (int i = 2 * row; i < HEAD_DIM / 2; i += 4) {
      const float low = fmaf(group.sum[i], shrink, part[i]), high = fmaf(group.sum[i + 1], shrink, part[i + 1]);
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
  const int group = same_in_warp((int)threadIdx.x / GROUP) - 1;
  if (group < 0) {
    registers_down<24>();
    if (threadIdx.x == 0) {
      const size_t window = (size_t)blockIdx.y * tiles;
      copy_tiles(shared, query8 + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * QUERIES * HEAD_DIM,
                 window_k + window * TILE, window_v + window * VALUE_TILE, tiles);
    }
  } else {
    registers_up<240>();
    attend(shared, group, factors, out, keys, tokens, heads);
  }
}
