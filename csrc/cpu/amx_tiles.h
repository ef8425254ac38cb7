// Products of bfloat16 matrices on AMX tiles. Operands are first packed into tiles of our own, padded with zeros, so
// that no tile is ever loaded from the caller's memory.
#pragma once

#include <immintrin.h>

#include "buffer.h"
#include "vector.h"

namespace ADAMSS_ISA {

// A tile has 16 rows of 64 bytes. As a left operand it is 16 rows by 32 of depth; as a right operand 16 columns, each
// row holding two neighbours in depth of every column; as a sum 16 x 16 floats.
constexpr int64_t ROWS = 16, DEPTH = 32, TILE = ROWS * DEPTH, SUM = ROWS * ROWS;
// Products come in blocks of 2 x 2 tiles: 32 rows by 32 columns.
constexpr int64_t PAIR = 2 * ROWS;
// About the steps of depth after which sums go to memory: what a block reads meanwhile stays in the first-level cache.
constexpr int64_t STEPS = 8;

inline int64_t steps_for(int64_t depth) { return (depth + DEPTH - 1) / DEPTH; }
inline int64_t pairs_for(int64_t count) { return (count + PAIR - 1) / PAIR; }

// Tile registers are set up while one of these lives: all eight whole.
class TilesInUse {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {};
        uint8_t rows[16] = {};
    };

