// Reductions over a thread block of THREADS threads.
#pragma once
#include "memory.cuh"

// The largest x of the thread block, in every thread; every thread must call it.
__device__ __forceinline__ float block_max(float x) {
  __shared__ float warps[THREADS / 32];
  __syncthreads();  // an earlier call may still be reading
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < THREADS / 32; ++i) x = fmaxf(x, warps[i]);
  return x;
}

// The sum of x over the thread block, in every thread and in one order; every thread must call it.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[THREADS / 32];
  __syncthreads();  // an earlier call may still be reading
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < THREADS / 32; ++i) x += warps[i];
  return x;
}
