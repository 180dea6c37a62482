// Hopper's own instructions (sm_90a): memory barriers, bulk copies, and the matrix product of a warpgroup (128 threads).
// tests/plugins/warpgroup.cuh has the same functions for the CPU.
#pragma once

typedef unsigned long long barrier_t;
typedef unsigned long long tile_t;  // where a matrix lies in shared memory, as the matrix product wants it

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ unsigned int shared_address(const void* p) {
  return (unsigned int)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(barrier_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine; a __syncthreads() must follow.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(barrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and expect that many bytes from bulk copies before the phase ends.
__device__ __forceinline__ void barrier_expect(barrier_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Wait for the end of the phase with this parity; the phase before the first counts as ended, with parity 1.
__device__ __forceinline__ void barrier_wait(barrier_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// `bytes`, a multiple of 16, from global to shared memory, both aligned to 16 bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, barrier_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

template <int COUNT> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A matrix whose rows are ROW_BYTES (64 or 128) long and lie swizzled: 16-byte chunk c of row r is at chunk
// c ^ (r % 8) for 128 bytes, c ^ (r / 2 % 4) for 64. `first` is aligned to eight rows.
template <int ROW_BYTES> __device__ __forceinline__ tile_t tile_at(const void* first) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "the swizzled forms");
  const unsigned long long swizzle = ROW_BYTES == 128 ? 1 : 2, eight_rows = ROW_BYTES * 8;
  return (shared_address(first) & 0x3ffffu) >> 4 | 1ull << 16 | eight_rows / 16 << 32 | swizzle << 62;
}
// The same, `bytes` further along the rows.
__device__ __forceinline__ tile_t tile_along(tile_t tile, int bytes) { return tile + (bytes >> 4); }

// x, of which the compiler then knows that a warp's threads all have it, and keeps it in a register for all of them.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Before products whose registers have been touched.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most PENDING committed groups are unfinished. Until then nothing they read or write may be touched.
template <int PENDING> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to registers of a product across this point.
template <int COUNT> __device__ __forceinline__ void hold(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// d [64, N] = (ADD ? d : 0) + a [64, 32] b [N, 32]^T, all of a warpgroup's threads together, in the background.
// d: thread t of the group holds rows 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), columns 8 (i / 4) + 2 (t % 4) + i % 2.
// a in registers: E4M3 of the same rows, i-th register: row + 8 (i % 2), columns 16 (i / 2) + 4 (t % 4) + 0..3.
#define TEN(n) "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9, "
#define SUMS_32 "{" TEN() TEN(1) TEN(2) "%30, %31}, "
#define SUMS_36 "{" TEN() TEN(1) TEN(2) "%30, %31, %32, %33, %34, %35}, "
#define SUMS_64 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63}, "
#define SUMS_68 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63, %64, %65, %66, %67}, "
#define FOUR(how, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define ALL_32(how) \
  FOUR(how, 0), FOUR(how, 4), FOUR(how, 8), FOUR(how, 12), FOUR(how, 16), FOUR(how, 20), FOUR(how, 24), FOUR(how, 28)
#define ALL_36(how) ALL_32(how), FOUR(how, 32)
#define ALL_64(how) ALL_36(how), FOUR(how, 36), FOUR(how, 40), FOUR(how, 44), FOUR(how, 48), FOUR(how, 52), FOUR(how, 56), FOUR(how, 60)
#define ALL_68(how) ALL_64(how), FOUR(how, 64)
// How a sum is passed: "+f"(x) where it is added to, "=f"(x) where it is only written.
#define ADDED(x) "+f"(x)
#define WRITTEN(x) "=f"(x)
#define WITH_ADD(number, instruction) "{\n.reg .pred add;\nsetp.ne.b32 add, %" #number ", 0;\n" instruction ", add, 1, 1;\n}\n"
#define M64(columns) "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 "

// a and b in shared memory.
template <bool ADD> __device__ __forceinline__ void product(float (&d)[64], tile_t a, tile_t b) {
#define RUN(how) \
  asm volatile(WITH_ADD(66, M64(128) SUMS_64 "%64, %65") : ALL_64(how) : "l"(a), "l"(b), "r"((int)ADD))
  if (ADD) RUN(ADDED);
  else RUN(WRITTEN);
#undef RUN
}

// a in four registers, b in shared memory: for 2 * SUMS columns. The numbers are those of the operands after the sums.
#define PRODUCT_FROM_REGISTERS(SUMS, columns, a0, a1, a2, a3, b0, add)                                              \
  template <bool ADD> __device__ __forceinline__ void product(float (&d)[SUMS], const unsigned int* a, tile_t b) { \
    if (ADD)                                                                                                        \
      asm volatile(WITH_ADD(add, M64(columns) SUMS_##SUMS "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0)        \
                   : ALL_##SUMS(ADDED)                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                   \
    else                                                                                                            \
      asm volatile(WITH_ADD(add, M64(columns) SUMS_##SUMS "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0)        \
                   : ALL_##SUMS(WRITTEN)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(0));                                   \
  }
PRODUCT_FROM_REGISTERS(32, 64, 32, 33, 34, 35, 36, 37)
PRODUCT_FROM_REGISTERS(36, 72, 36, 37, 38, 39, 40, 41)
PRODUCT_FROM_REGISTERS(64, 128, 64, 65, 66, 67, 68, 69)
PRODUCT_FROM_REGISTERS(68, 136, 68, 69, 70, 71, 72, 73)
