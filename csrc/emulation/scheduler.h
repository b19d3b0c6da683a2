// The simulator's interface: fibers, barriers, streams. emulation.h makes CUDA's words out of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x;
};

// The running fiber's. One simulator for each OS thread.
extern thread_local Index thread_index, block_index, block_size, grid_size;

void sync_threads();
// Fill `values` with what each lane gave.
void exchange_in_warp(uint32_t value, uint32_t (&values)[32]);
void* shared_memory(const void* key, size_t bytes);
// Now and then lets other fibers run.
void maybe_switch();
void pause();
uint64_t now_ns();
void launch(void* stream, unsigned blocks, unsigned threads, void (*body)(void*), void (*destroy)(void*), void* argument);

template <class Body>
void launch_body(void* stream, unsigned blocks, unsigned threads, Body body) {
  const auto run = [](void* b) { (*static_cast<Body*>(b))(); };
  const auto destroy = [](void* b) { delete static_cast<Body*>(b); };
  launch(stream, blocks, threads, run, destroy, new Body(body));
}

}  // namespace emulation
