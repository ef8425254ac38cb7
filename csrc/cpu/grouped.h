// Forward and backward with another adapter for each group of tokens: all groups in parallel, then all blocks of those
// that have several, so that neither many small groups nor one large one leave threads idle. Once per instruction set.
#pragma once

#include "backward.h"
#include "forward.h"

namespace ADAMSS_ISA {

// What a kernel of one adapter gets to see of the arguments for all.
template <class T, class Args>
Args of_group(const Args& args, const adamss_groups& groups, int64_t group) {
    const adamss_layout& l = args.layout;
    const int64_t slot = groups.slots[group];
    Args own = args;
    own.M = groups.starts[group + 1] - groups.starts[group];
    own.tokens = groups.tokens + groups.starts[group];
    own.B = static_cast<const T*>(args.B) + slot * l.offsets[l.K] * args.R;
    own.C = static_cast<const T*>(args.C) + slot * l.N * args.r_max;
    if (l.active) own.layout.active = l.active + slot * l.K;
    if (l.trainable) own.layout.trainable = l.trainable + slot * l.K;
    return own;
}

// An object for each group that has tokens, and the blocks of work that they come to.
template <class Object>
class ByGroup {
    struct Block {
        int64_t group, index;
    };
    const adamss_groups& groups_;
    Buffer<Object*> objects_;

    template <class Finish>
    void finish(int64_t group, const Finish& finish) {
        finish(*objects_[group]);
        delete objects_[group];
        objects_[group] = nullptr;
    }

  public:
    explicit ByGroup(const adamss_groups& groups) : groups_(groups), objects_(groups.count) {}
    ByGroup(const ByGroup&) = delete;
    ~ByGroup() {
        for (Object* object : objects_) delete object;
    }