  public:
    TilesInUse() {
        Configuration c;
        for (int i = 0; i < 8; ++i) c.bytes_per_row[i] = 64, c.rows[i] = 16;
        _tile_loadconfig(&c);
    }
    ~TilesInUse() { _tile_release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

// A mask of the first n of 32 bfloat16 or 16 floats; none when n is negative.
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }
inline __mmask16 first16(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

inline __m512i load_row(const bfloat16* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }

// 16 x 16 elements of 32 bits.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    ADAMSS_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    ADAMSS_UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    ADAMSS_UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    ADAMSS_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline __m512 load_floats(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first16(n), p); }
inline void round_row(__m512 low, __m512 high, bfloat16* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Rows of floats, rounded.
struct Rounded {
    Buffer<bfloat16> values;
    Buffer<const bfloat16*> rows;

    Rounded(const float* const* from, int64_t count, int64_t width)
        : values(count * round_up(width, DEPTH), UNINITIALISED), rows(count) {
        const int64_t stride = round_up(width, DEPTH);
        for (int64_t p = 0; p < count; ++p) {
            rows[p] = values.data() + p * stride;
            for (int64_t i = 0; i < width; i += DEPTH)
                round_row(load_floats(from[p] + i, width - i), load_floats(from[p] + i + ROWS, width - i - ROWS),
                          values.data() + p * stride + i);
        }
    }
};

// Left operand: tiles [row / 16][step]; `M` rows are padded to whole pairs.
inline void pack_left(const bfloat16* rows, int64_t stride, int64_t M, int64_t width, int64_t steps, bfloat16* tiles) {
    for (int64_t m = 0; m < pairs_for(M) * PAIR; ++m) {
        bfloat16* to = tiles + m / ROWS * steps * TILE + m % ROWS * DEPTH;
        for (int64_t d = 0; d < width; d += DEPTH, to += TILE)
            _mm512_store_si512(to, m < M ? load_row(rows + m * stride + d, width - d) : _mm512_setzero_si512());
    }
}

// Right operand, one pair of column tiles: tiles [step][2].
// `columns[n]` holds column n along depth.
inline void pack_columns(const bfloat16* const* columns, int64_t count, int64_t depth, bfloat16* tiles) {
    for (int64_t d = 0; d < depth; d += DEPTH)
        for (int64_t half = 0; half < 2; ++half, tiles += TILE) {
            __m512i r[16];
            for (int64_t n = 0; n < ROWS; ++n)
                r[n] = half * ROWS + n < count ? load_row(columns[half * ROWS + n] + d, depth - d)
                                               : _mm512_setzero_si512();
            transpose(r);
            for (int64_t n = 0; n < ROWS; ++n) _mm512_store_si512(tiles + n * DEPTH, r[n]);
        }
}

// Two rows of 32 columns, neighbours in depth, as one row of each of two right tiles.
inline void interleave(__m512i a, __m512i b, bfloat16* left, bfloat16* right) {
    // Unpacking works within 128 bits: this order makes its low results the columns 0 to 15.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    a = _mm512_permutexvar_epi64(order, a), b = _mm512_permutexvar_epi64(order, b);
    _mm512_store_si512(left, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(right, _mm512_unpackhi_epi16(a, b));
}

// `rows[d]` holds row d, of which `width` columns are taken.
inline void pack_rows(const bfloat16* const* rows, int64_t depth, int64_t first, int64_t width, bfloat16* tiles) {
    for (int64_t d = 0; d < depth; d += DEPTH, tiles += 2 * TILE)
        for (int64_t j = 0; j < ROWS; ++j) {
            const int64_t k = d + 2 * j;
            const __m512i zero = _mm512_setzero_si512();
            const __m512i a = k < depth ? load_row(rows[k] + first, width) : zero;
            const __m512i b = k + 1 < depth ? load_row(rows[k + 1] + first, width) : zero;
            interleave(a, b, tiles + j * DEPTH, tiles + TILE + j * DEPTH);
        }
}

// The compiler does not know that loading a tile reads memory: what was stored must be there by now.
inline void tiles_read_memory() { __asm__ volatile("" ::: "memory"); }

// sum (COUNT x 2 tiles) = or += COUNT (1 or 2) left tiles, `stride` apart, times a pair of right tiles, over `steps` of
// depth. The tile unit works by itself: `meanwhile`, called at every step, is nearly free.
template <int COUNT, class F>
void multiply_pair(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t steps, bool add, float* sum,
                   F& meanwhile) {
    tiles_read_memory();
    if (add) {
        _tile_loadd(0, sum, 64);
        _tile_loadd(1, sum + SUM, 64);
        if (COUNT == 2) {
            _tile_loadd(2, sum + 2 * SUM, 64);
            _tile_loadd(3, sum + 3 * SUM, 64);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, left + k * TILE, 64);
        _tile_loadd(6, right + 2 * k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + (2 * k + 1) * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (COUNT == 2) {
            _tile_loadd(5, left + stride + k * TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        meanwhile();
    }
    _tile_stored(0, sum, 64);
    _tile_stored(1, sum + SUM, 64);
    if (COUNT == 2) {
        _tile_stored(2, sum + 2 * SUM, 64);
        _tile_stored(3, sum + 3 * SUM, 64);
    }
}

// The 16 sums of row i and column tile j of a 2 x 2 block.
inline __m512 sum_row(const float* sum, int64_t i, int64_t j) {
    return _mm512_load_ps(sum + (i / ROWS * 2 + j) * SUM + i % ROWS * ROWS);
}

// One pair of right tiles after `pairs` pairs of left rows: sums [pair][2][2].
template <class F>
void multiply_panel(const bfloat16* left, int64_t left_steps, int64_t pairs, const bfloat16* right, int64_t steps,
                    float* sums, F& meanwhile) {
    const int64_t rounds = larger(1, (steps + STEPS / 2) / STEPS), round = (steps + rounds - 1) / rounds;
    for (int64_t k = 0; k < steps; k += round)
        for (int64_t pair = 0; pair < pairs; ++pair)
            multiply_pair<2>(left + (2 * pair * left_steps + k) * TILE, left_steps * TILE, right + 2 * k * TILE,
                             smaller(round, steps - k), k > 0, sums + pair * 4 * SUM, meanwhile);
}

// Left operand S^T, rounded: tiles [column / 16][token / 32] of S (tokens, stride), of which RHO columns are taken.
inline void pack_transposed(const float* S, int64_t stride, int64_t tokens, int64_t rho, bfloat16* tiles) {
    for (int64_t p = 0; p < rho; p += ROWS)
        for (int64_t m = 0; m < tokens; m += DEPTH, tiles += TILE) {
            __m512i half[2][16];
            for (int64_t h = 0; h < 2; ++h) {
                for (int64_t i = 0; i < ROWS; ++i) {
                    const int64_t token = m + h * ROWS + i;
                    half[h][i] = token < tokens ? (__m512i)load_floats(S + token * stride + p, rho - p)
                                                : _mm512_setzero_si512();
                }
                transpose(half[h]);
            }
            for (int64_t i = 0; i < ROWS; ++i) round_row((__m512)half[0][i], (__m512)half[1][i], tiles + i * DEPTH);
        }
}

}  // namespace ADAMSS_ISA
