// Memory that is reserved and not filled: only the pages that are touched exist.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

// Zeros that take memory only where they are written.
template <class T>
class Reserved {
 public:
  explicit Reserved(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("memory cannot be reserved");
    data_ = static_cast<T*>(at);
  }
  ~Reserved() { munmap(data_, bytes_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  T* get() const { return data_; }

 private:
  size_t bytes_;
  T* data_ = nullptr;
};
