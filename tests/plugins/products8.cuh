// plugins/nvfp4/products8.cuh for the CPU: a tensor map is a description in plain numbers, and a box is copied when it is asked
// for, but counts as arrived when its barrier is waited for.
#pragma once
#include "warpgroup.cuh"

#define __grid_constant__
struct float2 { float x, y; };
template <class T> static T __ldg(const T* p) { return *p; }
template <class T> static T __ldcs(const T* p) { return *p; }
template <class T> static void __stcs(T* p, T value) { *p = value; }
static unsigned __shfl_xor_sync(unsigned all, unsigned value, int mask) {
  return bits<unsigned>(__shfl_xor_sync(all, bits<float>(value), mask));
}

struct alignas(64) Map {
  const unsigned char* data;
  int sizes[4], box[4], unused[14];
};
static_assert(sizeof(Map) == 128, "as large as the driver's");

// Rows of 128 bytes, 16-byte pieces swizzled by the address they lie at; zeros for what is outside of the tensor.
static void copy_rows(unsigned char* to, const Map* map, const int (&first)[4], barrier_t* barrier) {
  if ((uintptr_t)to % 1024 || map->box[0] != 128) std::abort();
  const int* box = map->box;
  int row = 0;
  for (int t = 0; t < box[3]; ++t)
    for (int y = 0; y < box[2]; ++y)
      for (int x = 0; x < box[1]; ++x, ++row) {
        const int at[3] = {first[1] + x, first[2] + y, first[3] + t};
        bool inside = true;
        size_t source = 0;
        for (int i = 2; i >= 0; --i) {
          inside &= at[i] >= 0 && at[i] < map->sizes[i + 1];
          source = source * map->sizes[i + 1] + (size_t)at[i];
        }
        for (int c = 0; c < 128; ++c) {
          uintptr_t place = (uintptr_t)to + row * 128 + c;
          place ^= (place >> 7 & 7) << 4;
          const bool there = inside && first[0] + c >= 0 && first[0] + c < map->sizes[0];
          *reinterpret_cast<unsigned char*>(place) = there ? map->data[source * map->sizes[0] + first[0] + c] : 0;
        }
      }
  copies.push_back({to, to, row * 128, barrier});
}
static void copy_box(unsigned char* to, const Map* map, int c, int x, int y, int t, barrier_t* barrier) {
  copy_rows(to, map, {c, x, y, t}, barrier);
}
static void copy_box(unsigned char* to, const Map* map, int k, int n, barrier_t* barrier) {
  copy_rows(to, map, {k, n, 0, 0}, barrier);
}

static void prefetch(const void* p) {
  volatile unsigned char read = *static_cast<const unsigned char*>(p);  // an address that is not there would show
  (void)read;
}

static tile_t tile_of_groups(const void* first, int eight_rows) {
  if ((uintptr_t)first % 1024 || eight_rows % 128 || (uintptr_t)first >> 48) std::abort();
  return (tile_t)(uintptr_t)first | (tile_t)(eight_rows / 128) << 48 | 1ull << 63;
}

static unsigned bf16x2(float low, float high) {
  const auto rounded = [](float x) { return bits<unsigned>(x) + 0x7fffu + (bits<unsigned>(x) >> 16 & 1u); };
  return rounded(low) >> 16 | (rounded(high) & 0xffff0000u);
}

static void hold(int (&)[64]) {}
static void hold(int (&)[128]) {}
static void product(float (&d)[64], tile_t a, tile_t b, int add) { begin(d, 128, add, a, b, nullptr); }
static void product(float (&d)[128], tile_t a, tile_t b, int add) { begin(d, 256, add, a, b, nullptr); }
static void product(int (&d)[64], tile_t a, tile_t b, int add) { begin(nullptr, 128, add, a, b, nullptr, d); }
static void product(int (&d)[128], tile_t a, tile_t b, int add) { begin(nullptr, 256, add, a, b, nullptr, d); }
