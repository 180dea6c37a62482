// Eight channels a thread, 16-byte loads and stores; gridDim.y: frames of x. `positions` are those of a frame of x, and
// `width` is its row; each becomes 2 x 2 positions.
// CODES: y is 8-bit codes of the numbers times factor[0], and SIDE 1: every position stays one.
#include "memory.cuh"

#ifndef CODES
#define CODES 0
#endif
#ifndef SIDE
#define SIDE 2
#endif
#if CODES
#include "codes.cuh"
typedef unsigned char stored_t;
#else
typedef compute_t stored_t;
#endif

__device__ __forceinline__ size_t place_of(int frame, int row, int column, int positions, int width, int channels) {
  return (((size_t)frame * SIDE * SIDE * positions + (size_t)row * SIDE * width) + column) * channels;
}

#if UPSAMPLE
// x [T,Y,X,CHANNELS * TIME] to y [T * TIME,2Y,2X,CHANNELS]: frame by frame a part of the channels, every position 4 times.
extern "C" __global__ void __launch_bounds__(THREADS) upsample(
    const compute_t* __restrict__ x,
#if CODES
    const float* __restrict__ factor,
#endif
    stored_t* __restrict__ y, int positions, int width) {
  constexpr int UNITS = CHANNELS / 8;
  const int index = blockIdx.x * THREADS + threadIdx.x;
  if (index >= positions * UNITS * TIME) return;
  const int unit = index % (UNITS * TIME), position = index / (UNITS * TIME);
  const int part = unit / UNITS, channel = unit % UNITS * 8;
  float held[8];
  load8(x + ((size_t)blockIdx.y * positions + position) * (CHANNELS * TIME) + unit * 8, held);
#if CODES
  const uint2 made = codes8(held, factor[0]);
#endif
#pragma unroll
  for (int k = 0; k < SIDE * SIDE; ++k) {
    const int row = SIDE * (position / width) + k / SIDE, column = SIDE * (position % width) + k % SIDE;
    stored_t* const to = y + place_of(blockIdx.y * TIME + part, row, column, positions, width, CHANNELS) + channel;
#if CODES
    *reinterpret_cast<uint2*>(to) = made;
#else
    store8(to, held);
#endif
  }
}
#else
// out = y + x [T,Y,X,CHANNELS * RATIO], where channel o at place k of a block of TIME x 2 x 2 positions of y is x's channel
// (o * 4 TIME + k) * RATIO / (4 TIME): a thread reads 8 RATIO of them in a row. out may be y: a thread reads all that it
// writes to before it writes any of it, and no other thread reads that.
extern "C" __global__ void __launch_bounds__(THREADS) duplicate_up(
    const compute_t* __restrict__ x, const compute_t* y, compute_t* out, int positions, int width) {
  constexpr int UNITS = CHANNELS / 8, PLACES = 4 * TIME;
  const int index = blockIdx.x * THREADS + threadIdx.x;
  if (index >= positions * UNITS) return;
  const int unit = index % UNITS, position = index / UNITS;
  float held[RATIO][8];
  const compute_t* source = x + (((size_t)blockIdx.y * positions + position) * UNITS + unit) * (8 * RATIO);
#pragma unroll
  for (int r = 0; r < RATIO; ++r) load8(source + 8 * r, held[r]);
  float sum[PLACES][8];
  size_t place[PLACES];
#pragma unroll
  for (int k = 0; k < PLACES; ++k) {
    const int row = 2 * (position / width) + k / 2 % 2, column = 2 * (position % width) + k % 2;
    place[k] = place_of(blockIdx.y * TIME + k / 4, row, column, positions, width, CHANNELS) + unit * 8;
    load8(y + place[k], sum[k]);
  }
#pragma unroll
  for (int k = 0; k < PLACES; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int from = (i * PLACES + k) * RATIO / PLACES;
      sum[k][i] += held[from / 8][from % 8];
    }
    store8(out + place[k], sum[k]);
  }
}
#endif
