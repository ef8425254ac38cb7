// What is used of torch's stable C interface, declared by hand: the libraries are built without torch, and find these
// functions in the torch of the process that loads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace adamss::torch {

// A tensor, a list, and a value on the stack of an operator: a tensor or list owned by its reader, a bool, or for an
// optional a pointer to a value (null for none), owned likewise.
typedef struct AtenTensorOpaque* Handle;
typedef struct StableListOpaque* ListHandle;
typedef struct TorchLibraryOpaque* LibraryHandle;
typedef struct CUDAGuardOpaque* GuardHandle;
typedef uint64_t Value;
typedef void (*Kernel)(Value* stack, uint64_t inputs, uint64_t outputs);

// The oldest torch that has all of these, in torch's encoding: its conventions are the ones kept here.
constexpr uint64_t ABI_VERSION = uint64_t(2) << 56 | uint64_t(11) << 48;

// All return 0 for success. F(name, arguments). tests/torch_shim.cpp holds them against torch's own headers.
#define ADAMSS_TORCH_FUNCTIONS(F)                                                                               \
    F(aoti_torch_library_init_fragment, (const char*, const char* file, uint32_t line, LibraryHandle* made))    \
    F(aoti_torch_library_def, (LibraryHandle, const char* schema))                                              \
    F(aoti_torch_library_init_impl, (const char*, const char* key, const char* file, uint32_t line, \
                                     LibraryHandle* made))                                                      \
    F(torch_library_impl, (LibraryHandle, const char* name, Kernel, uint64_t abi_version))                      \
    F(torch_list_get_item, (ListHandle, size_t index, Value* item))                                             \
    F(torch_delete_list, (ListHandle))                                                                          \
    F(aoti_torch_delete_tensor_object, (Handle))                                                                \
    F(aoti_torch_get_data_ptr, (Handle, void**))                                                                \
    F(aoti_torch_get_dim, (Handle, int64_t*))                                                                   \
    F(aoti_torch_get_sizes, (Handle, int64_t**))                                                                \
    F(aoti_torch_get_strides, (Handle, int64_t**))                                                              \
    F(aoti_torch_get_dtype, (Handle, int32_t*))                                                                 \
    F(aoti_torch_get_device_type, (Handle, int32_t*))                                                           \
    F(aoti_torch_get_device_index, (Handle, int32_t*))                                                          \
    F(aoti_torch_is_contiguous, (Handle, bool*))                                                                \
    F(aoti_torch_empty_strided, (int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype, \
                                 int32_t device_type, int32_t device_index, Handle* made))                      \
    F(aoti_torch_create_tensor_from_blob, (void*, int64_t dimensions, const int64_t* sizes, const int64_t* strides, \
                                           int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index, \
                                           Handle* made))                                                       \
    F(aoti_torch__reinterpret_tensor, (Handle, int64_t dimensions, const int64_t* sizes, const int64_t* strides, \
                                       int64_t offset, Handle* made))                                           \
    F(aoti_torch_copy_, (Handle to, Handle from, int32_t non_blocking))                                         \
    F(aoti_torch_cpu_mm_out, (Handle out, Handle left, Handle right))                                           \
    F(aoti_torch_cpu_addmm_out, (Handle out, Handle added, Handle left, Handle right, double beta, double alpha))

// Those of a torch with CUDA alone.
#define ADAMSS_TORCH_CUDA_FUNCTIONS(F)                                       \
    F(aoti_torch_create_cuda_guard, (int32_t device_index, GuardHandle*))    \
    F(aoti_torch_delete_cuda_guard, (GuardHandle))                           \
    F(aoti_torch_get_current_cuda_stream, (int32_t device_index, void** stream))

// Plain values. F(type, name).
#define ADAMSS_TORCH_CONSTANTS(F)               \
    F(int32_t, aoti_torch_device_type_cpu)      \
    F(int32_t, aoti_torch_dtype_float32)        \
    F(int32_t, aoti_torch_dtype_float64)        \
    F(int32_t, aoti_torch_dtype_bfloat16)       \
    F(int32_t, aoti_torch_dtype_float16)        \
    F(int32_t, aoti_torch_dtype_uint8)          \
    F(int32_t, aoti_torch_dtype_bool)

struct Shim {
#define F(name, arguments) int32_t(*name) arguments;
    ADAMSS_TORCH_FUNCTIONS(F)
    ADAMSS_TORCH_CUDA_FUNCTIONS(F)
#undef F
#define F(type, name) type name;
    ADAMSS_TORCH_CONSTANTS(F)
#undef F
};
extern Shim shim;  // each library's own

inline void check(int32_t error, const char* what) {
    // torch has written its own message to stderr.
    if (error) throw std::runtime_error(std::string("adamss_kernels: torch failed in ") + what);
}

