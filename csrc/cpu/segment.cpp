#include "segment.h"

#include <cerrno>
#include <cstdio>
#include <utility>

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

// Older than these in some C libraries that the kernel outlives.
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#define F_SEAL_SEAL 0x0001
#define F_SEAL_SHRINK 0x0002
#define F_SEAL_GROW 0x0004
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace scalemoe {
namespace {

constexpr int kFixedSize = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// Takes all pages from the system, or says that it has none left.
int reserve(int fd, uint8_t* data, size_t size) {
  // First by the mapping, which takes huge pages where the system allows them; an older kernel knows no such advice.
  if (madvise(data, size, MADV_POPULATE_WRITE) != 0 && errno != EINVAL) return errno == EFAULT ? ENOMEM : errno;
  int failed;
  do failed = posix_fallocate(fd, 0, static_cast<off_t>(size));
  while (failed == EINTR);
  return failed;
}

}  // namespace

int Segment::create(const char* label, size_t size, Segment* segment) {
  Segment made;
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  made.fd_ = static_cast<int>(syscall(SYS_memfd_create, label, flags | MFD_NOEXEC_SEAL));  // hardened kernels refuse it without
  if (made.fd_ < 0 && errno == EINVAL) made.fd_ = static_cast<int>(syscall(SYS_memfd_create, label, flags));
  if (made.fd_ < 0) return errno;
  if (ftruncate(made.fd_, static_cast<off_t>(size)) != 0 || fcntl(made.fd_, F_ADD_SEALS, kFixedSize) != 0) return errno;
  int failed = made.map(made.fd_, size, true);
  if (!failed) failed = reserve(made.fd_, made.data_, size);
  if (failed) return failed;
  *segment = std::move(made);
  return 0;
}

int Segment::open(int64_t pid, int64_t fd, size_t size, bool writable, Segment* segment) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%lld/fd/%lld", static_cast<long long>(pid), static_cast<long long>(fd));
  Segment opened;
  // The number comes from another process and may be nonsense: a pipe would block, a terminal would become ours.
  opened.fd_ = ::open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (opened.fd_ < 0) return errno;
  struct stat status;
  if (fstat(opened.fd_, &status) != 0) return errno;
  const int seals = fcntl(opened.fd_, F_GET_SEALS);
  if (!S_ISREG(status.st_mode) || seals < 0 || !(seals & F_SEAL_SHRINK) || static_cast<size_t>(status.st_size) < size) return EBADF;
  if (const int failed = opened.map(opened.fd_, size, writable)) return failed;
  // Spares the first op a fault per page; no harm where it does not work.
  madvise(opened.data_, size, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
  opened.close_fd();
  *segment = std::move(opened);
  return 0;
}

int Segment::map(int fd, size_t size, bool writable) {
  void* at = mmap(nullptr, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return errno;
  data_ = static_cast<uint8_t*>(at);
  size_ = size;
  // A forked data loader must neither write here nor keep the memory alive.
  madvise(at, size, MADV_DONTFORK);
  madvise(at, size, MADV_HUGEPAGE);
  return 0;
}

void Segment::close_fd() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

int Segment::release_fd() { return std::exchange(fd_, -1); }

void Segment::swap(Segment& other) {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(fd_, other.fd_);
}

Segment::~Segment() {
  if (data_) munmap(data_, size_);
  close_fd();
}

}  // namespace scalemoe
