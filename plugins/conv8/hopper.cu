// Convolution of a channels-last video of 8-bit codes on Hopper (sm_90a): shifted matrix products, summed in registers.
//
// x [T + p.kt - 1, Y, X, C] codes, weight [N, p.kt, SIDE, SIDE, C] codes, out [T, Y, X, N] bf16 = sum * scale[n] + bias[n]
// (+ residual). The frame is padded by zeros, which the copies fill in; time is not. C is a multiple of 16, N of 8.
// SIDE 2: out [T, 2Y, 2X, N]. Position (2y + py, 2x + px) is the convolution of rows y - 1 + py and y + py, columns alike, with
// set 2 py + px of four sets of weights and scales: weight [4, N, 1, 2, 2, C], scale [4, N]. A tile is of one set.
//
// A thread block owns BX x BY positions of a frame and BN channels. One warp copies; two groups of four warps multiply, MB
// blocks of 64 positions (8 x 8) each. Blocks stay and take tile after tile, those of neighbouring frames one after another,
// so that what they read is in the L2 cache still.
// HALO: shared memory holds the positions with their border for 128 channels once, and the SIDE * SIDE shifts are only other
// first rows of the same memory, because its swizzle depends on nothing but the address. Otherwise each shift in x is a copy
// of its own, and only shifts in y are other first rows, then multiples of eight.
// PROMOTE: sums of E4M3 products, which the tensor cores keep in about 14 bits, go to fp32 registers after 128 channels of so
// many shifts. WHOLE: codes and sums are whole numbers, and exact. CUT: N is no multiple of BN. AHEAD: the residual is fetched
// into the L2 cache while the products run.
// What lies beyond C in the last 128 channels is zero in x, so what the weights hold there (the next shift's) adds nothing.
#include "products8.cuh"

struct Conv {
  const unsigned short* bias;      // bf16 [N]
  const float* scale;              // [N], or [4, N]
  const unsigned short* residual;  // bf16 [T,Y,X,N], or null
  unsigned short* out;             // bf16 [T,Y,X,N]
  int t, y, x, c, n, kt;           // t: frames that come out
  int tiles_x, tiles_n, tiles;     // tiles_n: of all sets
};

#if WHOLE
typedef int sum_t;
#else
typedef float sum_t;
#endif

constexpr int PITCH = HALO ? BX + SIDE - 1 : BX, ROWS = PITCH * (BY + SIDE - 1);
constexpr int A_BYTES = ROWS * 128, A_STAGE = (A_BYTES + 1023) / 1024 * 1024, B_STAGE = BN * 128;
constexpr int COPIES = HALO ? 1 : SIDE, SHIFTS = SIDE * SIDE / COPIES;  // copies of positions; shifts that each serves
constexpr int MB = BX * BY / 128, NR = BN / 2, BLOCKS_X = BX / 8;
constexpr int UP = SIDE == 2 ? 2 : 1;  // positions that come out for one that goes in, in both directions
#if PROMOTE
static_assert(SHIFTS % PROMOTE == 0, "sums go to fp32 after the last shift");
#endif
static_assert(A_STAGES * A_STAGE + B_STAGES * B_STAGE + 16 * (A_STAGES + B_STAGES) <= 232448, "shared memory");

// Words of four neighbouring lanes change places: lane i's word j becomes lane j's word i.
__device__ __forceinline__ void transpose4(unsigned int (&w)[4], int q) {
  const bool odd = q & 1, high = q & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned int got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) w[i] = got;
    else w[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned int got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
    if (high) w[i] = got;
    else w[i + 2] = got;
  }
}

struct Place {  // of a tile; set: of weights
  int n0, t, x0, y0, set;
};
__device__ __forceinline__ Place place_of(const Conv& p, int tile) {
  const int m = tile / p.tiles_n, xy = m / p.t, n = tile % p.tiles_n, each = p.tiles_n / (UP * UP);
  return {n % each * BN, m % p.t, xy % p.tiles_x * BX, xy / p.tiles_x * BY, n / each};
}

// Where the channels of a position of the small frame, or of the only one, lie in what comes out.
__device__ __forceinline__ size_t row_of(const Conv& p, const Place& at, int y, int x) {
  const int py = UP == 2 ? at.set / 2 : 0, px = UP == 2 ? at.set % 2 : 0;
  return (((size_t)at.t * p.y * UP + y * UP + py) * p.x * UP + x * UP + px) * p.n;
}

// A ring of stages in shared memory: which one is next, and the parity that its barrier is waited for with.
template <int COUNT> struct Ring {
  int stage = 0, parity;
  __device__ __forceinline__ void step() {
    if (++stage == COUNT) stage = 0, parity ^= 1;
  }
};

struct Stages {
  unsigned char *a, *b;
  barrier_t *a_full, *a_free, *b_full, *b_free;
};

