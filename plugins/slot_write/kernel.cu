// Write value [N] at the start of slot *write_slot modulo the number of slots of state [S,K], in place; below 0 nothing.
#include "memory.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) slot_write(
    const compute_t* __restrict__ value, const int* __restrict__ write_slot, compute_t* __restrict__ state, int slots,
    int elements, int room) {
  const int slot = *write_slot, place = (int)blockIdx.x * THREADS + (int)threadIdx.x;
  if (slot < 0 || place >= elements) return;
  state[(size_t)(slot % slots) * room + place] = value[place];
}
