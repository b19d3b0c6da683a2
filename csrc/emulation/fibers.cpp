// The scheduler behind scheduler.h. It is never compiled with -fsanitize=thread itself: its own bookkeeping is not part of the program
// under test; -DSCALEMOE_TSAN makes it tell ThreadSanitizer about fibers, barriers and streams.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

#if defined(SCALEMOE_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define SCALEMOE_IF_TSAN(code) code
#else
#define SCALEMOE_IF_TSAN(code)
#endif

namespace emulation {

thread_local Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 8 << 10;   // of a block
constexpr unsigned kResidentBlocks = 3;    // of a stream at once; as on a GPU, the others start when one ends
constexpr unsigned kSwitchEvery = 24;      // memory accesses, on average
constexpr uint64_t kNsPerTurn = 100;       // simulated time
constexpr unsigned kTurnsPerMood = 400;    // after so many turns another stream is favoured, or none
constexpr unsigned kNoSync = 1;            // a switch between fibers orders nothing

struct Launch {
  unsigned blocks, threads;
  void (*body)(void*);
  void (*destroy)(void*);
  void* argument;
};

// Where threads meet. Two places in turn: a fast one may be at the next barrier while a slow one still leaves this one.
struct Barrier {
  unsigned waiting = 0, round = 0;
  char order[2];
};

struct Warp {
  Barrier barrier;
  uint32_t values[2][kWarpSize];
};

struct Block {
  unsigned index, exited = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared{new char[kSharedBytes]};
  size_t shared_used = 0;
  std::unordered_map<const void*, size_t> shared_offset;
};

// A place to go on from. swapcontext saves the signal mask, which is a system call. Jumps do without, but ThreadSanitizer does not follow
// them.
struct Context {
  ucontext_t context;
  jmp_buf jump;
  bool can_jump = false;
};

void swap(Context& from, Context& to) {
#if defined(SCALEMOE_TSAN)
  swapcontext(&from.context, &to.context);
#else
  from.can_jump = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.can_jump) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

struct Stream;

struct Fiber : Context {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Stream* stream;
  unsigned slot, thread;
  void* tsan = nullptr;
};

struct Stream {
  std::deque<Launch> queue;  // the first is running unless num_live is 0
  std::vector<std::unique_ptr<Fiber>> fibers;  // of slot 0's block, then of slot 1's, ...
  std::unique_ptr<Block> blocks[kResidentBlocks];
  unsigned next_block = 0;
  // Kept until the run is over: to reuse their memory at once would order streams that nothing orders.
  std::vector<std::unique_ptr<Block>> old_blocks;
  std::vector<Launch> old_launches;
  std::vector<Fiber*> runnable;
  unsigned num_live = 0;
  unsigned num_launches = 0;  // that have ended
  // Launch n starts after everything that order[n % 2] knows, and tells what it did to the other.
  char order[2];
};

struct Simulator {
  std::unordered_map<void*, std::unique_ptr<Stream>> by_key;
  std::vector<Stream*> streams;
  Context scheduler;
  void* tsan_scheduler = nullptr;
  Fiber* current = nullptr;
  uint64_t random = 1, turns = 0;
  Stream* favourite = nullptr;
  bool deferred = false, block_ended = false;
};

thread_local Simulator simulator;

uint64_t next_random() {
  uint64_t& x = simulator.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x * 0x2545f4914f6cdd1dull >> 16;
}

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, block_index.x, thread_index.x);
  std::abort();
}

void switch_to_scheduler() {
  Fiber* fiber = simulator.current;
  SCALEMOE_IF_TSAN(__tsan_switch_to_fiber(simulator.tsan_scheduler, kNoSync);)
  swap(*fiber, simulator.scheduler);
}

void switch_to(Fiber* fiber) {
  const Launch& launch = fiber->stream->queue.front();
  simulator.current = fiber;
  thread_index.x = fiber->thread, block_index.x = fiber->stream->blocks[fiber->slot]->index;
  block_size.x = launch.threads, grid_size.x = launch.blocks;
  SCALEMOE_IF_TSAN(__tsan_switch_to_fiber(fiber->tsan, kNoSync);)
  swap(simulator.scheduler, *fiber);
}

Block& block_of(const Fiber* fiber) { return *fiber->stream->blocks[fiber->slot]; }

