// Sixteen elements at a time between global memory and fp32 registers. No CUDA header is needed: the bf16
// conversions are an instruction or written out, so the same text also compiles as host C++ (tests/plugins/host_cuda.h).
#pragma once

#if COMPUTE_BF16
typedef unsigned short compute_t;
#else
typedef float compute_t;
#endif

__device__ __forceinline__ float float_from_bf16(unsigned int bits) { return __uint_as_float(bits << 16); }

// Round half to even; any NaN becomes the quiet NaN 0x7fff. GPUs have an instruction for it, for two at a time.
__device__ __forceinline__ unsigned int bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned int pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const float x[2] = {low, high};
  unsigned int code[2];
  for (int i = 0; i < 2; ++i) {
    const unsigned int bits = __float_as_uint(x[i]);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    code[i] = nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
  return code[0] | code[1] << 16;
#endif
}

__device__ __forceinline__ unsigned short bf16_from_float(float x) { return (unsigned short)bf16_pair(x, 0.0f); }

// `p` is aligned to 16 bytes.
__device__ __forceinline__ void load16(const unsigned short* p, float (&x)[16]) {
  const uint4* words = reinterpret_cast<const uint4*>(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 w = words[i];
    const unsigned int pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[8 * i + 2 * j] = float_from_bf16(pairs[j] & 0xffffu);
      x[8 * i + 2 * j + 1] = float_from_bf16(pairs[j] >> 16);
    }
  }
}

__device__ __forceinline__ void load16(const float* p, float (&x)[16]) {
  const float4* words = reinterpret_cast<const float4*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 w = words[i];
    x[4 * i] = w.x, x[4 * i + 1] = w.y, x[4 * i + 2] = w.z, x[4 * i + 3] = w.w;
  }
}

__device__ __forceinline__ void store16(unsigned short* p, const float (&x)[16]) {
  uint4* words = reinterpret_cast<uint4*>(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* y = x + 8 * i;
    words[i] = make_uint4(bf16_pair(y[0], y[1]), bf16_pair(y[2], y[3]), bf16_pair(y[4], y[5]), bf16_pair(y[6], y[7]));
  }
}

__device__ __forceinline__ void store16(float* p, const float (&x)[16]) {
  float4* words = reinterpret_cast<float4*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// Eight elements, likewise.
__device__ __forceinline__ void load8(const unsigned short* p, float (&x)[8]) {
  const uint4 w = *reinterpret_cast<const uint4*>(p);
  const unsigned int pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[2 * j] = float_from_bf16(pairs[j] & 0xffffu);
    x[2 * j + 1] = float_from_bf16(pairs[j] >> 16);
  }
}

__device__ __forceinline__ void load8(const float* p, float (&x)[8]) {
  const float4* words = reinterpret_cast<const float4*>(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 w = words[i];
    x[4 * i] = w.x, x[4 * i + 1] = w.y, x[4 * i + 2] = w.z, x[4 * i + 3] = w.w;
  }
}

__device__ __forceinline__ void store8(unsigned short* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
}

__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
  float4* words = reinterpret_cast<float4*>(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) words[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// x as it is after a round trip through memory.
__device__ __forceinline__ float rounded(float x, const unsigned short*) {
  return __uint_as_float(bf16_pair(0.0f, x));
}
__device__ __forceinline__ float rounded(float x, const float*) { return x; }

// Sixteen elements as they lie in memory, loaded long before they are needed.
struct Packed {
  uint4 words[sizeof(compute_t)];
};

__device__ __forceinline__ Packed fetch16(const compute_t* p) {
  Packed packed;
#pragma unroll
  for (int i = 0; i < (int)sizeof(compute_t); ++i) packed.words[i] = reinterpret_cast<const uint4*>(p)[i];
  return packed;
}

__device__ __forceinline__ void widen16(const Packed& packed, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < (int)sizeof(compute_t); ++i) {
    const uint4 w = packed.words[i];
    const unsigned int words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if COMPUTE_BF16
      x[8 * i + 2 * j] = float_from_bf16(words[j] & 0xffffu);
      x[8 * i + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
#else
      x[4 * i + j] = __uint_as_float(words[j]);
#endif
    }
  }
}

__device__ __forceinline__ void store1(unsigned short* p, float x) { *p = bf16_from_float(x); }
__device__ __forceinline__ void store1(float* p, float x) { *p = x; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