struct Device {
    int32_t type, index;
};

// An owned tensor, or none.
class Tensor {
    Handle handle_ = nullptr;

  public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) shim.aoti_torch_delete_tensor_object(handle_);
    }

    explicit operator bool() const { return handle_; }
    Handle get() const { return handle_; }
    Handle release() { return std::exchange(handle_, nullptr); }

    // Null for none.
    void* data() const {
        void* p = nullptr;
        if (handle_) check(shim.aoti_torch_get_data_ptr(handle_, &p), "data_ptr");
        return p;
    }
    int64_t dimensions() const {
        int64_t dimensions;
        check(shim.aoti_torch_get_dim(handle_, &dimensions), "dim");
        return dimensions;
    }
    int64_t size(int dimension) const {
        int64_t* sizes;
        check(shim.aoti_torch_get_sizes(handle_, &sizes), "sizes");
        return sizes[dimension];
    }
    int64_t stride(int dimension) const {
        int64_t* strides;
        check(shim.aoti_torch_get_strides(handle_, &strides), "strides");
        return strides[dimension];
    }
    int32_t dtype() const {
        int32_t dtype;
        check(shim.aoti_torch_get_dtype(handle_, &dtype), "dtype");
        return dtype;
    }
    Device device() const {
        Device device;
        check(shim.aoti_torch_get_device_type(handle_, &device.type) |
                  shim.aoti_torch_get_device_index(handle_, &device.index),
              "device");
        return device;
    }
    bool is_contiguous() const {
        bool is;
        check(shim.aoti_torch_is_contiguous(handle_, &is), "is_contiguous");
        return is;
    }
};

// A new matrix on `device`, or with one size a vector; none where there is no room for it.
inline Tensor try_empty(Device device, int32_t dtype, int64_t rows, int64_t columns) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns < 0 ? 1 : columns, 1};
    Handle made = nullptr;
    const int32_t failed = shim.aoti_torch_empty_strided(columns < 0 ? 1 : 2, sizes, strides, dtype, device.type,
                                                         device.index, &made);
    return Tensor(failed ? nullptr : made);
}
inline Tensor empty(Device device, int32_t dtype, int64_t rows, int64_t columns = -1) {
    Tensor made = try_empty(device, dtype, rows, columns);
    check(!made, "empty");
    return made;
}
// On the CPU.
inline Tensor empty(int32_t dtype, int64_t rows, int64_t columns = -1) {
    return empty({shim.aoti_torch_device_type_cpu, 0}, dtype, rows, columns);
}

// A matrix in memory of ours.
inline Tensor of_memory(void* memory, int32_t dtype, int64_t rows, int64_t columns) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    Handle made;
    check(shim.aoti_torch_create_tensor_from_blob(memory, 2, sizes, strides, 0, dtype, shim.aoti_torch_device_type_cpu,
                                                  0, &made),
          "from_blob");
    return Tensor(made);
}

// A matrix in the memory of `t`, `offset` elements from its first one on.
inline Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns, int64_t stride, int64_t step) {
    const int64_t sizes[] = {rows, columns}, strides[] = {stride, step};
    Handle made;
    check(shim.aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &made), "view");
    return Tensor(made);
}

// Views of a matrix: as it is, and transposed.
inline Tensor view(const Tensor& t) { return view(t, 0, t.size(0), t.size(1), t.stride(0), t.stride(1)); }
inline Tensor transposed(const Tensor& t) { return view(t, 0, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

// A view of a contiguous matrix as `count` matrices of so many rows, one under the other.
inline Tensor stacked(const Tensor& t, int64_t count, int64_t rows) {
    const int64_t columns = t.size(1);
    const int64_t sizes[] = {count, rows, columns}, strides[] = {rows * columns, columns, 1};
    Handle made;
    check(shim.aoti_torch__reinterpret_tensor(t.get(), 3, sizes, strides, 0, &made), "stack");
    return Tensor(made);
}

// A view of a matrix of one row.
inline Tensor row(const Tensor& t) {
    const int64_t size = t.size(1), stride = t.stride(1);
    Handle made;
    check(shim.aoti_torch__reinterpret_tensor(t.get(), 1, &size, &stride, 0, &made), "row");
    return Tensor(made);
}

// out = left right, or with `added` (of out's shape, or a row) added + left right.
inline void multiply(const Tensor& out, const Tensor& added, const Tensor& left, const Tensor& right) {
    if (added)
        check(shim.aoti_torch_cpu_addmm_out(out.get(), added.get(), left.get(), right.get(), 1, 1), "addmm");
    else
        check(shim.aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()), "mm");
}

}  // namespace adamss::torch
