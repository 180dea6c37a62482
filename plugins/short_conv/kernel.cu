// Seven symmetric taps along time over [tail | k | zeros], a thread an element.
// k, out [T,P,C]; tail [3,P,C]; weight [C,4], the present frame's tap last. Sums run from the oldest frame on.
#include "memory.cuh"

__device__ __forceinline__ float load1(const unsigned short* p) { return float_from_bf16(*p); }
__device__ __forceinline__ float load1(const float* p) { return *p; }

extern "C" __global__ void __launch_bounds__(THREADS) short_conv(
    const compute_t* __restrict__ k, const compute_t* __restrict__ tail, const compute_t* __restrict__ weight,
    compute_t* __restrict__ out, int frames, int frame) {
  const int place = (int)blockIdx.x * THREADS + (int)threadIdx.x, at = (int)blockIdx.y;
  if (place >= frame) return;
  const int channel = place % CHANNELS;
  float sum = 0.0f;
#pragma unroll
  for (int tap = 0; tap < 7; ++tap) {
    const int from = at + tap - 3;
    if (from >= frames) break;
    const float x = from < 0 ? load1(tail + (size_t)(from + 3) * frame + place) : load1(k + (size_t)from * frame + place);
    sum = __fadd_rn(sum, __fmul_rn(x, load1(weight + channel * 4 + (tap < 4 ? tap : 6 - tap))));
  }
  store1(out + (size_t)at * frame + place, sum);
}
