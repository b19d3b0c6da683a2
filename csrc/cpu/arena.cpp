#include "arena.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <new>
#include <utility>

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace scalemoe {
namespace {

constexpr uint64_t kMagic = 0x31'656f'4d65'6c61ull;  // changes with the layout
constexpr double kSpinS = 30e-6, kSliceS = 50e-3, kDyingS = 1.0;
constexpr size_t kHalfStep = size_t{2} << 20;

struct SharedCall {
  std::atomic<int64_t> fields[kCallFields];
};

struct SharedHalf {
  std::atomic<int32_t> fd;
  std::atomic<uint32_t> generation;
  std::atomic<uint64_t> size;
};

}  // namespace

// Only its rank writes here. The call alternates with the epoch, the half with the op: a rank that has gone on to the next one leaves this
// one's as they are.
struct RankControl {
  alignas(64) std::atomic<uint32_t> epoch;
  std::atomic<uint32_t> left;
  alignas(64) SharedCall calls[2];
  alignas(64) SharedHalf halves[2];
};

struct Control {
  uint64_t magic, size, token[2];
  alignas(64) std::atomic<uint64_t> poison;  // the first failure, packed; written once
};

namespace {

static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared between processes");

size_t control_bytes(int64_t size) { return sizeof(Control) + size * sizeof(RankControl); }

double now_s() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, double time_s) {
  const timespec time{static_cast<time_t>(time_s), static_cast<long>((time_s - static_cast<time_t>(time_s)) * 1e9)};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &time, nullptr, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// As epochs wrap around.
int32_t ahead(uint32_t epoch, uint32_t of) { return static_cast<int32_t>(epoch - of); }

int cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

uint64_t pack(const FailureReport& report) {
  const auto bits = [](auto value, uint64_t mask, int at) { return (static_cast<uint64_t>(value) & mask) << at; };
  return bits(report.failure, 0xff, 0) | bits(report.op, 0xff, 8) | bits(report.culprit, 0xffff, 16) | bits(report.reporter, 0xffff, 32) |
         bits(report.detail, 0xffff, 48);
}

FailureReport unpack(uint64_t word) {
  FailureReport report;
  report.failure = static_cast<Failure>(word & 0xff);
  report.op = static_cast<Op>(word >> 8 & 0xff);
  report.culprit = static_cast<int32_t>(word >> 16 & 0xffff);
  report.reporter = static_cast<int32_t>(word >> 32 & 0xffff);
  report.detail = static_cast<int32_t>(word >> 48 & 0xffff);
  return report;
}

// Whether the process, whose descriptor could not be opened, is dead. A dying one has none for a moment before it counts as dead.
bool is_dead(const Process& process, int error) {
  const double end_s = now_s() + kDyingS;
  do {
    const int64_t started = start_time(process.pid);
    if (started != 0 && started != process.start_time) return true;
    usleep(1000);
  } while (error == ENOENT && now_s() < end_s);
  return false;
}

// The fields of a call in the order in which they are compared and reported.
void fields_of(const Call& call, int64_t (&fields)[kCallFields]) {
  const int64_t values[] = {call.op,          call.number,  call.confirms,  call.row_bytes, call.dtype,
                            call.value_bytes, call.columns, call.num_local, call.tokens};
  static_assert(sizeof values == sizeof fields, "every field is shared");
  std::copy(std::begin(values), std::end(values), fields);
}

}  // namespace

int64_t start_time(int64_t pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT || errno == ESRCH ? -1 : 0;
  const ssize_t length = read(fd, text, sizeof text - 1);
  const int error = errno;
  close(fd);
  if (length <= 0) return length < 0 && error == ESRCH ? -1 : 0;
  text[length] = 0;
  // The command's name may hold anything; the fields behind it are the state, 18 others and the start time.
  const char* at = strrchr(text, ')');
  char state;
  long long ticks;
  if (!at || sscanf(at + 1, " %c%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%lld", &state, &ticks) != 2) return 0;
  return state == 'Z' || state == 'X' ? -1 : ticks;
}

int Arena::create_control(int64_t size, const uint64_t token[2], int* fd) {
  Segment segment;
  if (const int failed = Segment::create("scalemoe-control", control_bytes(size), &segment)) return failed;
  auto* control = new (segment.data()) Control{};
  control->magic = kMagic;
  control->size = size;
  std::copy(token, token + 2, control->token);
  *fd = segment.release_fd();
  return 0;
}

int Arena::open(int rank, const std::vector<Process>& processes, int64_t control_fd, const uint64_t token[2], double timeout_s) {
  const int64_t size = static_cast<int64_t>(processes.size());
  Segment opened;
  if (const int failed = Segment::open(processes[0].pid, control_fd, control_bytes(size), true, &opened)) {
    return is_dead(processes[0], failed) ? ESRCH : failed;
  }
  const auto* control = reinterpret_cast<const Control*>(opened.data());
  if (control->magic != kMagic || control->size != processes.size()) return EBADF;
  if (std::memcmp(control->token, token, sizeof control->token) != 0) return EBADF;
  control_ = std::move(opened);
  rank_ = rank;
  pid_ = getpid();
  timeout_s_ = timeout_s;
  spins_ = size <= cores();
  processes_ = processes;
  calls_.resize(size);
  for (int parity : {0, 1}) {
    halves_[parity].resize(size);
    generations_[parity].resize(size);
  }
  return 0;
}

Arena::~Arena() {
  if (!control_.data()) return;
  control(rank_).left.store(1, std::memory_order_release);
  wake_all();
}

bool Arena::inherited() const { return getpid() != pid_; }

RankControl& Arena::control(int rank) const { return reinterpret_cast<RankControl*>(control_.data() + sizeof(Control))[rank]; }

uint8_t* Arena::begin(Op op, size_t bytes) {
  op_ = op;
  if (failure().failure != Failure::kNone) return nullptr;
  number_++;
  parity_ = number_ & 1;
  Segment& half = halves_[parity_][rank_];
  if (bytes > half.size() || !half.data()) {
    const size_t wanted = std::max({bytes, half.size() + half.size() / 2, size_t{1}});
    Segment larger;
    const int failed = Segment::create("scalemoe-rows", (wanted + kHalfStep - 1) / kHalfStep * kHalfStep, &larger);
    if (failed) return fail(Failure::kNoMemory, rank_, failed), nullptr;
    // Everyone has come to the barrier of the previous op, so nobody reads the old one any more.
    half = std::move(larger);
    SharedHalf& shared = control(rank_).halves[parity_];
    shared.fd.store(half.fd(), std::memory_order_relaxed);
    shared.size.store(half.size(), std::memory_order_relaxed);
    shared.generation.fetch_add(1, std::memory_order_relaxed);
  }
  return half.data();
}

int Arena::barrier(Call call) {
  call.op = static_cast<int64_t>(op_);
  call.number = number_;
  if (meet(call)) return -1;
  bool changed = false;
  if (remap(&changed)) return -1;
  if (!changed) return 0;
  // Nobody may leave, or close what it has just shared, before all have mapped it. All ranks saw the same generations, so all come here.
  Call confirming = call;
  confirming.confirms = 1;
  if (meet(confirming)) return -1;
  halves_[parity_][rank_].close_fd();
  return 0;
}

int Arena::meet(const Call& call) {
  const uint32_t epoch = ++epoch_;
  RankControl& own = control(rank_);
  int64_t fields[kCallFields];
  fields_of(call, fields);
  for (int i = 0; i < kCallFields; i++) own.calls[epoch & 1].fields[i].store(fields[i], std::memory_order_relaxed);
  own.epoch.store(epoch, std::memory_order_release);
  futex_wake(own.epoch);
  if (wait(epoch)) return -1;
  return compare(call, epoch);
}

int Arena::wait(uint32_t epoch) {
  const double start_s = now_s();
  for (int rank = 0; rank < size(); rank++) {
    std::atomic<uint32_t>& word = control(rank).epoch;
    double look_again_s = 0;
    for (;;) {
      const uint32_t seen = word.load(std::memory_order_acquire);
      if (ahead(seen, epoch) >= 0) break;
      if (failure().failure != Failure::kNone) return -1;
      const double time_s = now_s();
      if (spins_ && time_s - start_s < kSpinS) {
        for (int i = 0; i < 16; i++) pause_briefly();
        continue;
      }
      if (time_s >= look_again_s) {
        if (look_again_s > 0 && look_for_the_missing(epoch)) return -1;
        look_again_s = time_s + kSliceS;
      }
      if (time_s - start_s > timeout_s_) return fail(Failure::kTimeout, rank);
      futex_wait(word, seen, kSliceS);
    }
    if (ahead(word.load(std::memory_order_relaxed), epoch) > 1) return fail(Failure::kCorrupt, rank);
  }
  return 0;
}

// Whether a rank that has not come is dead or has left. One that was killed comes first: it may be why the others leave.
bool Arena::look_for_the_missing(uint32_t epoch) {
  for (const Failure failure : {Failure::kDead, Failure::kLeft}) {
    for (int rank = 0; rank < size(); rank++) {
      const RankControl& other = control(rank);
      if (ahead(other.epoch.load(std::memory_order_acquire), epoch) >= 0) continue;
      bool missing = other.left.load(std::memory_order_acquire);
      if (failure == Failure::kDead) {
        const int64_t started = missing ? 0 : start_time(processes_[rank].pid);
        missing = started != 0 && started != processes_[rank].start_time;
      }
      // Looked at again: it may have come before it went.
      if (missing && ahead(other.epoch.load(std::memory_order_acquire), epoch) < 0) {
        fail(failure, rank);
        return true;
      }
    }
  }
  return false;
}

int Arena::compare(const Call& call, uint32_t epoch) {
  int64_t own[kCallFields];
  fields_of(call, own);
  for (int rank = 0; rank < size(); rank++) {
    const SharedCall& shared = control(rank).calls[epoch & 1];
    int64_t fields[kCallFields];
    for (int i = 0; i < kCallFields; i++) fields[i] = shared.fields[i].load(std::memory_order_relaxed);
    for (int i = 0; i < kComparedFields; i++) {
      if (fields[i] != own[i]) return fail(Failure::kMismatch, rank, i);
    }
    calls_[rank] = call;
    calls_[rank].tokens = fields[kCallFields - 1];
    if (calls_[rank].tokens < 0) return fail(Failure::kCorrupt, rank);
  }
  return 0;
}

int Arena::remap(bool* changed) {
  for (int rank = 0; rank < size(); rank++) {
    const SharedHalf& shared = control(rank).halves[parity_];
    const uint32_t generation = shared.generation.load(std::memory_order_relaxed);
    if (generation == generations_[parity_][rank]) continue;
    *changed = true;
    generations_[parity_][rank] = generation;
    if (rank == rank_) continue;
    const size_t bytes = shared.size.load(std::memory_order_relaxed);
    const int fd = shared.fd.load(std::memory_order_relaxed);
    const int failed = Segment::open(processes_[rank].pid, fd, bytes, false, &halves_[parity_][rank]);
    if (!failed) continue;
    if (is_dead(processes_[rank], failed)) return fail(Failure::kDead, rank);
    return fail(failed == ENOMEM ? Failure::kNoMemory : Failure::kNotMapped, failed == ENOMEM ? rank_ : rank, failed);
  }
  return 0;
}

int Arena::fail(Failure failure, int culprit, int detail) {
  FailureReport report{failure, culprit, rank_, detail, op_};
  uint64_t none = 0;
  reinterpret_cast<Control*>(control_.data())->poison.compare_exchange_strong(none, pack(report), std::memory_order_acq_rel);
  wake_all();
  return -1;
}

FailureReport Arena::failure() const {
  return unpack(reinterpret_cast<const Control*>(control_.data())->poison.load(std::memory_order_acquire));
}

void Arena::wake_all() const {
  for (int rank = 0; rank < size(); rank++) futex_wake(control(rank).epoch);
}

}  // namespace scalemoe
