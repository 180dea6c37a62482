// Just enough CUDA for the kernels to compile and run as host C++: a thread is a fiber that runs until it waits.
// `reversed` lets the last thread go first: with both orders tried, a missing barrier shows as a wrong result.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;
struct Index { int x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Index threadIdx, blockIdx, gridDim;

template <class To, class From> static To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned)(bytes >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  return out;
}
static float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fdividef(float a, float b) { return a / b; }
#define __expf std::exp  // a name that the C library has as well
static float __fsqrt_rn(float a) { return std::sqrt(a); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }

enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
};
static std::vector<Fiber> fibers;
static std::vector<float> exchange;
static ucontext_t scheduler;
static std::function<void()> body;
static bool reversed;

static void wait_as(State state) {
  const int me = threadIdx.x;
  fibers[me].state = state;
  swapcontext(&fibers[me].context, &scheduler);
}
static void __syncthreads() { wait_as(AT_BLOCK); }
static void __syncwarp() { wait_as(AT_WARP); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
  const int me = threadIdx.x;
  exchange[me] = value;
  wait_as(AT_WARP);
  const float other = exchange[me ^ mask];
  wait_as(AT_WARP);
  return other;
}

static void trampoline() {
  body();
  fibers[threadIdx.x].state = DONE;
  setcontext(&scheduler);
}

// Wake threads [first, last) if everyone of them that still lives waits for `state`.
static bool release(int first, int last, State state) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (fibers[i].state != state && fibers[i].state != DONE) return false;
    any |= fibers[i].state == state;
  }
  for (int i = first; i < last; ++i)
    if (fibers[i].state == state) fibers[i].state = READY;
  return any;
}

static void run_block(int threads) {
  fibers.resize(threads), exchange.assign(threads, 0.0f);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16), fiber.state = READY;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, trampoline, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int n = 0; n < threads; ++n) {
      const int i = reversed ? threads - 1 - n : n;
      if (fibers[i].state != READY) continue;
      threadIdx.x = i, progress = true;
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (int first = 0; first < threads; first += 32) progress |= release(first, first + 32, AT_WARP);
    progress |= release(0, threads, AT_BLOCK);
  }
  for (const Fiber& fiber : fibers)
    if (fiber.state != DONE) std::abort();  // a barrier that not every thread reaches
}

template <class... A, size_t... I>
static void launch_as(void (*kernel)(A...), void** arguments, int x, int y, int threads, std::index_sequence<I...>) {
  body = [=] { kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...); };
  gridDim = {x, y};
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(threads);
}

template <class... A> static void launch(void (*kernel)(A...), void** arguments, int x, int y, int threads) {
  launch_as(kernel, arguments, x, y, threads, std::index_sequence_for<A...>{});
}

#define EXPORT(kernel) \
  extern "C" void run_##kernel(void** arguments, int x, int y, int threads, int last_first) { \
    reversed = last_first; \
    launch(kernel, arguments, x, y, threads); \
  }
