// Memory shared between processes, without a name.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scalemoe {

// Owns a mapping and, until `close_fd`, the file descriptor behind it. The memory lives until the last process has unmapped it.
//
// It is a memfd, opened by others through /proc/<pid>/fd/<fd>: there is no entry in any directory that could be left behind, whatever kills
// the ranks, and the size of /dev/shm (64 MB in many containers) is no limit. Seals keep its size fixed, so nobody's access can fault.
class Segment {
 public:
  Segment() = default;
  Segment(Segment&& other) noexcept { swap(other); }
  Segment& operator=(Segment&& other) noexcept {
    Segment(static_cast<Segment&&>(other)).swap(*this);
    return *this;
  }
  ~Segment();

  // New zeroed memory. All of it is taken from the system at once, so that too little is an error here, not a SIGBUS later.
  // Returns 0 or an errno.
  static int create(const char* label, size_t size, Segment* segment);

  // Maps another process's segment of at least `size` bytes. Returns 0 or an errno; EBADF for what no Segment made.
  static int open(int64_t pid, int64_t fd, size_t size, bool writable, Segment* segment);

  // When everyone has mapped it.
  void close_fd();

  // Hands over the descriptor: the caller closes it.
  int release_fd();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  int fd() const { return fd_; }

 private:
  void swap(Segment& other);
  int map(int fd, size_t size, bool writable);

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
};

}  // namespace scalemoe
