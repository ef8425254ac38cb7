// An array of run-time size. Not std::vector: a template of the standard library that is instantiated here with one
// instruction set's flags could be the copy that the linker keeps for all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "scratch.h"

namespace ADAMSS_ISA {

enum Uninitialised { UNINITIALISED };

template <class T>
class Buffer {
    T* p_ = nullptr;
    int64_t size_ = 0;

  public:
    Buffer() = default;
    // Zero-initialised.
    explicit Buffer(int64_t size) { resize(size); }
    // For what is written before it is read.
    Buffer(int64_t size, Uninitialised) { allocate(size); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    // Hold at least `size` elements; growing loses the old ones and zeroes all.
    void resize(int64_t size) {
        if (size <= size_) return;
        allocate(size);
        std::memset(static_cast<void*>(p_), 0, size * sizeof(T));
    }

    T* data() { return p_; }
    const T* data() const { return p_; }
    T& operator[](int64_t i) { return p_[i]; }
    const T& operator[](int64_t i) const { return p_[i]; }
    const T* begin() const { return p_; }
    const T* end() const { return p_ + size_; }

  private:
    // Registers are loaded from aligned rows at twice the rate of rows that straddle cache lines.
    void allocate(int64_t size) {
        release();
        p_ = static_cast<T*>(adamss::take_scratch(size * int64_t(sizeof(T))));
        if (!p_ && size) throw std::bad_alloc();
        size_ = size;
    }
    void release() {
        adamss::give_scratch(p_, size_ * int64_t(sizeof(T)));
        p_ = nullptr, size_ = 0;
    }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
// Elements from row to row of a matrix of our own: aligned, and no power of two, which would put all rows into the same
// few cache sets.
template <class T>
int64_t row_stride(int64_t width) {
    return round_up(width * int64_t(sizeof(T)), 64) / int64_t(sizeof(T)) + 64 / int64_t(sizeof(T));
}

}  // namespace ADAMSS_ISA
