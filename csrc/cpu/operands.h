// What the kernels make of their operands before they start: the columns that take part, C by columns, Q.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "tiles.h"

namespace ADAMSS_ISA {

// Multiply-adds below which waking another thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 20;

// Tokens that are worked on while they stay in cache.
constexpr int64_t BLOCK_M = 64;

// The columns of S that are not pruned, those that learn first, and where each subspace starts among them.
struct Columns {
    int64_t count = 0, learning = 0;
    bool is_all;             // all of them learn: compact is full
    Buffer<int32_t> column;  // (count,): compact -> full
    Buffer<int32_t> start;   // (K,), -1 where pruned

    explicit Columns(const adamss_layout& l) : column(l.offsets[l.K]), start(l.K) {
        for (int64_t k = 0; k < l.K; ++k) start[k] = -1;
        for (int pass = 0; pass < 2; ++pass) {
            for (int64_t k = 0; k < l.K; ++k) {
                const bool learns = !l.trainable || l.trainable[k];
                if ((l.active && !l.active[k]) || learns != (pass == 0)) continue;
                start[k] = int32_t(count);
                for (int32_t p = l.offsets[k]; p < l.offsets[k + 1]; ++p) column[count++] = p;
            }
            if (pass == 0) learning = count;
        }
        is_all = learning == l.offsets[l.K];
    }
};

// Without rows or subspaces, for what is not wanted.
inline adamss_layout no_rows(const adamss_layout& l) { return {0, 0, nullptr, l.offsets, nullptr, nullptr}; }

// How many of `count` columns make a block: all where the work is not worth a thread, else a sixteenth of them, or as
// few as are worth a thread of their own.
inline int64_t columns_per_block(int64_t count, int64_t work_per_column, int64_t multiple) {
    const int64_t threads = count * work_per_column / WORTH_A_THREAD, blocks = threads ? larger(16, threads) : 1;
    return round_up((count + blocks - 1) / blocks, multiple);
}

template <class F>
void parallel_blocks(int64_t blocks, const F& f) {
    auto task = [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
    };
    if (adamss::parallel_for(0, blocks, 1, task, const_cast<F*>(&f)) != 0) throw std::bad_alloc();
}

// The rows of x, y and what else runs over tokens that a kernel works on: ascending, or simply the first ones.
struct Tokens {
    const int64_t* index;  // null: token m is row m

    int64_t operator[](int64_t m) const { return index ? index[m] : m; }
    // Whether the rows from token m on, M of them, follow one another.
    bool are_together(int64_t m, int64_t M) const { return !index || index[m + M - 1] - index[m] == M - 1; }
};


// `count` rows of A (.., D) from an element on, `width` columns of them: where they lie if that is the arithmetic type,
// else a copy.
template <class T>
struct BasisRows {
    Buffer<T> copy;
    Buffer<const T*> rows;  // (count,)

    BasisRows(const void* A, bool is_bfloat16, int64_t D, int64_t begin, int64_t count, int64_t width)
        : copy(is_bfloat16 ? count * width : 0, UNINITIALISED), rows(count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = begin + i * D;
            rows[i] = is_bfloat16 ? copy.data() + i * width : static_cast<const T*>(A) + at;
            if constexpr (std::is_same_v<T, float>)
                if (is_bfloat16) to_arithmetic(static_cast<const bfloat16*>(A) + at, copy.data() + i * width, width);
        }
    }
};

// The compact column that each entry of C multiplies, columns of C running along N; 0 where there is none.
struct ColumnIndex {
    int64_t r_max = 0, stride;
    bool is_full = true;    // every entry of C counts
    Buffer<int32_t> index;  // (r_max, stride)

    ColumnIndex(const adamss_layout& l, const Columns& columns, int64_t width) : stride(round_up(l.N, width)) {
        for (int64_t k = 0; k < l.K; ++k)
            if (columns.start[k] >= 0) r_max = larger(r_max, l.offsets[k + 1] - l.offsets[k]);
        index.resize(r_max * stride);
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i];
            const int32_t r = columns.start[k] < 0 ? 0 : l.offsets[k + 1] - l.offsets[k];
            for (int32_t j = 0; j < r; ++j) index[j * stride + i] = columns.start[k] + j;
            is_full = is_full && r == r_max;
        }
    }
};

// C transposed to run along N, zero where no column is multiplied, beside the columns' index: another adapter's where
// that is the same.
template <class T>
struct Coefficients {
    const ColumnIndex own;
    const int32_t* index;  // (r_max, stride)
    int64_t r_max, stride;
    Buffer<T> value;  // (r_max, stride)

    Coefficients(const adamss_layout& l, const T* C, int64_t stride_c, const Columns& columns,
                 const ColumnIndex* shared = nullptr)
        : own(shared ? no_rows(l) : l, columns, Vector<T>::width),
          index((shared ? shared : &own)->index.data()),
          r_max((shared ? shared : &own)->r_max),
          stride((shared ? shared : &own)->stride),
          value(r_max * stride) {
        if ((shared ? shared : &own)->is_full) {
            for (int64_t j = 0; j < r_max; ++j)
                for (int64_t i = 0; i < l.N; ++i) value[j * stride + i] = C[i * stride_c + j];
            return;
        }
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i];
            for (int32_t j = 0; columns.start[k] >= 0 && j < l.offsets[k + 1] - l.offsets[k]; ++j)
                value[j * stride + i] = C[i * stride_c + j];
        }
    }
};

