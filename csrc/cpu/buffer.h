// A growing array. Not std::vector: a template of the standard library that is instantiated here with one instruction
// set's flags could be the copy that the linker keeps for all of them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace ADAMSS_ISA {

template <class T>
class Buffer {
    T* p_ = nullptr;
    int64_t size_ = 0;

  public:
    Buffer() = default;
    // Zero-initialised.
    explicit Buffer(int64_t size) { resize(size); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(p_); }

    // Grow to at least `size` elements; new ones are zero.
    void resize(int64_t size) {
        if (size <= size_) return;
        T* grown = static_cast<T*>(std::realloc(static_cast<void*>(p_), size * sizeof(T)));
        if (!grown) throw std::bad_alloc();
        std::memset(static_cast<void*>(grown + size_), 0, (size - size_) * sizeof(T));
        p_ = grown, size_ = size;
    }

    int64_t size() const { return size_; }
    T* data() { return p_; }
    const T* data() const { return p_; }
    T& operator[](int64_t i) { return p_[i]; }
    const T& operator[](int64_t i) const { return p_[i]; }
    T* begin() { return p_; }
    T* end() { return p_ + size_; }
    const T* begin() const { return p_; }
    const T* end() const { return p_ + size_; }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace ADAMSS_ISA
