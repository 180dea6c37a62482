// values [N,K/2], scales [N,K/16] to weight [N,K] = E2M1 * E4M3, exact in bf16 (at most 6 significant bits); SCALED: times
// scale, fp32 [1], then rounded. A thread unpacks one unit of 16 elements.
#include "codec.cuh"
#include "memory.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) nvfp4_dequantize(
    const unsigned char* __restrict__ values, const unsigned char* __restrict__ scales,
#if SCALED
    const float* __restrict__ tensor_scale,
#endif
    compute_t* __restrict__ weight, int units) {
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (unit >= units) return;
  const uint2 codes = reinterpret_cast<const uint2*>(values)[unit];
  const float scale = float_from_e4m3(scales[unit]);
  float x[16];
  unpack16(codes.x, codes.y, x);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= scale;
#if SCALED
  const float all = tensor_scale[0];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= all;
#endif
  store16(weight + (size_t)unit * 16, x);
}
