// y = [cache, x], where NORM with x normalised over its channels, scaled by gamma and put through SiLU; the last PAST
// frames of y are written over the cache. x [frames,P,C], cache [PAST,P,C], y [PAST+frames,P,C]; gridDim.y: frames.
// LANES threads of a warp hold one position's channels in registers, UNITS x 8 each; they do ROWS positions at once, so
// that several loads are under way. Who writes a place of the cache has read it before: no other thread touches it. x may
// lie where y's frames begin that it becomes: each thread holds what it reads of x in registers before it writes anything,
// and no other thread reads the same.
// CODES: cache and y are 8-bit codes of the numbers times factor[0]; x is not, so it may lie nowhere in y.
#include "memory.cuh"

#ifndef CODES
#define CODES 0
#endif
#if CODES
#include "codes.cuh"
typedef unsigned char stored_t;
typedef uint2 Eight;  // eight elements as they are stored
__device__ __forceinline__ Eight fetch8(const stored_t* p) { return *reinterpret_cast<const uint2*>(p); }
__device__ __forceinline__ void put8(stored_t* p, const Eight& x) { *reinterpret_cast<uint2*>(p) = x; }
#else
typedef compute_t stored_t;
struct Eight {
  float x[8];
};
__device__ __forceinline__ Eight fetch8(const stored_t* p) {
  Eight e;
  load8(p, e.x);
  return e;
}
__device__ __forceinline__ void put8(stored_t* p, const Eight& e) { store8(p, e.x); }
#endif

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS) stream_extend(
    const compute_t* x,
#if NORM
    const compute_t* __restrict__ gamma,
#endif
#if CODES
    const float* __restrict__ factor,
#endif
    stored_t* cache, stored_t* y, int frames, int positions) {
  constexpr int GROUPS = THREADS / LANES;
  const int lane = (int)threadIdx.x % LANES, group = (int)threadIdx.x / LANES, frame = blockIdx.y;
  const size_t pane = (size_t)positions * CHANNELS;

  float held[ROWS][UNITS][8];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int position = (blockIdx.x * ROWS + r) * GROUPS + group;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int channel = (u * LANES + lane) * 8;
      if (position < positions && channel < CHANNELS) {
        load8(x + frame * pane + (size_t)position * CHANNELS + channel, held[r][u]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) held[r][u][i] = 0.0f;
      }
    }
  }

#if NORM
  float scale[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float squares = 0.0f;
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += held[r][u][i] * held[r][u][i];
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
    scale[r] = __fdiv_rn(1.0f, __fsqrt_rn(squares / (float)CHANNELS + EPS));
  }
#endif

#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int channel = (u * LANES + lane) * 8;
    if (channel >= CHANNELS) continue;
#if NORM
    float weight[8];
    load8(gamma + channel, weight);
#endif
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int position = (blockIdx.x * ROWS + r) * GROUPS + group;
      if (position >= positions) continue;
      float(&out)[8] = held[r][u];
#if NORM
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = silu(out[i] * scale[r] * weight[i]);
#endif
#if CODES
      const Eight made = codes8(out, factor[0]);
#else
      Eight made;
#pragma unroll
      for (int i = 0; i < 8; ++i) made.x[i] = out[i];
#endif
      const size_t place = (size_t)position * CHANNELS + channel;
      put8(y + (PAST + frame) * pane + place, made);
      const int kept = frame - (frames - PAST);  // the frame of the cache that this one becomes
      if (kept < 0) continue;
      if (frames >= PAST) {
        put8(y + kept * pane + place, fetch8(cache + kept * pane + place));
      } else {  // one frame only, so this thread moves the older ones up too
#pragma unroll
        for (int f = 0; f < PAST; ++f) {
          const Eight old = fetch8(cache + f * pane + place);
          put8(y + f * pane + place, old);
          if (f > 0) put8(cache + (f - 1) * pane + place, old);
        }
      }
      put8(cache + kept * pane + place, made);
    }
  }
}
