// plugins/nvfp4/warpgroup.cuh for the CPU: fibers instead of threads, products summed up in double precision.
// Products run as late as allowed, when they are waited for; if `reversed` as early as possible, when committed. So
// touching what a product reads or writes too early shows in one of the two.
#pragma once
#include "minifloat.cuh"

typedef unsigned long long barrier_t;
typedef unsigned long long tile_t;  // the address; bit 63: rows of 128 bytes instead of 64; from bit 48: see products8.cuh

static int same_in_warp(int x) { return x; }

static unsigned char* dynamic_shared() {
  alignas(1024) static unsigned char memory[227 * 1024];
  return memory;
}

static void pass_until(const std::function<bool()>& done) {
  for (int turns = 0; !done(); ++turns) {
    if (turns > 1000000) std::abort();  // a deadlock
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
  }
}

struct HostBarrier {
  signed char pending, arrivals;
  unsigned char phase, unused;
  int bytes;
};
static_assert(sizeof(HostBarrier) == sizeof(barrier_t), "one takes the place of the other");
static HostBarrier& host(barrier_t* barrier) { return *reinterpret_cast<HostBarrier*>(barrier); }
static void settle(HostBarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.arrivals;
}

static void barrier_init(barrier_t* barrier, int arrivals) {
  host(barrier) = {(signed char)arrivals, (signed char)arrivals, 0, 0, 0};
}
static void barrier_init_done() {}
static void barrier_arrive(barrier_t* barrier) {
  if (--host(barrier).pending < 0) std::abort();
  settle(host(barrier));
}
static void barrier_expect(barrier_t* barrier, int bytes) {
  host(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  barrier_t* barrier;
};
static std::vector<Copy> copies;  // they arrive when their barrier is waited for, not before
static void copy_bulk(void* to, const void* from, int bytes, barrier_t* barrier) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) % 16) std::abort();
  copies.push_back({to, from, bytes, barrier});
}
static void deliver(barrier_t* barrier) {
  for (size_t i = 0; i < copies.size();) {
    const Copy copy = copies[i];
    if (copy.barrier != barrier) {
      ++i;
      continue;
    }
    std::memcpy(copy.to, copy.from, copy.bytes);
    host(barrier).bytes -= copy.bytes;
    copies.erase(copies.begin() + i);
    settle(host(barrier));
  }
}
static void barrier_wait(barrier_t* barrier, int parity) {
  pass_until([=] {
    deliver(barrier);
    return host(barrier).phase != parity;
  });
}

template <int COUNT> static void registers_down() {}
template <int COUNT> static void registers_up() {}

template <int ROW_BYTES> static tile_t tile_at(const void* first) {
  if ((uintptr_t)first % (ROW_BYTES * 8)) std::abort();
  return (tile_t)(uintptr_t)first | (tile_t)(ROW_BYTES == 128) << 63;
}
static tile_t tile_along(tile_t tile, int bytes) { return tile + bytes; }
static unsigned char byte_of(tile_t tile, int row, int column) {
  const bool wide = tile >> 63;
  const int width = wide ? 128 : 64, groups = (int)(tile >> 48 & 0xff);  // 128 bytes from one group of eight rows to the next
  uintptr_t address = (uintptr_t)(tile & 0xffffffffffffull) + column;
  address += groups ? row / 8 * groups * 128 + row % 8 * width : row * width;
  address ^= (address >> 7 & (wide ? 7 : 3)) << 4;
  return *reinterpret_cast<const unsigned char*>(address);
}
static double element(tile_t tile, int row, int column) { return float_from_e4m3(byte_of(tile, row, column)); }

static float exp2_fast(float x) { return std::exp2(x); }

struct Product {
  float* d;
  int columns, group;
  bool add;
  tile_t a, b;
  const unsigned int* registers;  // a, if not null
  int* whole;                     // d, if not null: products of whole numbers
};
static std::vector<std::vector<Product>> products(1024);
static std::vector<int> committed(1024);

static double element_in_registers(size_t index, int row, int column) {
  const int owner = (threadIdx.x & ~3) + column % 16 / 4, i = column / 16 * 2 + row % 16 / 8;
  return float_from_e4m3(products[owner][index].registers[i] >> (8 * (column % 4)) & 0xffu);
}

static void run_product(size_t index) {
  const Product product = products[threadIdx.x][index];
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < product.columns / 2; ++i) {
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    if (product.whole) {
      int& sum = product.whole[i];
      if (!product.add) sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += (int)(signed char)byte_of(product.a, row, k) * (signed char)byte_of(product.b, column, k);
      continue;
    }
    double sum = product.add ? product.d[i] : 0.0;
    for (int k = 0; k < 32; ++k)
      sum += (product.registers ? element_in_registers(index, row, k) : element(product.a, row, k)) *
             element(product.b, column, k);
    product.d[i] = (float)sum;
  }
}

// Runs this thread's products of groups before `end`, when all threads of its warp have come here.
static void run_products(int end) {
  __syncwarp();
  std::vector<Product>& mine = products[threadIdx.x];
  size_t count = 0;
  while (count < mine.size() && mine[count].group < end) run_product(count++);
  __syncwarp();  // others may read this thread's registers until here
  mine.erase(mine.begin(), mine.begin() + count);
}

static void products_fence() {}
static void products_commit() {
  ++committed[threadIdx.x];
  if (reversed) run_products(committed[threadIdx.x]);
}
template <int PENDING> static void products_wait() { run_products(committed[threadIdx.x] - PENDING); }
template <int COUNT> static void hold(float (&)[COUNT]) {}

static void begin(float* d, int columns, bool add, tile_t a, tile_t b, const unsigned int* registers, int* whole = nullptr) {
  products[threadIdx.x].push_back({d, columns, committed[threadIdx.x], add, a, b, registers, whole});
}
template <bool ADD> static void product(float (&d)[64], tile_t a, tile_t b) { begin(d, 128, ADD, a, b, nullptr); }
template <bool ADD, int COUNT> static void product(float (&d)[COUNT], const unsigned int* a, tile_t b) {
  begin(d, 2 * COUNT, ADD, 0, b, a);
}
