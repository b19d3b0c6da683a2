// The C interface of shared memory between ranks; ops/transports/shm.py calls it. Functions return 0, a negative `Outcome`, or an errno.
#include <cerrno>
#include <new>

#include "exchange.h"

using scalemoe::Arena;
using scalemoe::Exchange;
using scalemoe::OpArgs;

#define SCALEMOE_API extern "C" __attribute__((visibility("default")))

namespace {

Exchange* exchange_of(void* handle) { return static_cast<Exchange*>(handle); }
const uint8_t* in(const void* data) { return static_cast<const uint8_t*>(data); }
uint8_t* out(void* data) { return static_cast<uint8_t*>(data); }

// No exception may pass through ctypes; the only one there can be is of memory for small arrays.
template <class F>
int guarded(void* handle, F op) {
  try {
    return op(*exchange_of(handle));
  } catch (const std::bad_alloc&) {
    Arena& arena = exchange_of(handle)->arena;
    return arena.fail(scalemoe::Failure::kNoMemory, arena.rank(), ENOMEM);
  }
}

}  // namespace

// -1 if there is no such process, 0 if that cannot be told.
SCALEMOE_API int64_t scalemoe_shm_start_time(int64_t pid) { return scalemoe::start_time(pid); }

SCALEMOE_API int scalemoe_shm_create_control(int64_t ranks, const uint64_t* token, int* fd) {
  return Arena::create_control(ranks, token, fd);
}

// pids and start_times: int64 [ranks]; control_fd: of rank 0.
SCALEMOE_API int scalemoe_shm_open(
    int64_t rank, int64_t ranks, const int64_t* pids, const int64_t* start_times, int64_t control_fd, const uint64_t* token,
    double timeout_s, void** handle) {
  try {
    std::vector<scalemoe::Process> processes;
    for (int64_t other = 0; other < ranks; other++) processes.push_back({pids[other], start_times[other]});
    auto* exchange = new Exchange;
    const int failed = exchange->arena.open(static_cast<int>(rank), processes, control_fd, token, timeout_s);
    if (failed) delete exchange;
    *handle = failed ? nullptr : exchange;
    return failed;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

// In a forked child nothing is mapped, and the addresses may be something else's.
SCALEMOE_API void scalemoe_shm_close(void* handle) {
  if (!exchange_of(handle)->arena.inherited()) delete exchange_of(handle);
}

// An error of this rank's own: ends the arena for all.
SCALEMOE_API int scalemoe_shm_fail(void* handle) {
  Arena& arena = exchange_of(handle)->arena;
  return arena.fail(scalemoe::Failure::kOwnError, arena.rank());
}

// report: failure, culprit, reporter, detail, op
SCALEMOE_API void scalemoe_shm_failure(void* handle, int64_t* report) {
  const scalemoe::FailureReport found = exchange_of(handle)->arena.failure();
  report[0] = static_cast<int64_t>(found.failure);
  report[1] = found.culprit;
  report[2] = found.reporter;
  report[3] = found.detail;
  report[4] = static_cast<int64_t>(found.op);
}

SCALEMOE_API int scalemoe_shm_gather_counts(void* handle, const void* counts, int64_t count, int64_t item, void* gathered) {
  return guarded(handle, [&](Exchange& exchange) { return exchange.gather_counts(in(counts), count, item, out(gathered)); });
}

// sizes: rows, ints of the map
SCALEMOE_API int scalemoe_shm_dispatch_begin(void* handle, const OpArgs* args, const void* x, const void* probs, int64_t* sizes) {
  return guarded(handle, [&](Exchange& exchange) {
    scalemoe::MapSizes found{};
    const int outcome = exchange.dispatch_begin(*args, in(x), in(probs), &found);
    sizes[0] = found.rows;
    sizes[1] = found.ints;
    return outcome;
  });
}

SCALEMOE_API int scalemoe_shm_dispatch_finish(void* handle, void* rows, void* row_probs, int64_t* rows_per_expert, int32_t* map) {
  return guarded(handle, [&](Exchange& exchange) { return exchange.dispatch_finish(out(rows), out(row_probs), rows_per_expert, map); });
}

SCALEMOE_API int scalemoe_shm_combine(void* handle, const OpArgs* args, const void* rows, void* y) {
  return guarded(handle, [&](Exchange& exchange) { return exchange.combine(*args, in(rows), nullptr, out(y), nullptr); });
}

SCALEMOE_API int scalemoe_shm_combine_backward(void* handle, const OpArgs* args, const void* grad_y, void* grad_rows) {
  return guarded(handle, [&](Exchange& exchange) { return exchange.combine_backward(*args, in(grad_y), out(grad_rows)); });
}

SCALEMOE_API int scalemoe_shm_dispatch_backward(
    void* handle, const OpArgs* args, const void* grad_rows, const void* grad_row_probs, void* grad_x, void* grad_probs) {
  return guarded(handle, [&](Exchange& exchange) {
    return exchange.combine(*args, in(grad_rows), in(grad_row_probs), out(grad_x), out(grad_probs));
  });
}
