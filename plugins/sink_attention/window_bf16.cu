// Lay the keys and values that `table` lists out one after the other, as a library's attention reads them.
// k, v [L,H,D]; values [S,2,L,H,D/2], scales [S,2,L,H,D/16], amax [S,2] or cache [S,2,L,H,D]; table [W], -1 is k, v.
// window_k, window_v [W*L,H,D]. Grid: (pieces of a block, 2 * W); gridDim.y: 2 * entry, plus 1 for V.
// A piece is 8 elements, 16 bytes of output; a thread takes ITEMS of them, THREADS apart, so all accesses coalesce.
#if CACHE_NVFP4
#include "levels.cuh"
#endif
#include "memory.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) window_bf16(
    const compute_t* __restrict__ k, const compute_t* __restrict__ v,
#if CACHE_NVFP4
    const unsigned char* __restrict__ values, const unsigned char* __restrict__ scales,
    const float* __restrict__ amax,
#else
    const compute_t* __restrict__ cache,
#endif
    const int* __restrict__ table, compute_t* __restrict__ window_k, compute_t* __restrict__ window_v, int slots,
    int pieces) {
  const int pane = blockIdx.y % 2, entry = blockIdx.y / 2;
  const int slot = min(table[entry], slots - 1);  // a bad entry must not be read past the cache
  uint4* to = reinterpret_cast<uint4*>(pane ? window_v : window_k) + (size_t)entry * pieces;
  const int first = blockIdx.x * THREADS * ITEMS + threadIdx.x;
  const compute_t* from = pane ? v : k;
  if (slot >= 0) {
    const size_t place = (size_t)(slot * 2 + pane) * pieces;
#if CACHE_NVFP4
    const unsigned int* codes = reinterpret_cast<const unsigned int*>(values) + place;
    const unsigned char* scale = scales + place / 2;
    const float largest = amax[slot * 2 + pane];
    unsigned int code[ITEMS], step[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {  // all loads first, so that they are in flight together
      const int piece = first + i * THREADS;
      code[i] = piece < pieces ? codes[piece] : 0u;
      step[i] = piece < pieces ? scale[piece / 2] : 0u;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int piece = first + i * THREADS;
      if (piece < pieces) to[piece] = bf16_from_codes(code[i], float_from_e4m3(step[i]), largest);
    }
    return;
#else
    from = cache + place * 8;
#endif
  }
  const uint4* pieces_from = reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int piece = first + i * THREADS;
    if (piece < pieces) to[piece] = pieces_from[piece];
  }
}