    // make(group) makes an object, or null for one that needs none; run(object, block) does one of its blocks(object),
    // in any order; finish(object) what follows. A group of one block is one task: what was made for it is still
    // in cache, and its memory serves the next.
    template <class Make, class Blocks, class Run, class Finish>
    void work(const Make& make, const Blocks& blocks, const Run& run, const Finish& finish) {
        parallel_blocks(groups_.count, [&](int64_t group) {
            if (groups_.starts[group] == groups_.starts[group + 1]) return;
            objects_[group] = make(group);
            if (!objects_[group] || blocks(*objects_[group]) != 1) return;
            run(*objects_[group], 0);
            this->finish(group, finish);
        });
        int64_t count = 0;
        for (const Object* object : objects_)
            if (object) count += blocks(*object);
        Buffer<Block> all(count);
        int64_t at = 0;
        for (int64_t group = 0; group < groups_.count; ++group)
            for (int64_t i = 0; objects_[group] && i < blocks(*objects_[group]); ++i) all[at++] = {group, i};
        if (!count) return;
        parallel_blocks(count, [&](int64_t i) { run(*objects_[all[i].group], all[i].index); });
        parallel_blocks(groups_.count, [&](int64_t group) {
            if (objects_[group]) this->finish(group, finish);
        });
    }
};

// f(token) for those that take no adapter.
template <class F>
void for_others(const adamss_groups& groups, int64_t M, const F& f) {
    for (int64_t i = groups.starts[groups.count]; i < M; ++i) f(groups.tokens[i]);
}

// Groups of up to so many tokens cost less token by token, from B and C as they lie, than laid out for tiles.
constexpr int64_t FEW_TOKENS = 2;

// y = bias + S C^T with S = B P for token m of a group; `z` (R,) and `S` (RHO and a register) are scratch.
template <class T, class X>
void update_token(const adamss_forward_args& args, const ColumnIndex& all, const T* bias, int64_t m, T* z, T* S) {
    constexpr int W = Vector<T>::width;
    const adamss_layout& l = args.layout;
    const int64_t R = args.R, rho = l.offsets[l.K], whole_R = R / W * W, whole_N = l.N / W * W;
    to_arithmetic(static_cast<const X*>(args.P) + m * args.stride_pm, z, R);
    for (int64_t k = 0; k < l.K; ++k)
        for (int64_t p = l.offsets[k]; p < l.offsets[k + 1]; ++p) {
            S[p] = 0;
            if (l.active && !l.active[k]) continue;
            const T* const B = static_cast<const T*>(args.B) + p * R;
            vec<T> total = {};
            for (int64_t r = 0; r < whole_R; r += W) total += load(B + r) * load(z + r);
            S[p] = sum<T>(total);
            for (int64_t r = whole_R; r < R; ++r) S[p] += B[r] * z[r];
        }
    if (args.S) std::memcpy(static_cast<T*>(args.S) + m * rho, S, rho * sizeof(T));
    const T* const C = static_cast<const T*>(args.C);
    X* const y = static_cast<X*>(args.y) + m * l.N;
    int64_t i = 0;
    if (args.r_max == 1 && all.is_full)
        for (; i < whole_N; i += W)
            store_as(y + i, load(bias + i) + gather<T>(S, all.index.data() + i) * load(C + i));
    for (; i < l.N; ++i) {
        const int32_t k = l.row_subspace[i], start = l.offsets[k], r = l.offsets[k + 1] - start;
        T total = bias[i];
        for (int32_t j = 0; j < r; ++j) total += S[start + j] * C[i * args.r_max + j];
        store_as(y + i, total);
    }
}

// All tokens of groups that are few in them; f(group) says whether one is. Returns how many tokens these are.
template <class T, class X, class F>
int64_t update_few(const adamss_forward_args& args, const adamss_groups& groups, const ColumnIndex& all, const F& f) {
    struct Place {
        int64_t group, token;
    };
    int64_t count = 0;
    Buffer<Place> places(groups.starts[groups.count]);
    for (int64_t group = 0; group < groups.count; ++group)
        for (int64_t i = groups.starts[group]; f(group) && i < groups.starts[group + 1]; ++i)
            places[count++] = {group, groups.tokens[i]};
    Buffer<T> bias(all.stride);
    if (args.bias) to_arithmetic(static_cast<const X*>(args.bias), bias.data(), args.layout.N);
    constexpr int64_t SPAN = 4;
    parallel_blocks((count + SPAN - 1) / SPAN, [&](int64_t block) {
        Buffer<T> scratch(args.R + args.layout.offsets[args.layout.K] + Vector<T>::width);
        for (int64_t i = block * SPAN; i < smaller(count, (block + 1) * SPAN); ++i)
            update_token<T, X>(of_group<T>(args, groups, places[i].group), all, bias.data(), places[i].token,
                               scratch.data(), scratch.data() + args.R);
    });
    return count;
}

template <class T, class X>
adamss_status grouped_forward(const adamss_forward_args& args, const adamss_groups& groups) {
    const adamss_layout& l = args.layout;
    const int64_t N = l.N, rho = l.offsets[l.K];
    const adamss_layout unmasked = {l.N, l.K, l.row_subspace, l.offsets, nullptr, nullptr};
    const ColumnIndex all(unmasked, Columns(unmasked), Vector<T>::width);
    const auto is_few = [&](int64_t group) {
        return args.P && groups.starts[group + 1] - groups.starts[group] <= FEW_TOKENS;
    };
    // Waking threads for groups that are done already would cost as much as their tokens did.
    if (update_few<T, X>(args, groups, all, is_few) < groups.starts[groups.count])
        ByGroup<Update<T, X>>(groups).work(
            [&](int64_t group) {
                return is_few(group) ? nullptr : new Update<T, X>(of_group<T>(args, groups, group), &all);
            },
            [](const Update<T, X>& update) { return update.blocks(); },
            [](const Update<T, X>& update, int64_t block) { update.block(block); },
            [](const Update<T, X>&) {});
    for_others(groups, args.M, [&](int64_t m) {
        X* const y = static_cast<X*>(args.y) + m * N;
        if (args.bias)
            std::memcpy(static_cast<void*>(y), args.bias, N * sizeof(X));
        else
            std::memset(static_cast<void*>(y), 0, N * sizeof(X));
        if (args.S) std::memset(static_cast<T*>(args.S) + m * rho, 0, rho * sizeof(T));
    });
    return ADAMSS_UPDATE;
}

template <class T, class X>
adamss_status grouped_backward(const adamss_backward_args& args, const adamss_groups& groups) {
    const adamss_layout& l = args.layout;
    const int64_t size_B = l.offsets[l.K] * args.R, size_C = l.N * args.r_max;
    T *const dB = static_cast<T*>(args.dB), *const dC = static_cast<T*>(args.dC);
    if (!args.dx && !dB && !dC) return ADAMSS_UPDATE;
    ByGroup<Gradients<T, X>>(groups).work(
        [&](int64_t group) {
            adamss_backward_args own = of_group<T>(args, groups, group);
            if (dB) own.dB = dB + group * size_B;
            if (dC) own.dC = dC + group * size_C;
            return new Gradients<T, X>(own);
        },
        [](const Gradients<T, X>& gradients) { return gradients.shares(); },
        [](Gradients<T, X>& gradients, int64_t share) { gradients.share(share); },
        [](Gradients<T, X>& gradients) { gradients.write(); });
    for (int64_t group = 0; group < groups.count; ++group) {
        if (groups.starts[group] < groups.starts[group + 1]) continue;
        if (dB) std::memset(dB + group * size_B, 0, size_B * sizeof(T));
        if (dC) std::memset(dC + group * size_C, 0, size_C * sizeof(T));
    }
    if (args.dx)
        for_others(groups, args.M, [&](int64_t m) {
            std::memset(static_cast<void*>(static_cast<X*>(args.dx) + m * args.D), 0, args.D * sizeof(X));
        });
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
