// Gated delta networks over the frames of a chunk, all in fp32. CAMERA: numerators only, keys and queries rotated already.
// q, k, v, out [T,P,H,D]; beta fp32 [T,P,H]; gate fp32 [T,H]; cosine, sine fp32 [T,P,D/2]; state fp32 [H,D,D], rows keys;
// norm fp32 [H,D]. Three launches: sums over each frame's tokens, the scans over frames, what tokens read.
// products, added, seen fp32 [T,H,D,D]; plain_products [T,H,D,D] of keys that are not rotated; weights, sums [T,H,D].
#include "memory.cuh"

__device__ __forceinline__ float load1(const unsigned short* p) { return float_from_bf16(*p); }
__device__ __forceinline__ float load1(const float* p) { return *p; }

#define SQUARE (HEAD_DIM * HEAD_DIM)

// Element d of token `place`'s query or key, rotated.
__device__ __forceinline__ float turned(const compute_t* x, int d, const float* cosine, const float* sine) {
#if CAMERA
  return load1(x + d);
#else
  const float c = cosine[d / 2], s = sine[d / 2], even = load1(x + (d & ~1)), odd = load1(x + (d | 1));
  return d & 1 ? even * s + odd * c : even * c - odd * s;
#endif
}

// Sums over a frame's tokens: ROWS rows of the products a block, a column a thread. Grid (T*H, D/ROWS).
extern "C" __global__ void __launch_bounds__(THREADS) gdn_sums(
    const compute_t* __restrict__ k, const compute_t* __restrict__ v, const float* __restrict__ beta,
#if !CAMERA
    const float* __restrict__ cosine, const float* __restrict__ sine, float* __restrict__ plain_products,
    float* __restrict__ weights,
#endif
    float* __restrict__ products, float* __restrict__ added) {
  __shared__ float keys[TILE][HEAD_DIM], values[TILE][HEAD_DIM], gains[TILE];
#if !CAMERA
  __shared__ float plain[TILE][HEAD_DIM];
  float same[ROWS], total = 0.0f;
#endif
  const int frame = (int)blockIdx.x / HEADS, head = (int)blockIdx.x % HEADS, first = (int)blockIdx.y * ROWS;
  const int column = (int)threadIdx.x;
  float product[ROWS], sum[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    product[r] = sum[r] = 0.0f;
#if !CAMERA
    same[r] = 0.0f;
#endif
  }
  for (int start = 0; start < TOKENS; start += TILE) {
    __syncthreads();
    for (int i = (int)threadIdx.x; i < TILE * HEAD_DIM; i += THREADS) {
      const int token = start + i / HEAD_DIM, d = i % HEAD_DIM;
      const bool there = token < TOKENS;
      const size_t place = (size_t)frame * TOKENS + token, at = (place * HEADS + head) * HEAD_DIM;
#if CAMERA
      keys[i / HEAD_DIM][d] = there ? turned(k + at, d, 0, 0) : 0.0f;
#else
      keys[i / HEAD_DIM][d] =
          there ? turned(k + at, d, cosine + place * (HEAD_DIM / 2), sine + place * (HEAD_DIM / 2)) : 0.0f;
      plain[i / HEAD_DIM][d] = there ? load1(k + at + d) : 0.0f;
#endif
      values[i / HEAD_DIM][d] = there ? load1(v + at + d) : 0.0f;
      if (d == 0) gains[i / HEAD_DIM] = there ? beta[place * HEADS + head] : 0.0f;
    }
    __syncthreads();
    if (column >= HEAD_DIM) continue;
    for (int t = 0; t < TILE; ++t) {
      const float key = keys[t][column], value = values[t][column], gain = gains[t];
#if !CAMERA
      const float bare = plain[t][column];
      total += gain * bare;
#endif
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int row = first + r < HEAD_DIM ? first + r : HEAD_DIM - 1;
        const float weighted = gain * keys[t][row];
        product[r] += weighted * key;
        sum[r] += weighted * value;
#if !CAMERA
        same[r] += gain * plain[t][row] * bare;
#endif
      }
    }
  }
  if (column >= HEAD_DIM) return;
  for (int r = 0; r < ROWS && first + r < HEAD_DIM; ++r) {
    const size_t at = (size_t)blockIdx.x * SQUARE + (size_t)(first + r) * HEAD_DIM + column;
    products[at] = product[r];
    added[at] = sum[r];
#if !CAMERA
    plain_products[at] = same[r];
#endif
  }
#if !CAMERA
  if (first == 0) weights[(size_t)blockIdx.x * HEAD_DIM + column] = total;
#endif
}

// One frame on: strip = gate * (strip - products strip) + added, COLUMNS columns of a head's state; a row a thread.
__device__ __forceinline__ void step(
    float (&strip)[HEAD_DIM][COLUMNS], const float* products, const float* added, float gate, int row, int first,
    int width) {
  float next[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) next[c] = 0.0f;
  if (row < HEAD_DIM) {
    for (int d = 0; d < HEAD_DIM; ++d) {
      const float p = products[(size_t)row * HEAD_DIM + d];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) next[c] += p * strip[d][c];
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      next[c] = first + c < width ? gate * (strip[row][c] - next[c]) + added[(size_t)row * width + first + c] : 0.0f;
  }
  __syncthreads();
  if (row < HEAD_DIM)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) strip[row][c] = next[c];
  __syncthreads();
}

