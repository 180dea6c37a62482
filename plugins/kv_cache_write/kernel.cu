// Quantize one block's K and V into slot *write_slot of the cache, in place. Outside 0..slots-1 nothing is touched.
// k, v [L,H,D]; values [S,2,L,H,D/2], scales [S,2,L,H,D/16], amax [S,2] or cache [S,2,L,H,D]. Pane 0 is K, 1 is V.
// A unit is 16 elements along D; `units` counts those of K (as many as of V).
#if CACHE_NVFP4
#include "codec.cuh"
#include "reduce.cuh"
#endif
#include "memory.cuh"

#if CACHE_NVFP4

// First launch: the largest magnitude each of gridDim.x thread blocks sees, to partial[2][gridDim.x].
extern "C" __global__ void __launch_bounds__(THREADS) kv_cache_amax(
    const compute_t* __restrict__ k, const compute_t* __restrict__ v, const int* __restrict__ write_slot,
    float* __restrict__ partial, int slots, int units) {
  const int slot = *write_slot;
  if (slot < 0 || slot >= slots) return;
  const compute_t* x = blockIdx.y ? v : k;
  float largest = 0.0f;
  for (int unit = blockIdx.x * THREADS + threadIdx.x; unit < units; unit += gridDim.x * THREADS) {
    float values[16];
    load16(x + (size_t)unit * 16, values);
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(values[i]));
  }
  largest = block_max(largest);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = largest;
}

// Second launch: every thread block finishes the reduction for itself (partials <= THREADS), then packs its units. It goes from
// the last units to the first ones, of K and V in turn: what the first launch read last still lies in the L2 cache.
extern "C" __global__ void __launch_bounds__(THREADS) kv_cache_pack(
    const compute_t* __restrict__ k, const compute_t* __restrict__ v, const int* __restrict__ write_slot,
    const float* __restrict__ partial, unsigned char* __restrict__ values, unsigned char* __restrict__ scales,
    float* __restrict__ amax, int slots, int units, int partials) {
  const int slot = *write_slot;
  if (slot < 0 || slot >= slots) return;
  const int back = gridDim.x - 1 - blockIdx.x, which = back & 1, block = back >> 1;
  const int pane = slot * 2 + which;
  const float largest = block_max((int)threadIdx.x < partials ? partial[which * partials + threadIdx.x] : 0.0f);
  if (block == 0 && threadIdx.x == 0) amax[pane] = largest;
  const int unit = block * THREADS + threadIdx.x;
  if (unit >= units) return;
  float x[16];
  load16((which ? v : k) + (size_t)unit * 16, x);
  const Packed16 packed = pack16_mse(x, largest);
  const size_t place = (size_t)pane * units + unit;
  reinterpret_cast<uint2*>(values)[place] = make_uint2(packed.low, packed.high);
  scales[place] = (unsigned char)packed.scale;
}

#else

extern "C" __global__ void __launch_bounds__(THREADS) kv_cache_copy(
    const compute_t* __restrict__ k, const compute_t* __restrict__ v, const int* __restrict__ write_slot,
    compute_t* __restrict__ cache, int slots, int units) {
  const int slot = *write_slot;
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (slot < 0 || slot >= slots || unit >= units) return;
  float x[16];
  load16((blockIdx.y ? v : k) + (size_t)unit * 16, x);
  store16(cache + ((size_t)(slot * 2 + blockIdx.y) * units + unit) * 16, x);
}

#endif