__device__ __forceinline__ void copy_tiles(const Stages& s, const Map& map_x, const Map& map_w, const Conv& p) {
  Ring<A_STAGES> a{0, 1};
  Ring<B_STAGES> b{0, 1};
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const Place at = place_of(p, tile);
    const int x0 = at.x0 - SIDE / 2 + (UP == 2 ? at.set % 2 : 0), y0 = at.y0 - SIDE / 2 + (UP == 2 ? at.set / 2 : 0);
    const int row = (UP == 2 ? at.set * p.n : 0) + at.n0;
    for (int dt = 0; dt < p.kt; ++dt)
      for (int c = 0; c < p.c; c += 128)
        for (int copy = 0; copy < COPIES; ++copy) {
          barrier_wait(s.a_free + a.stage, a.parity);
          barrier_expect(s.a_full + a.stage, A_BYTES);
          copy_box(s.a + a.stage * A_STAGE, &map_x, c, x0 + copy, y0, at.t + dt, s.a_full + a.stage);
          a.step();
          for (int i = 0; i < SHIFTS; ++i) {
            const int shift = HALO ? i : i * SIDE + copy;
            barrier_wait(s.b_free + b.stage, b.parity);
            barrier_expect(s.b_full + b.stage, B_STAGE);
            copy_box(s.b + b.stage * B_STAGE, &map_w, (dt * SIDE * SIDE + shift) * p.c + c, row, s.b_full + b.stage);
            b.step();
          }
        }
  }
}

// Of shift `i` of those that a copy serves: how many bytes behind the block's first row its own lies.
__device__ __forceinline__ int bytes_of_shift(int i) { return (HALO ? i / SIDE * PITCH + i % SIDE : i * PITCH) * 128; }

// The four products of 128 channels.
__device__ __forceinline__ void multiply(sum_t (&sum)[NR], tile_t a, tile_t b, bool add) {
#pragma unroll
  for (int k = 0; k < 4; ++k) product(sum, tile_along(a, 32 * k), tile_along(b, 32 * k), k > 0 || add);
}

