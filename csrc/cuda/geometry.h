// How many blocks of what shape each kernel takes: host arithmetic on sizes, in 64 bits, without CUDA.
#pragma once

#include <cstdint>

namespace adamss {

constexpr int64_t SHARED_LIMIT = 48 * 1024;  // what a block gets without asking, on every GPU
constexpr int64_t MAX_BLOCKS = 0x7fffffff;   // of gridDim.x; gridDim.y and z end at 65535 and stay 1

constexpr int64_t cdiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }
constexpr int64_t up(int64_t a, int64_t b) { return cdiv(a, b) * b; }

// Forward: a block's warps lie one above the other, each lane on one pack of columns and TOKENS rows at a time.
constexpr int FORWARD_WARPS = 8;
constexpr int TOKENS = 4;

struct ForwardTiles {
    int64_t rows;      // of y in one tile
    int64_t tiles_n;   // across y
    int64_t blocks;    // in all
    int64_t shared;    // bytes; 0 where S and C are read from global memory
};

constexpr ForwardTiles forward_tiles(int64_t M, int64_t N, int64_t RHO, int64_t r_max, int64_t size_X, int64_t size_T) {
    const int64_t block_n = 32 * (16 / size_X), tiles_n = cdiv(N, block_n);
    int64_t rows = 64;
    // Rows come in whole warps' worth; fewer than TOKENS are not worth staging.
    while (rows > TOKENS && (rows * RHO + r_max * block_n) * size_T > SHARED_LIMIT) rows /= 2;
    const int64_t bytes = (rows * RHO + r_max * block_n) * size_T;
    const bool staged = bytes <= SHARED_LIMIT;
    if (!staged) rows = 64;
    return {rows, tiles_n, cdiv(M, rows) * tiles_n, staged ? bytes : 0};
}

// Backward: a block owns BACKWARD_ROWS tokens and a block of columns of S, and walks over a stretch of rows of C.
constexpr int BACKWARD_THREADS = 128;
constexpr int BACKWARD_ROWS = 64;
constexpr int64_t DS_ROWS = BACKWARD_ROWS + 1;  // one more keeps the columns of a token on different banks
constexpr int64_t TILE_BYTES = 256;              // of one token's dy in a tile
constexpr int64_t COLUMN_BYTES = 192;            // of one token's S in a block

constexpr int64_t backward_shared(int64_t RHO, int64_t size_T) {  // bytes besides the tile of dy: S and dS
    const int64_t block_rho = COLUMN_BYTES / size_T;
    return (RHO < block_rho ? RHO : block_rho) * (BACKWARD_ROWS + DS_ROWS) * size_T;
}

struct BackwardTiles {
    int64_t tiles_m, blocks_rho;
    int64_t stretches, width;  // of rows of C
    int64_t groups;            // parts of dC that one tile of tokens writes
};

constexpr BackwardTiles backward_tiles(int64_t M, int64_t N, int64_t RHO, int64_t size_X, int64_t size_T,
                                       int64_t multiprocessors) {
    const int64_t block_n = TILE_BYTES / size_X, tiles_n = cdiv(N, block_n);
    const int64_t tiles_m = cdiv(M, BACKWARD_ROWS), blocks_rho = cdiv(RHO, COLUMN_BYTES / size_T);
    // About four blocks for each multiprocessor, and no stretch without a tile.
    const int64_t wanted = M ? cdiv(4 * multiprocessors, tiles_m * blocks_rho) : 1;
    const int64_t width = cdiv(tiles_n, wanted < tiles_n ? wanted : tiles_n) * block_n;
    // Threads beyond the columns of a tile share its rows, and write parts of their own.
    return {tiles_m, blocks_rho, cdiv(N, width), width, BACKWARD_THREADS / block_n};
}

}  // namespace adamss
