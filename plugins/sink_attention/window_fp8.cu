// Queries, and the keys and values that `table` lists, as E4M3 tiles with one scale each: what hopper_fp8.cu reads.
// q, k, v [L,H,D]; values [S,2,L,H,D/2], scales [S,2,L,H,D/16], amax [S,2] or cache [S,2,L,H,D]; table [W].
// A unit is 16 elements. Panes: 2 * entry, plus 1 for V, and the queries last, 2 * W + 1 in all.
// partial [panes, window_amax's gridDim.x].
#include "factors.cuh"
#include "levels.cuh"
#include "reduce.cuh"

#define LARGEST 448.0f
#define SMALLEST 1e-15f  // magnitude that counts: of smaller ones, the scales' products would leave fp32

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

// A unit of a pane as E4M3 of x * scale.
__device__ __forceinline__ uint4 e4m3_unit(const Pane& pane, size_t unit, float scale) {
#if CACHE_NVFP4
  if (pane.packed) {
    const uint2 codes = reinterpret_cast<const uint2*>(pane.values)[unit];
    const float factor = pane.amax / (LIMIT_E2M1 * LIMIT_E4M3) * scale;
    return e4m3_from_codes(codes, float_from_e4m3(pane.scales[unit]) * factor);
  }
#endif
  float x[16];
  load16(pane.plain + unit * 16, x);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= scale;
  unsigned int words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = e4m3_quad_fast(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  return make_uint4(words[0], words[1], words[2], words[3]);
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
// kept: null, or of a workspace that nobody else writes: [0] the `version` of what its tiles were made of, [1] and [2] whether
// those of keys and of values that come from slots still stand. Scales are powers of two then: a pass's fresh block seldom
// changes them.
extern "C" __global__ void __launch_bounds__(THREADS) window_factors(
    const float* __restrict__ partial, float* __restrict__ factors, int* __restrict__ kept,
    const int* __restrict__ version, int panes, int partials) {
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
    float whole = found > SMALLEST ? found : 1.0f;
    if (threadIdx.x == 0) {
      if (kept && j) {
        int exponent;
        whole = frexpf(whole, &exponent) == 0.5f ? whole : ldexpf(1.0f, exponent);
        kept[j] = kept[0] == *version && factors[(TO_Q + j) * FACTOR_STRIDE] == LARGEST / whole;
      }
      factors[(DESCALE_Q + j) * FACTOR_STRIDE] = whole / LARGEST;
      factors[(TO_Q + j) * FACTOR_STRIDE] = LARGEST / whole;
    }
  }
  if (kept && threadIdx.x == 0) kept[0] = *version;
}

// Tiles of TILE_ROWS rows of one head, as hopper_fp8.cu copies and multiplies them: [head, tile, ...].
// Keys and queries: rows of HEAD_DIM bytes. Values: transposed, rows of TILE_ROWS keys, which stand in the order in which the
// first product leaves its scores in registers. A row's 16-byte chunks are swizzled (see tile_at). What lies past the last row is
// zero. Grid: (tiles of the window * heads, 3 for K, V, queries).
#define TILE_ROWS 128
#define CHUNKS (HEAD_DIM / 16)

__device__ __forceinline__ int swizzled(int chunk, int row) { return chunk ^ (CHUNKS == 8 ? row % 8 : row / 2 % 4); }

// Byte i of a, b, c, d as word i.
__device__ __forceinline__ void transpose4(unsigned int a, unsigned int b, unsigned int c, unsigned int d,
                                           unsigned int (&words)[4]) {
  const unsigned int low_ab = __byte_perm(a, b, 0x5140), high_ab = __byte_perm(a, b, 0x7362);
  const unsigned int low_cd = __byte_perm(c, d, 0x5140), high_cd = __byte_perm(c, d, 0x7362);
  words[0] = __byte_perm(low_ab, low_cd, 0x5410), words[1] = __byte_perm(low_ab, low_cd, 0x7632);
  words[2] = __byte_perm(high_ab, high_cd, 0x5410), words[3] = __byte_perm(high_ab, high_cd, 0x7632);
}

extern "C" __global__ void __launch_bounds__(THREADS) window_tiles(
    const compute_t* __restrict__ q, const compute_t* __restrict__ k, const compute_t* __restrict__ v, CACHE,
    const int* __restrict__ table, const float* __restrict__ factors, const int* __restrict__ kept,
    unsigned char* __restrict__ query8, unsigned char* __restrict__ window_k, unsigned char* __restrict__ window_v, int slots, int entries, int tokens,
    int heads) {
  __shared__ __align__(16) unsigned int turned[HEAD_DIM * TILE_ROWS / 4];
  const int head = blockIdx.x % heads, tile = blockIdx.x / heads, pane = blockIdx.y;
  const int rows = pane == 2 ? tokens : entries * tokens, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  if (tile >= tiles) return;
  if (kept && pane != 2 && kept[1 + pane]) {
    bool stands = true;  // of slots alone: a fresh block is another one in every pass
    for (int e = tile * TILE_ROWS / tokens; e <= (min((tile + 1) * TILE_ROWS, rows) - 1) / tokens; ++e)
      stands = stands && table[e] >= 0;
    if (stands) return;
  }
  const float scale = factors[(pane == 2 ? TO_Q : pane == 1 ? TO_V : TO_K) * FACTOR_STRIDE];
  unsigned char* base = pane == 2 ? query8 : pane == 1 ? window_v : window_k;
  const int features = pane == 1 ? HEAD_DIM + SUM_ROWS : HEAD_DIM;
  uint4* to = reinterpret_cast<uint4*>(base) + ((size_t)head * tiles + tile) * TILE_ROWS / 16 * features;

  const auto source_of = [&](int entry) {
    const int y = pane == 2 ? 2 * entries : 2 * entry + pane;
    return pane_of(y, 2 * entries + 1, q, k, v, CACHE_PASSED, table, slots, tokens * heads * CHUNKS);
  };
  const int entry = tile * TILE_ROWS / tokens;  // of the tile's first row; others may begin within the tile
  const Pane source = source_of(entry);
  const auto unit_of = [&](int row_in_tile, int chunk) {
    const int row = tile * TILE_ROWS + row_in_tile, token = row - entry * tokens;
    if (row >= rows) return make_uint4(0u, 0u, 0u, 0u);
    if (token < tokens) return e4m3_unit(source, (size_t)(token * heads + head) * CHUNKS + chunk, scale);
    return e4m3_unit(source_of(row / tokens), (size_t)(row % tokens * heads + head) * CHUNKS + chunk, scale);
  };

  if (pane != 1) {
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      to[row * CHUNKS + swizzled(chunk, row)] = unit_of(row, chunk);
    }
    return;
  }
  // A warp takes 16 features; a lane takes the four keys whose codes make up word `lane` of each row.
  const int lane = threadIdx.x % 32, first = lane / 8 * 32 + lane / 4 % 2 * 16 + lane % 4 * 2;
  for (int chunk = threadIdx.x / 32; chunk < CHUNKS; chunk += THREADS / 32) {
    const uint4 a = unit_of(first, chunk), b = unit_of(first + 1, chunk), c = unit_of(first + 8, chunk),
                d = unit_of(first + 9, chunk);
    const unsigned int from[4][4] = {
        {a.x, b.x, c.x, d.x}, {a.y, b.y, c.y, d.y}, {a.z, b.z, c.z, d.z}, {a.w, b.w, c.w, d.w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned int words[4];
      transpose4(from[i][0], from[i][1], from[i][2], from[i][3], words);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int feature = 16 * chunk + 4 * i + j;
        turned[feature * 32 + (lane / 4 ^ feature % 8) * 4 + lane % 4] = words[j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += THREADS) to[i] = reinterpret_cast<const uint4*>(turned)[i];
  for (int i = threadIdx.x; i < TILE_ROWS / 16 * SUM_ROWS; i += THREADS) {  // a row of ones, the others zeros
    const unsigned int ones = i < TILE_ROWS / 16 ? 0x38383838u : 0u;
    to[TILE_ROWS * CHUNKS + i] = make_uint4(ones, ones, ones, ones);
  }
}