// The first `rho` rows of C^T for the compact columns, dense: for few columns a skinny product with it costs less than
// going through the rows of each subspace.
template <class T>
struct DenseCoefficients {
    int64_t stride;
    Buffer<T> values;
    Buffer<const T*> rows;  // (rho,)

    DenseCoefficients(const Coefficients<T>& c, int64_t rho, int64_t N)
        : stride(row_stride<T>(N)), values(rho * stride), rows(rho) {
        for (int64_t j = 0; j < c.r_max; ++j)
            for (int64_t i = 0; i < N; ++i) {
                const T value = c.value[j * c.stride + i];
                const int64_t p = c.index[j * c.stride + i];
                // Entries without a column are zero and point at column 0.
                if (p < rho && value != T(0)) values[p * stride + i] = value;
            }
        for (int64_t p = 0; p < rho; ++p) rows[p] = values.data() + p * stride;
    }
};

// The rows of C that are not pruned, one subspace after the other, in the order of their columns.
struct RowsBySubspace {
    struct Run {
        int64_t begin, end;  // places of its rows
        int64_t start, rank;  // its compact columns
    };
    int64_t places = 0;
    Buffer<Run> runs;       // (K,), of which the last may be empty
    Buffer<int32_t> place;  // (N,): row -> place, -1 where pruned

    // The rows of each subspace start at a multiple of `aligned` places.
    RowsBySubspace(const adamss_layout& l, const Columns& columns, int64_t aligned) : runs(l.K), place(l.N) {
        Buffer<int32_t> size(l.K), run(l.K);
        for (int64_t i = 0; i < l.N; ++i) ++size[l.row_subspace[i]];
        int32_t count = 0;
        for (int pass = 0; pass < 2; ++pass)
            for (int64_t k = 0; k < l.K; ++k) {
                if (columns.start[k] < 0 || (columns.start[k] < columns.learning) != (pass == 0)) continue;
                runs[count] = {places, places, columns.start[k], l.offsets[k + 1] - l.offsets[k]};
                places += round_up(size[k], aligned);
                run[k] = count++;
            }
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i];
            place[i] = columns.start[k] < 0 ? -1 : int32_t(runs[run[k]].end++);
        }
    }
};

// Rows of Q = B A and entries of q = B a for the compact columns; Q = B where there is no A.
template <class T>
struct Projection {
    int64_t stride;
    Buffer<T> values;
    Buffer<const T*> Q;  // (count,) rows
    Buffer<T> q;         // (count,)

    Projection(const Columns& columns, const T* B, const void* A, bool is_bfloat16, const T* a, int64_t R, int64_t D)
        : stride(row_stride<T>(D)),
          values(A ? round_up(columns.count, TILE_M) * stride : 0),
          Q(columns.count),
          q(columns.count) {
        for (int64_t p = 0; p < columns.count; ++p) Q[p] = B + columns.column[p] * R;
        if (!A) return;
        // Whole tiles of rows, the last ones zero.
        const int64_t rho = round_up(columns.count, TILE_M);
        Buffer<T> compact(rho * R);
        for (int64_t p = 0; p < columns.count; ++p) {
            std::memcpy(compact.data() + p * R, Q[p], R * sizeof(T));
            for (int64_t i = 0; a && i < R; ++i) q[p] += Q[p][i] * a[i];
            Q[p] = values.data() + p * stride;
        }
        const int64_t span = columns_per_block(D, rho * R, TILE_V * Vector<T>::width);
        parallel_blocks((D + span - 1) / span, [&](int64_t block) {
            const int64_t d = block * span, width = smaller(span, D - d);
            const BasisRows<T> A_d(A, is_bfloat16, D, d, R, width);
            product_block<T, T>(rho, width, R, compact.data(), R, A_d.rows.data(), values.data() + d, stride);
        });
    }
};

// The form of `kernel` whose `Row` holds `rho` columns, in registers where they suffice.
template <class T, class Kernel>
auto for_rho(int64_t rho, const Kernel& kernel) {
    if (rho <= Row<T, 1>::capacity) return kernel(Tile<1>());
    if (rho <= Row<T, 2>::capacity) return kernel(Tile<2>());
    if (rho <= Row<T, 4>::capacity) return kernel(Tile<4>());
    return kernel(Tile<0>());
}

// Whether rows of S fit registers, from which any entry is had by a permutation.
template <class T>
bool fits_registers(int64_t rho) {
    return for_rho<T>(rho, [](auto held) { return Row<T, decltype(held)::value>::IN_REGISTERS; });
}

// Whole registers are read and written from any entry of a row of S on.
template <class T>
int64_t padded_rho(const Columns& columns) {
    constexpr int W = Vector<T>::width;
    return round_up(larger(columns.count, 1) + W, 4 * W);
}

}  // namespace ADAMSS_ISA