// Forwards from what is carried, then backwards from zero. Grid (H, D/COLUMNS), and one more block a head for the norms.
extern "C" __global__ void __launch_bounds__(THREADS) gdn_frames(
    const float* __restrict__ products, const float* __restrict__ added, const float* __restrict__ gate,
    const float* __restrict__ state,
#if !CAMERA
    const float* __restrict__ plain_products, const float* __restrict__ weights, const float* __restrict__ norm,
    float* __restrict__ sums, float* __restrict__ norm_out,
#endif
    float* __restrict__ seen, float* __restrict__ state_out, int frames) {
  __shared__ float strip[HEAD_DIM][COLUMNS];
  const int head = (int)blockIdx.x, row = (int)threadIdx.x;
  const float *factors = products, *terms = added, *carried = state;
  float *visible = seen, *last = state_out;
  int first = (int)blockIdx.y * COLUMNS, width = HEAD_DIM;
#if !CAMERA
  if (first >= HEAD_DIM)
    factors = plain_products, terms = weights, carried = norm, visible = sums, last = norm_out, first = 0, width = 1;
#endif
  const size_t size = (size_t)HEAD_DIM * width;
  for (int backwards = 0; backwards < 2; ++backwards) {
    if (row < HEAD_DIM)
      for (int c = 0; c < COLUMNS; ++c)
        strip[row][c] = !backwards && first + c < width ? carried[head * size + (size_t)row * width + first + c] : 0.0f;
    __syncthreads();
    for (int n = 0; n < frames; ++n) {
      const int frame = backwards ? frames - 1 - n : n, place = frame * HEADS + head;
      float* there = visible + place * size + (size_t)row * width + first;
      if (backwards && row < HEAD_DIM)
        for (int c = 0; c < COLUMNS && first + c < width; ++c) there[c] += strip[row][c];
      step(strip, factors + (size_t)place * SQUARE, terms + place * size, gate[place], row, first, width);
      if (!backwards && row < HEAD_DIM)
        for (int c = 0; c < COLUMNS && first + c < width; ++c) there[c] = strip[row][c];
    }
    if (!backwards && row < HEAD_DIM)
      for (int c = 0; c < COLUMNS && first + c < width; ++c)
        last[head * size + (size_t)row * width + first + c] = strip[row][c];
    __syncthreads();
  }
}

// What tokens read of their frame's state: TILE tokens a block, a column a thread. Grid (T*H, P/TILE).
extern "C" __global__ void __launch_bounds__(THREADS) gdn_read(
    const compute_t* __restrict__ q, const float* __restrict__ seen,
#if !CAMERA
    const float* __restrict__ cosine, const float* __restrict__ sine, const float* __restrict__ sums,
#endif
    compute_t* __restrict__ out) {
  __shared__ float queries[TILE][HEAD_DIM], below[TILE];
  const int frame = (int)blockIdx.x / HEADS, head = (int)blockIdx.x % HEADS, start = (int)blockIdx.y * TILE;
  for (int i = (int)threadIdx.x; i < TILE * HEAD_DIM; i += THREADS) {
    const int token = start + i / HEAD_DIM, d = i % HEAD_DIM;
    const size_t place = (size_t)frame * TOKENS + token, at = (place * HEADS + head) * HEAD_DIM;
#if CAMERA
    queries[i / HEAD_DIM][d] = token < TOKENS ? turned(q + at, d, 0, 0) : 0.0f;
#else
    queries[i / HEAD_DIM][d] =
        token < TOKENS ? turned(q + at, d, cosine + place * (HEAD_DIM / 2), sine + place * (HEAD_DIM / 2)) : 0.0f;
#endif
  }
#if !CAMERA
  for (int t = (int)threadIdx.x; t < TILE && start + t < TOKENS; t += THREADS) {
    const size_t at = (((size_t)frame * TOKENS + start + t) * HEADS + head) * HEAD_DIM;
    float total = 0.0f;
    for (int d = 0; d < HEAD_DIM; ++d) total += load1(q + at + d) * sums[(size_t)blockIdx.x * HEAD_DIM + d];
    below[t] = total + EPS;
  }
#endif
  __syncthreads();
  const int column = (int)threadIdx.x;
  if (column >= HEAD_DIM) return;
  float total[TILE];
#pragma unroll
  for (int t = 0; t < TILE; ++t) total[t] = 0.0f;
  for (int d = 0; d < HEAD_DIM; ++d) {
    const float value = seen[(size_t)blockIdx.x * SQUARE + (size_t)d * HEAD_DIM + column];
#pragma unroll
    for (int t = 0; t < TILE; ++t) total[t] += queries[t][d] * value;
  }
#pragma unroll
  for (int t = 0; t < TILE; ++t) {
    if (start + t >= TOKENS) break;
    const size_t at = (((size_t)frame * TOKENS + start + t) * HEADS + head) * HEAD_DIM;
#if CAMERA
    store1(out + at + column, total[t]);
#else
    store1(out + at + column, total[t] / below[t]);
#endif
  }
}