__device__ __forceinline__ void write_rows(const Conv& p, const Place& at, const sum_t (&sum)[NR], int block_x, int block_y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, q = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int y = at.y0 + block_y + 2 * warp + h, x = at.x0 + block_x + lane / 4;
    const bool inside = y < p.y && x < p.x;
    const size_t row = row_of(p, at, inside ? y : 0, inside ? x : 0);
    const float* const scale = p.scale + (UP == 2 ? at.set * p.n : 0);
#pragma unroll
    for (int g = 0; g < BN / 32; ++g) {
      const int mine = at.n0 + 32 * g + 8 * q;  // the eight channels that this lane loads and stores
      const bool there = inside && (!CUT || mine < p.n);
      unsigned int r[4] = {0u, 0u, 0u, 0u}, w[4];
      if (p.residual) {
        if (there) {
          const uint4 four = __ldcs(reinterpret_cast<const uint4*>(p.residual + row + mine));
          r[0] = four.x, r[1] = four.y, r[2] = four.z, r[3] = four.w;
        }
        transpose4(r, q);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = at.n0 + 32 * g + 8 * j + 2 * q;
        w[j] = 0u;
        if (CUT && column >= p.n) continue;
        const float2 s = __ldg(reinterpret_cast<const float2*>(scale + column));
        const unsigned int b = __ldg(reinterpret_cast<const unsigned int*>(p.bias + column));
        const float low = fmaf((float)sum[16 * g + 4 * j + 2 * h], s.x, __uint_as_float(b << 16));
        const float high = fmaf((float)sum[16 * g + 4 * j + 2 * h + 1], s.y, __uint_as_float(b & 0xffff0000u));
        w[j] = bf16x2(low + __uint_as_float(r[j] << 16), high + __uint_as_float(r[j] & 0xffff0000u));
      }
      transpose4(w, q);
      if (there) __stcs(reinterpret_cast<uint4*>(p.out + row + mine), make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// Ask for the rows of the residual that `write_rows` will read, 128 bytes at a time.
__device__ __forceinline__ void fetch_rows(const Conv& p, const Place& at, int block_x, int block_y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, channel = at.n0 + 64 * (lane % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int y = at.y0 + block_y + 2 * warp + h, x = at.x0 + block_x + lane / 4;
    if (y < p.y && x < p.x && lane % 4 < BN / 64 && channel < p.n)
      prefetch(p.residual + row_of(p, at, y, x) + channel);
  }
}

__device__ __forceinline__ void multiply_tiles(const Stages& s, const Conv& p, int group) {
  const int lane = threadIdx.x % 32;
  int block_x[MB], block_y[MB], base[MB];
#pragma unroll
  for (int m = 0; m < MB; ++m) {
    const int block = group * MB + m;
    block_x[m] = block % BLOCKS_X * 8, block_y[m] = block / BLOCKS_X * 8;
    base[m] = (block_y[m] * PITCH + block_x[m]) * 128;
  }
  const tile_t first_a = tile_of_groups(s.a, PITCH * 128), first_b = tile_of_groups(s.b, 1024);
  const int rounds = p.kt * ((p.c + 127) / 128) * COPIES;
  Ring<A_STAGES> a{0, 0};
  Ring<B_STAGES> b{0, 0};
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const Place at = place_of(p, tile);
    sum_t sum[MB][NR];
#pragma unroll
    for (int m = 0; m < MB; ++m) {
      if (AHEAD && p.residual) fetch_rows(p, at, block_x[m], block_y[m]);
#pragma unroll
      for (int i = 0; i < NR; ++i) sum[m][i] = 0;
    }
#if PROMOTE
    for (int round = 0; round < rounds; ++round) {
      barrier_wait(s.a_full + a.stage, a.parity);
      const tile_t tile_a = tile_along(first_a, a.stage * A_STAGE);
#pragma unroll
      for (int i = 0; i < SHIFTS; i += PROMOTE) {
        sum_t part[NR];
        int stages[PROMOTE];
#pragma unroll
        for (int j = 0; j < PROMOTE; ++j) {
          barrier_wait(s.b_full + b.stage, b.parity);
          stages[j] = b.stage;
          b.step();
        }
#pragma unroll
        for (int m = 0; m < MB; ++m) {
          products_fence();
#pragma unroll
          for (int j = 0; j < PROMOTE; ++j)
            multiply(part, tile_along(tile_a, base[m] + bytes_of_shift(i + j)), tile_along(first_b, stages[j] * B_STAGE), j > 0);
          products_commit();
          products_wait<0>();
          hold(part);
          if (m == MB - 1 && lane == 0) {
#pragma unroll
            for (int j = 0; j < PROMOTE; ++j) barrier_arrive(s.b_free + stages[j]);
            if (i + PROMOTE == SHIFTS) barrier_arrive(s.a_free + a.stage);
          }
#pragma unroll
          for (int r = 0; r < NR; ++r) sum[m][r] += part[r];
        }
      }
      a.step();
    }
#else
    int before_a = -1, before_b = -1;
    bool add = false;
    for (int round = 0; round < rounds; ++round) {
      barrier_wait(s.a_full + a.stage, a.parity);
      const tile_t tile_a = tile_along(first_a, a.stage * A_STAGE);
#pragma unroll
      for (int i = 0; i < SHIFTS; ++i) {
        barrier_wait(s.b_full + b.stage, b.parity);
#pragma unroll
        for (int m = 0; m < MB; ++m) hold(sum[m]);
        products_fence();
#pragma unroll
        for (int m = 0; m < MB; ++m)
          multiply(sum[m], tile_along(tile_a, base[m] + bytes_of_shift(i)), tile_along(first_b, b.stage * B_STAGE), add);
        products_commit();
        add = true;
        products_wait<1>();  // what the products before these have read may be written over
        if (lane == 0 && before_b >= 0) barrier_arrive(s.b_free + before_b);
        if (lane == 0 && before_a >= 0) barrier_arrive(s.a_free + before_a);
        before_b = b.stage, before_a = -1;
        b.step();
      }
      before_a = a.stage;
      a.step();
    }
    products_wait<0>();
#pragma unroll
    for (int m = 0; m < MB; ++m) hold(sum[m]);
    if (lane == 0) barrier_arrive(s.b_free + before_b), barrier_arrive(s.a_free + before_a);
#endif
#pragma unroll
    for (int m = 0; m < MB; ++m) write_rows(p, at, sum[m], block_x[m], block_y[m]);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) conv8(
    const __grid_constant__ Map map_x, const __grid_constant__ Map map_w, const __grid_constant__ Conv p) {
  Stages s;
  s.a = dynamic_shared(), s.b = s.a + A_STAGES * A_STAGE;
  s.a_full = reinterpret_cast<barrier_t*>(s.b + B_STAGES * B_STAGE), s.a_free = s.a_full + A_STAGES;
  s.b_full = s.a_free + A_STAGES, s.b_free = s.b_full + B_STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < A_STAGES; ++i) barrier_init(s.a_full + i, 1), barrier_init(s.a_free + i, 8);
    for (int i = 0; i < B_STAGES; ++i) barrier_init(s.b_full + i, 1), barrier_init(s.b_free + i, 8);
    barrier_init_done();
  }
  __syncthreads();
  const int group = same_in_warp((int)threadIdx.x / 128) - 1;
  if (group < 0) {
    registers_down<40>();
    if (threadIdx.x == 0) copy_tiles(s, map_x, map_w, p);
  } else {
    registers_up<232>();
    multiply_tiles(s, p, group);
  }
}
