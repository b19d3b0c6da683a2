// What the ranks of a group share: a barrier that notices dead and hung ranks, and memory that each rank writes and all read.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "segment.h"

namespace scalemoe {

// The ops, as in `OPS` of ops/transports/shm.py.
enum class Op : int32_t { kNone = 0, kGatherCounts, kDispatch, kCombine, kCombineBackward, kDispatchBackward };

// Why an arena can no longer be used, as in `Arena._error` of ops/transports/shm.py.
enum class Failure : int32_t {
  kNone = 0,
  kDead,        // the culprit's process is gone
  kLeft,        // the culprit closed its arena
  kTimeout,     // the culprit did not come to the barrier
  kMismatch,    // the culprit called another op, or with other sizes; detail: the index of the field of `Call`
  kCorrupt,     // what the culprit shared makes no sense
  kNoMemory,    // the culprit could not get memory; detail: errno
  kNotMapped,   // the culprit's memory could not be opened; detail: errno
  kOwnError,    // the culprit raised an error of its own
};

// What a rank is doing: the same on all ranks, but for `tokens`.
struct Call {
  int64_t op = 0, number = 0, confirms = 0, row_bytes = 0, dtype = 0, value_bytes = 0, columns = 0, num_local = 0;
  int64_t tokens = 0;
};
constexpr int kCallFields = 9, kComparedFields = 8;

struct FailureReport {
  Failure failure = Failure::kNone;
  int32_t culprit = 0, reporter = 0, detail = 0;
  Op op = Op::kNone;
};

struct Process {
  int64_t pid, start_time;  // the latter tells it from another process that got its number
};

struct Control;      // the shared control segment: arena.cpp
struct RankControl;  // a rank's lines in it

// Start time of a process in clock ticks since boot; -1 if it is gone or a zombie, 0 if it cannot be read.
int64_t start_time(int64_t pid);

// Owns this rank's mappings. Not thread-safe.
//
// Each rank has two halves of memory, which it alone writes. Op number n uses half n % 2: every rank writes its own, passes one barrier,
// and reads the others'. Whoever passes the barrier of op n knows that all ranks have come to it, and so have finished op n - 1; half
// (n + 1) % 2, last read in op n - 1, is free for op n + 1.
//
// What others write is not trusted: it is checked, and copied before it is checked if it is used again.
class Arena {
 public:
  // A control segment for `size` ranks, marked with a random token. Returns 0 or an errno; the caller closes `fd`.
  static int create_control(int64_t size, const uint64_t token[2], int* fd);

  // Maps the control segment of rank 0. Returns 0 or an errno; EBADF if it is another one, ESRCH if rank 0 is dead.
  int open(int rank, const std::vector<Process>& processes, int64_t control_fd, const uint64_t token[2], double timeout_s);
  ~Arena();

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(processes_.size()); }
  bool inherited() const;  // by a fork: not this process's to use

  // The next op begins: at least so many bytes of this rank's half, at a cache line. Null after a failure.
  uint8_t* begin(Op op, size_t bytes);

  // Everyone has written, and the others' halves may be read. `call` describes the op; its number is filled in.
  // Returns 0, or -1 after a failure.
  int barrier(Call call);

  // After `barrier`: the half, its size and the call of a rank.
  const uint8_t* half(int rank) const { return halves_[parity_][rank].data(); }
  size_t half_bytes(int rank) const { return halves_[parity_][rank].size(); }
  const Call& call(int rank) const { return calls_[rank]; }

  // Ends the use of the arena on all ranks, unless it has ended before. Returns -1.
  int fail(Failure failure, int culprit, int detail = 0);
  FailureReport failure() const;

 private:
  RankControl& control(int rank) const;
  int meet(const Call& call);
  int wait(uint32_t epoch);
  bool look_for_the_missing(uint32_t epoch);
  int compare(const Call& call, uint32_t epoch);
  int remap(bool* changed);
  void wake_all() const;

  int rank_ = 0;
  int64_t pid_ = 0;
  double timeout_s_ = 0;
  bool spins_ = false;
  Segment control_;
  std::vector<Process> processes_;
  Op op_ = Op::kNone;
  int64_t number_ = 0;
  int parity_ = 0;
  uint32_t epoch_ = 0;
  std::vector<Call> calls_;
  std::vector<Segment> halves_[2];
  std::vector<uint32_t> generations_[2];
};

}  // namespace scalemoe