void remove_from_runnable(Fiber* fiber) {
  auto& runnable = fiber->stream->runnable;
  for (size_t i = 0; i < runnable.size(); ++i) {
    if (runnable[i] != fiber) continue;
    runnable[i] = runnable.back();
    runnable.pop_back();
    return;
  }
}

// A fiber's whole life: one kernel after another of its stream.
void live() {
  for (;;) {
    Fiber* fiber = simulator.current;
    Stream* stream = fiber->stream;
    SCALEMOE_IF_TSAN(__tsan_acquire(&stream->order[stream->num_launches % 2]);)
    const Launch& launch = stream->queue.front();
    launch.body(launch.argument);
    SCALEMOE_IF_TSAN(__tsan_release(&stream->order[(stream->num_launches + 1) % 2]);)
    Block& block = block_of(fiber);
    simulator.block_ended = ++block.exited == block_size.x;
    if (block.barrier.waiting != 0) give_up("a thread has left the kernel while others of its block wait at __syncthreads");
    if (block.warps[fiber->thread / kWarpSize].barrier.waiting != 0) give_up("a lane has left the kernel while others of its warp wait");
    remove_from_runnable(fiber);
    --stream->num_live;
    switch_to_scheduler();
  }
}

// Before the run starts: a fiber is born with all that its creator knows, and must not know what other streams did meanwhile.
void make_fibers(Stream* stream, size_t count) {
  while (stream->fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, live, 0);
    fiber->stream = stream;
    SCALEMOE_IF_TSAN(fiber->tsan = __tsan_create_fiber(0);)
    stream->fibers.push_back(std::move(fiber));
  }
}

void start_block(Stream* stream, unsigned slot) {
  const unsigned threads = stream->queue.front().threads;
  auto block = std::make_unique<Block>();
  block->index = stream->next_block++;
  block->warps.resize((threads + kWarpSize - 1) / kWarpSize);
  std::memset(block->shared.get(), 0xa5, kSharedBytes);  // shared memory starts as anything but zeros
  stream->blocks[slot] = std::move(block);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = stream->fibers[slot * threads + i].get();
    fiber->slot = slot, fiber->thread = i;
    stream->runnable.push_back(fiber);
  }
  stream->num_live += threads;
  SCALEMOE_IF_TSAN(__tsan_release(&stream->order[stream->num_launches % 2]);)
}

// Starts blocks where there is room; ends the launch when there are none left.
void advance(Stream* stream) {
  const Launch& launch = stream->queue.front();
  for (unsigned slot = 0; slot < kResidentBlocks; ++slot) {
    auto& block = stream->blocks[slot];
    if (block != nullptr && block->exited == launch.threads) stream->old_blocks.push_back(std::move(block));
    if (block == nullptr && stream->next_block < launch.blocks) start_block(stream, slot);
  }
  if (stream->num_live != 0) return;
  stream->old_launches.push_back(launch);
  stream->queue.pop_front();
  stream->next_block = 0;
  ++stream->num_launches;
}

Stream* pick_stream(const std::vector<Stream*>& busy) {
  if (simulator.turns % kTurnsPerMood == 0) simulator.favourite = next_random() % 3 != 0 ? busy[next_random() % busy.size()] : nullptr;
  if (simulator.favourite != nullptr && !simulator.favourite->queue.empty() && next_random() % 16 != 0) return simulator.favourite;
  return busy[next_random() % busy.size()];
}

