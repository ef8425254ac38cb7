// How an operator takes its operands from torch, and gives its results back.
#pragma once

#include <initializer_list>

#include "shim.h"

namespace adamss::torch {

// The inputs of an operator in their order; each is taken once, and owned from then on.
class Inputs {
    const Value* next_;

  public:
    explicit Inputs(const Value* stack) : next_(stack) {}
    Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*next_++)); }
    Tensor optional() {
        const Value* const held = reinterpret_cast<const Value*>(*next_++);
        Tensor t(held ? reinterpret_cast<Handle>(*held) : nullptr);
        delete held;
        return t;
    }
    bool boolean() { return *next_++ & 1; }
    int64_t integer() { return int64_t(*next_++); }
    template <size_t SIZE>
    void booleans(bool (&out)[SIZE]) {
        const ListHandle list = reinterpret_cast<ListHandle>(*next_++);
        int32_t error = 0;
        for (size_t i = 0; i < SIZE; ++i) {
            Value item = 0;
            error |= shim.torch_list_get_item(list, i, &item);
            out[i] = item & 1;
        }
        check(shim.torch_delete_list(list) | error, "list");
    }
};

inline void set_outputs(Value* stack, std::initializer_list<Tensor*> outputs) {
    for (Tensor* t : outputs) *stack++ = reinterpret_cast<Value>(t->release());
}

inline Tensor copied(const Tensor& t, int32_t dtype) {
    Tensor copy = empty(t.device(), dtype, t.size(0), t.dimensions() == 1 ? -1 : t.size(1));
    check(shim.aoti_torch_copy_(copy.get(), t.get(), 0), "copy_");
    return copy;
}

// The tensor itself where it is contiguous and of `dtype`, else a copy that is.
inline Tensor dense(Tensor t, int32_t dtype) {
    return !t || (t.dtype() == dtype && t.is_contiguous()) ? std::move(t) : copied(t, dtype);
}

// Rows, offsets and masks as the kernels of a library take them; masks may be none.
template <class Layout>
Layout layout_of(const Tensor& row_subspace, const Tensor& offsets, const Tensor& active, const Tensor& trainable) {
    return {row_subspace.size(0),
            offsets.size(0) - 1,
            static_cast<const int32_t*>(row_subspace.data()),
            static_cast<const int32_t*>(offsets.data()),
            static_cast<const uint8_t*>(active.data()),
            static_cast<const uint8_t*>(trainable.data())};
}

}  // namespace adamss::torch
