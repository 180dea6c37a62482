// More of Hopper's instructions (sm_90a), for convolutions: copies of boxes of a tensor, and products of 8-bit codes whose rows
// begin anywhere. tests/plugins/products8.cuh has the same functions for the CPU.
#pragma once
#include "warpgroup.cuh"

// A tensor in global memory and the box that one copy takes of it, as the driver encodes them (plugins/tensor_map.py).
struct alignas(64) Map {
  char bytes[128];
};

// A box from the coordinates on, the innermost first; what lies outside the tensor becomes zeros. All of its bytes arrive.
__device__ __forceinline__ void copy_box(void* to, const Map* map, int c, int x, int y, int t, barrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(t)
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const Map* map, int k, int n, barrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(k), "r"(n)
      : "memory");
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Rows of 128 bytes in groups of eight, `eight_rows` bytes from one group to the next. They lie swizzled by address, in 1024
// bytes at a time, so the first row may be any (see tile_at of warpgroup.cuh).
__device__ __forceinline__ tile_t tile_of_groups(const void* first, int eight_rows) {
  return (shared_address(first) & 0x3ffffu) >> 4 | 1ull << 16 | (unsigned long long)(eight_rows >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ unsigned int bf16x2(float low, float high) {
  unsigned int pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <int COUNT> __device__ __forceinline__ void hold(int (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// d [64, N] = (add ? d : 0) + a [64, 32] b [N, 32]^T, laid out as in warpgroup.cuh; N is twice as many as the sums.
#define SUMS_128 \
  "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
  "%120, %121, %122, %123, %124, %125, %126, %127}, "
#define FROM_64(how) \
  FOUR(how, 64), FOUR(how, 68), FOUR(how, 72), FOUR(how, 76), FOUR(how, 80), FOUR(how, 84), FOUR(how, 88), FOUR(how, 92)
#define FROM_96(how) \
  FOUR(how, 96), FOUR(how, 100), FOUR(how, 104), FOUR(how, 108), FOUR(how, 112), FOUR(how, 116), FOUR(how, 120), FOUR(how, 124)
#define ALL_128(how) ALL_64(how), FROM_64(how), FROM_96(how)
#define ADDED_WHOLE(x) "+r"(x)
#define PRODUCT_OF_CODES(sum_t, SUMS, columns, types, operands, add, last, how)                                      \
  __device__ __forceinline__ void product(sum_t(&d)[SUMS], tile_t a, tile_t b, int added) {                          \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add ", 0;\n"                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32." types " " SUMS_##SUMS operands ", " last ";\n}\n" \
                 : ALL_##SUMS(how)                                                                                   \
                 : "l"(a), "l"(b), "r"(added));                                                                      \
  }
PRODUCT_OF_CODES(float, 64, 128, "f32.e4m3.e4m3", "%64, %65", 66, "add, 1, 1", ADDED)
PRODUCT_OF_CODES(float, 128, 256, "f32.e4m3.e4m3", "%128, %129", 130, "add, 1, 1", ADDED)
PRODUCT_OF_CODES(int, 64, 128, "s32.s8.s8", "%64, %65", 66, "add", ADDED_WHOLE)
PRODUCT_OF_CODES(int, 128, 256, "s32.s8.s8", "%128, %129", 130, "add", ADDED_WHOLE)
