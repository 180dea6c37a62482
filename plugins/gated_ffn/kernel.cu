// silu, a 3x3 filter a feature over each frame, and the first half of the features times silu of the second.
// x [T,Y,X,C]; weight [C,9]; bias [C]; out [T,Y,X,C/2]. A thread is one feature of one place that comes out.
#include "memory.cuh"

__device__ __forceinline__ float load1(const unsigned short* p) { return float_from_bf16(*p); }
__device__ __forceinline__ float load1(const float* p) { return *p; }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS) gated_ffn(
    const compute_t* __restrict__ x, const compute_t* __restrict__ weight, const compute_t* __restrict__ bias,
    compute_t* __restrict__ out, int height, int width) {
  const int feature = (int)blockIdx.x % BLOCKS * THREADS + (int)threadIdx.x;
  if (feature >= CHANNELS / 2) return;
  const int place = (int)blockIdx.x / BLOCKS, row = place / width, column = place % width;
  const compute_t* frame = x + (size_t)blockIdx.y * height * width * CHANNELS;
  float sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = feature + half * (CHANNELS / 2);
    float total = load1(bias + channel);
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const int y = row + i / 3 - 1, z = column + i % 3 - 1;
      if (y < 0 || y >= height || z < 0 || z >= width) continue;
      const float active = rounded(silu(load1(frame + ((size_t)y * width + z) * CHANNELS + channel)), out);
      total += active * load1(weight + channel * 9 + i);
    }
    sum[half] = total;
  }
  const size_t at = ((size_t)blockIdx.y * height * width + place) * (CHANNELS / 2) + feature;
  store1(out + at, sum[0] * silu(sum[1]));
}