void run_all() {
  std::vector<Stream*> busy;
  for (Stream* stream : simulator.streams) {
    if (!stream->queue.empty()) busy.push_back(stream);
  }
  SCALEMOE_IF_TSAN(simulator.tsan_scheduler = __tsan_get_current_fiber();)
  while (!busy.empty()) {
    Stream* stream = pick_stream(busy);
    if (stream->num_live == 0) advance(stream);
    if (stream->runnable.empty()) give_up("divergent barrier: every thread waits for others");
    switch_to(stream->runnable[next_random() % stream->runnable.size()]);
    ++simulator.turns;
    if (simulator.block_ended) advance(stream);
    simulator.block_ended = false;
    if (!stream->queue.empty()) continue;
    for (size_t i = 0; i < busy.size(); ++i) {
      if (busy[i] == stream) busy.erase(busy.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  for (Stream* stream : simulator.streams) {
    SCALEMOE_IF_TSAN(__tsan_acquire(&stream->order[stream->num_launches % 2]);)
    for (const Launch& launch : stream->old_launches) launch.destroy(launch.argument);
    stream->old_launches.clear();
    stream->old_blocks.clear();
  }
}

// The current fiber waits until `needed` have come; then `members(add)` names all of them.
template <class Members>
void meet(Barrier& barrier, unsigned needed, Members members) {
  Fiber* fiber = simulator.current;
  void* order = &barrier.order[barrier.round % 2];
  (void)order;
  SCALEMOE_IF_TSAN(__tsan_release(order);)
  remove_from_runnable(fiber);
  if (++barrier.waiting == needed) {
    barrier.waiting = 0;
    ++barrier.round;
    members([&](Fiber* member) { fiber->stream->runnable.push_back(member); });
  }
  switch_to_scheduler();
  SCALEMOE_IF_TSAN(__tsan_acquire(order);)
}

}  // namespace

void sync_threads() {
  Fiber* fiber = simulator.current;
  Stream* stream = fiber->stream;
  Block& block = block_of(fiber);
  if (block.exited != 0) give_up("__syncthreads after other threads of the block have left the kernel");
  const unsigned threads = block_size.x, first = fiber->slot * threads;
  meet(block.barrier, threads, [&](auto add) {
    for (unsigned i = 0; i < threads; ++i) add(stream->fibers[first + i].get());
  });
}

void exchange_in_warp(uint32_t value, uint32_t (&values)[32]) {
  Fiber* fiber = simulator.current;
  Stream* stream = fiber->stream;
  Warp& warp = block_of(fiber).warps[fiber->thread / kWarpSize];
  uint32_t* slots = warp.values[warp.barrier.round % 2];
  slots[fiber->thread % kWarpSize] = value;
  const unsigned first = fiber->slot * block_size.x + fiber->thread / kWarpSize * kWarpSize;
  meet(warp.barrier, kWarpSize, [&](auto add) {
    for (unsigned i = 0; i < kWarpSize; ++i) add(stream->fibers[first + i].get());
  });
  std::memcpy(values, slots, sizeof(values));
}

void* shared_memory(const void* key, size_t bytes) {
  Block& block = block_of(simulator.current);
  const auto [place, is_new] = block.shared_offset.try_emplace(key, block.shared_used);
  if (is_new) block.shared_used += (bytes + 15) / 16 * 16;
  if (block.shared_used > kSharedBytes) give_up("too much shared memory");
  return block.shared.get() + place->second;
}

void maybe_switch() {
  if (next_random() % kSwitchEvery == 0) switch_to_scheduler();
}

void pause() {
  if (!simulator.deferred) sched_yield();
  switch_to_scheduler();
}

uint64_t now_ns() {
  if (simulator.deferred) return simulator.turns * kNsPerTurn;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000ull + static_cast<uint64_t>(now.tv_nsec);
}

void launch(void* key, unsigned blocks, unsigned threads, void (*body)(void*), void (*destroy)(void*), void* argument) {
  auto& stream = simulator.by_key[key];
  if (stream == nullptr) {
    stream = std::make_unique<Stream>();
    simulator.streams.push_back(stream.get());
  }
  make_fibers(stream.get(), size_t{kResidentBlocks} * threads);
  SCALEMOE_IF_TSAN(__tsan_release(&stream->order[0]); __tsan_release(&stream->order[1]);)
  stream->queue.push_back(Launch{blocks, threads, body, destroy, argument});
  if (!simulator.deferred) run_all();
}

}  // namespace emulation

#define SCALEMOE_API extern "C" __attribute__((visibility("default")))

// From now on launches of this OS thread only queue, until `scalemoe_emulated_run`, in simulated time.
SCALEMOE_API void scalemoe_emulated_defer(uint64_t seed) {
  emulation::simulator.deferred = true;
  emulation::simulator.random = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
}

// Runs all queued launches, those of different streams interleaved at random.
SCALEMOE_API void scalemoe_emulated_run() {
  using emulation::simulator;
  emulation::run_all();
  for (emulation::Stream* stream : simulator.streams) {
    SCALEMOE_IF_TSAN(for (auto& fiber : stream->fibers) __tsan_destroy_fiber(fiber->tsan);)
    (void)stream;
  }
  simulator.streams.clear();
  simulator.by_key.clear();
  simulator.favourite = nullptr;
  simulator.deferred = false;
}
