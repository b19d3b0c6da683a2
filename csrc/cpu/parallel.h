// A loop over rows on several threads, when there are enough bytes to pay for starting them.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "rows.h"

namespace scalemoe {

// Starting and joining a thread costs 50 to 150 us. One core moves 1 to 3 MB in that time, and two cores far from twice as much as one.
constexpr int64_t kBytesPerThread = int64_t{16} << 20;
constexpr int kMostThreads = 64;

// Calls f(begin, end) for parts that together are [0, n), on at most `threads` threads, this one among them. `bytes_total` is what the loop
// reads and writes. Parts are taken in ascending order by whoever is free, so a thread that lost its core holds nobody up. When it
// returns, this thread sees all that was written, streaming stores too.
//
// The threads live only as long as the call: nothing to break in a fork, and none that would spin beside torch's own.
template <class F>
void parallel_for(int64_t n, int64_t bytes_total, int threads, F f) {
  const int64_t most = std::min<int64_t>(std::min(threads, kMostThreads), std::min(n, bytes_total / kBytesPerThread));
  if (most <= 1) {
    if (n > 0) f(int64_t{0}, n);
    fence_stores();
    return;
  }
  struct Loop {
    F& body;
    const int64_t n, step;
    std::atomic<int64_t> next{0};

    void run() {
      for (int64_t begin; (begin = next.fetch_add(step)) < n;) body(begin, std::min(begin + step, n));
      fence_stores();
    }
  } loop{f, n, std::max<int64_t>(n / (most * 8), 1)};
  pthread_t started[kMostThreads];
  int64_t count = 0;
  // A thread that cannot be had is no error: the others do its part.
  while (count < most - 1 && pthread_create(&started[count], nullptr, [](void* at) -> void* {
    static_cast<Loop*>(at)->run();
    return nullptr;
  }, &loop) == 0) count++;
  loop.run();
  for (int64_t i = 0; i < count; i++) pthread_join(started[i], nullptr);
}

}  // namespace scalemoe
